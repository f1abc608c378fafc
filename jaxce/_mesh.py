"""Rows and classes that are split over the devices of a mesh.

Everything that a loss has to know of a mesh is here: which of its axes split the rows and which the classes, what type
an array must have to meet the others inside `shard_map`, and the way into `shard_map` for arrays that are still whole.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


@jax.tree_util.register_static
@dataclass(frozen=True)
class Classes:
    """All classes of a row, of which the devices along mesh axes hold equal slices; without axes there is one slice.

    Attributes:
        number: how many classes there are. What the slices hold beyond them is padding.
        axes: the mesh axes.
        slices: how many devices there are along them.
    """

    number: int
    axes: tuple[str, ...] = ()
    slices: int = 1

    def start(self, size: int) -> Any:
        """The first class of the slice at hand; `size` is that of a slice."""
        return lax.axis_index(self.axes) * size if self.axes else 0

    def real(self, size: int) -> Any:
        """How many classes from `start` on are no padding, perhaps more than the slice has or less than 0; or None."""
        return None if self.number == self.slices * size else self.number - self.start(size)

    def sum(self, parts: Any) -> Any:
        """The sum over the slices."""
        return over_axes(parts, self.axes)


@dataclass(frozen=True)
class Split:
    """The mesh axes that split rows and classes.

    Attributes:
        rows: for every axis of the rows, the mesh axes that split it.
        classes: the mesh axes that split the classes.
        is_whole: whether the arrays are not split yet, so that `shard_map` has to be entered.
        mesh: the mesh that the arrays' types carry, where there is none in the context.
    """

    rows: tuple[tuple[str, ...], ...] = ()
    classes: tuple[str, ...] = ()
    is_whole: bool = False
    mesh: AbstractMesh | None = None

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The mesh axes that the rows are split over, here."""
        return () if self.is_whole else tuple(name for names in self.rows for name in names)

    @property
    def class_axes(self) -> tuple[str, ...]:
        """The mesh axes that the classes are split over, here."""
        return () if self.is_whole else self.classes

    def rows_spec(self) -> PartitionSpec:
        """How `shard_map` is to split arrays of the rows' shape."""
        return PartitionSpec(*self.rows)

    def classes_spec(self) -> PartitionSpec:
        """How `shard_map` is to split vectors of classes."""
        return PartitionSpec(self.classes)

    def spec(self, ndim: int, axis: int) -> PartitionSpec:
        """How `shard_map` is to split arrays of rows and classes, the classes along `axis`."""
        rows = [*self.rows, *[None] * (ndim - 1 - len(self.rows))]
        return PartitionSpec(*rows[:axis], self.classes, *rows[axis:])


UNSPLIT = Split()


def find_split(
    logits: tuple[str, Any, int], kernel: tuple[str, Any] | None, class_axis_name: Any, batch_axis_name: Any
) -> Split:
    """Which mesh axes split the rows and the classes: those that the caller names, or on an Explicit mesh the types.

    Args:
        logits: the name, the array, and the class axis: of hidden, that of the features.
        kernel: the name and the array (features, classes), if there is one.
        class_axis_name: what the caller said.
        batch_axis_name: what the caller said.
    """
    name, array, axis = logits
    held_name, held, held_axis = (name, array, axis) if kernel is None else (*kernel, 1)
    typed = _mesh_of_types(array, held)
    named = _split_by_names(batch_axis_name, class_axis_name, typed)
    types = _explicit(array)
    rows = named.rows or tuple(types[:axis] + types[axis + 1 :])
    taken = {name for names in rows for name in names}
    classes = named.classes or tuple(name for name in _explicit(held)[held_axis] if name not in taken)
    if not (taken or classes):
        return UNSPLIT
    manual, names = set(jax.sharding.get_abstract_mesh().manual_axes), taken | {*classes}
    if not manual:
        split = Split(rows, classes, is_whole=True, mesh=typed)
        _check_division(split, name, array.shape[:axis] + array.shape[axis + 1 :], held_name, held.shape[held_axis])
        return split
    if names - manual:
        raise ValueError(
            f"Rows and classes are split over {_listed(names)}, and the `shard_map` around the loss splits its "
            f"arguments over {_listed(manual)} alone. Pass it axis_names={{{_listed(names | manual)}}}."
        )
    same = set(classes) - varying(held)
    if same:
        raise ValueError(
            f"`class_axis_name` is {class_axis_name!r}, but all devices along {_listed(same)} hold the same "
            f"`{held_name}`: its classes are not split. Split them by the in_specs of `shard_map`, or leave the name "
            "out."
        )
    return Split(rows, classes)


def find_row_split(losses: Any, batch_axis_name: Any) -> Split:
    """As `find_split`, for losses, which need no `shard_map`."""
    return _split_by_names(batch_axis_name, None, _mesh_of_types(losses))


def _split_by_names(batch_axis_name: Any, class_axis_name: Any, typed: AbstractMesh | None) -> Split:
    """What the caller says of a mesh, checked against the one that is there: of the context, or else `typed`."""
    classes, rows = _names(class_axis_name), _row_names(batch_axis_name)
    names = {*classes, *(name for names in rows for name in names)}
    mesh = typed or jax.sharding.get_abstract_mesh()
    unknown = names - set(mesh.axis_names)
    if unknown:
        raise ValueError(
            f"{_listed(unknown)} must be an axis of a mesh: of the `shard_map` around the loss, whose arguments are "
            f"slices, or of `jax.set_mesh`, whose arrays are whole; here are {_listed(mesh.axis_names) or 'none'}. "
            "The axes of `vmap` and `pmap` are no mesh: pass reduction='parts' and add the parts up by their `psum`."
        )
    for name in names & set(mesh.manual_axes):
        if name not in varying(lax.axis_index(name)):
            raise ValueError(
                f"`shard_map` with check_vma=False does not know what differs along {name!r}, and would get the "
                "gradients wrong. Leave check_vma at True, its default."
            )
    return Split(rows, classes, is_whole=not mesh.manual_axes, mesh=typed)


def _mesh_of_types(*arrays: Any) -> AbstractMesh | None:
    """The mesh that the arrays' types carry, where there is none in the context."""
    if not jax.sharding.get_abstract_mesh().empty:
        return None
    meshes = (jax.typeof(array).sharding.mesh for array in arrays)
    return next((mesh for mesh in meshes if not mesh.empty), None)


def check_rows_vary(split: Split, *arrays: Any) -> None:
    """Rows that are the same on all devices would each count once for every device."""
    same = set(split.row_axes) - varying(*arrays)
    if same:
        raise ValueError(
            f"`batch_axis_name` names {_listed(same)}, but all devices along it hold the same rows. Split them by "
            "the in_specs of `shard_map`, or leave the name out."
        )


def slice_hint(shape: tuple[int, ...], size: int) -> str:
    """What may be wrong with a vector of classes where slices of `size` are at hand."""
    is_inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
    if is_inside and len(shape) == 1 and shape[0] > size and shape[0] % size == 0:
        return " Inside `shard_map` it is a slice, split like the classes."
    return ""


def _explicit(array: Any) -> list[tuple[str, ...]]:
    """For every axis of an array, the Explicit mesh axes that split it."""
    sharding = jax.typeof(array).sharding
    explicit = _explicit_axes(sharding.mesh)
    entries = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    return [tuple(name for name in _names(entry) if name in explicit) for entry in entries]


def _explicit_axes(mesh: AbstractMesh) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Explicit}


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _row_names(batch_axis_name: Any) -> tuple[tuple[str, ...], ...]:
    if isinstance(batch_axis_name, PartitionSpec):
        return tuple(_names(entry) for entry in batch_axis_name)
    return (_names(batch_axis_name),) if _names(batch_axis_name) else ()


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _check_division(split: Split, name: str, rows: tuple[int, ...], holder: str, num_classes: int) -> None:
    shape = (split.mesh or jax.sharding.get_abstract_mesh()).shape
    if len(split.rows) > len(rows):
        raise ValueError(
            f"`batch_axis_name` splits {len(split.rows)} axes of rows, and `{name}` has {len(rows)}, of lengths {rows}."
        )
    for length, names in zip(rows, split.rows, strict=False):
        count = math.prod(shape[axis] for axis in names)
        if length % count:
            raise ValueError(
                f"{count} devices along {_listed(names)} cannot share {length} rows of `{name}` evenly. Fill them up "
                "with rows that `where` leaves out."
            )
    count = math.prod(shape[axis] for axis in split.classes)
    if num_classes % count:
        raise ValueError(
            f"{count} devices along {_listed(split.classes)} cannot share {num_classes} classes of `{holder}` evenly. "
            f"Fill them up to {-(-num_classes // count) * count} and pass num_classes={num_classes}."
        )


def varying(*trees: Any) -> frozenset[str]:
    """The mesh axes of a `shard_map` around along which any of the arrays differs from device to device."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(trees)))


def vary(tree: Any, axes: Any) -> Any:
    """The same arrays, of a type that may differ along the axes.

    A derivative by one of them is then the device's own, and the cast adds it up over the devices, once.
    """

    def cast(array):
        missing = tuple(sorted(set(axes) - varying(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(cast, tree)


def over_axes(total: Any, axes: tuple[str, ...]) -> Any:
    """The sum over the devices along mesh axes; as it is where there are none."""
    return lax.psum(total, axes) if axes else total


def vary_rule(inputs: Any) -> Any:
    """Inputs of a rule, its `classes` among them, in the one type that its gradients have: each device's own."""
    return vary(inputs, varying(inputs) | {*inputs.classes.axes})


def over_devices(function: Callable[..., Any], split: Split, arguments: Any, specs: Any, out_specs: Any) -> Any:
    """function(*arguments), by every device on its slice: enters `shard_map` with arguments that are whole."""
    mesh = split.mesh or jax.sharding.get_abstract_mesh()
    specs = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: spec, part),
        specs,
        arguments,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    arguments = jax.tree.map(lambda array, spec: _retype(array, mesh, spec), arguments, specs)
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    mapped = jax.shard_map(function, mesh=split.mesh, in_specs=specs, out_specs=out_specs, axis_names=axes)
    return mapped(*arguments)


def _retype(array: Any, mesh: AbstractMesh, spec: PartitionSpec) -> Any:
    """The array split over the Explicit axes of the mesh as its type must say before `shard_map` takes it."""
    explicit = _explicit_axes(mesh)
    if not explicit:
        return array
    entries = [tuple(name for name in _names(entry) if name in explicit) for entry in spec]
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*entries)))


def enter(split: Split) -> Split:
    """The same split, of arrays that are not whole any more."""
    return replace(split, is_whole=False, mesh=None)
