"""How rows and classes are split over a mesh: by the caller's words, or by the types of the arrays.

Inside `shard_map` arrays are slices already. Whole arrays are taken into `shard_map` here.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxce._mesh import varying
from jaxce._types import AxisName, HeldArray, RowAxisNames

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")
_Tree = TypeVar("_Tree")


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


class Holder(NamedTuple):
    """An argument whose type may say how rows and classes are split.

    `rows_at` are its axes that are axes of the rows, `classes_at` is the axis of the classes, or None.
    """

    name: str
    array: HeldArray
    rows_at: tuple[int, ...] = ()
    classes_at: int | None = None


def find_split(
    holders: Sequence[Holder], class_axis_name: AxisName | None, batch_axis_name: RowAxisNames | None
) -> Split:
    """Which mesh axes split the rows and the classes: those that the caller names, or on an Explicit mesh the types.

    The first argument of which rows or classes are split decides, and the others follow it.

    Args:
        holders: the logits, or hidden and kernel, first.
        class_axis_name: what the caller said.
        batch_axis_name: what the caller said.
    """
    first = holders[0]
    with_classes, num_classes = next(
        (holder, holder.array.shape[holder.classes_at]) for holder in holders if holder.classes_at is not None
    )
    typed = _mesh_of_types(*(holder.array for holder in holders))
    named = _split_by_names(batch_axis_name, class_axis_name, typed)
    types = [(holder, _explicit(holder.array)) for holder in holders]
    of_rows = (tuple(_without(split[axis], named.classes) for axis in holder.rows_at) for holder, split in types)
    rows = named.rows or next((split for split in of_rows if any(split)), ())
    taken = tuple(name for names in rows for name in names)
    of_classes = (_without(split[holder.classes_at], taken) for holder, split in types if holder.classes_at is not None)
    classes = named.classes or next((names for names in of_classes if names), ())
    names = {*taken, *classes}
    if not names and not any(any(split) for _, split in types):
        return UNSPLIT
    mesh = typed or jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes)
    if not names <= set(mesh.axis_names):
        raise ValueError(
            f"`{first.name}` and `{with_classes.name}` are split over {_listed(names)} by their types, and the mesh in "
            f"force has {_listed(mesh.axis_names)}. Put both on one mesh."
        )
    if not manual:
        split = Split(rows, classes, is_whole=True, mesh=typed)
        _check_division(split, first, with_classes, num_classes)
        return split
    if names - manual:
        raise ValueError(
            f"Rows and classes are split over {_listed(names)}, and the `shard_map` around the loss splits its "
            f"arguments over {_listed(manual)} alone. Pass it axis_names={{{_listed(names | manual)}}}, and split the "
            "arguments by its in_specs."
        )
    check_classes_vary(classes, with_classes.name, with_classes.array)
    return Split(rows, classes)


def check_classes_vary(classes: tuple[str, ...], name: str, array: HeldArray) -> None:
    """Classes that are the same on all devices would be as many different ones."""
    same = set(classes) - varying(array)
    if same:
        raise ValueError(
            f"`class_axis_name` names {_listed(same)}, but all devices along it hold the same `{name}`: its classes "
            "are not split. Split them by the in_specs of `shard_map`, or leave the name out."
        )


def find_features(split: Split, name: str, kernel: HeldArray, feature_axis_name: AxisName | None) -> tuple[str, ...]:
    """Which of the mesh axes that split the rows split a kernel's features: by the caller's word, or its type."""
    named, rows = _names("feature_axis_name", feature_axis_name), {axis for axes in split.rows for axis in axes}
    if not named:
        return tuple(axis for axis in _explicit(kernel)[0] if axis in rows) if split.is_whole else ()
    if not rows.issuperset(named):
        raise ValueError(
            f"`feature_axis_name` names {_listed(set(named) - rows)}, which do not split the rows. The devices that "
            f"share the features of `{name}` must each have rows of their own: name the axes in `batch_axis_name` too."
        )
    if split.is_whole:
        count = math.prod((split.mesh or jax.sharding.get_abstract_mesh()).shape[axis] for axis in named)
        if kernel.shape[0] % count:
            raise ValueError(
                f"{count} devices along {_listed(named)} cannot share {kernel.shape[0]} features of `{name}` evenly."
            )
    elif same := set(named) - varying(kernel):
        raise ValueError(
            f"`feature_axis_name` names {_listed(same)}, but all devices along it hold the same `{name}`: its features "
            "are not split. Split them by the in_specs of `shard_map`, or leave the name out."
        )
    return named


def slices_of(feature_axis_name: AxisName | None) -> int:
    """Of how many slices an array is one, here: 1 outside `shard_map`."""
    inside = jax.sharding.get_abstract_mesh().manual_axes
    return math.prod(lax.axis_size(name) for name in _names("feature_axis_name", feature_axis_name) if name in inside)


def check_same(split: Split, arrays: Mapping[str, HeldArray | None]) -> None:
    """What has no classes must be the same where classes are split: else every device would have a loss of its own."""
    for name, array in arrays.items():
        differing = varying(array) & {*split.class_axes}
        if array is not None and differing:
            axis = sorted(differing)[0]
            how = "pmean" if jnp.issubdtype(array.dtype, jnp.floating) else "pmax"
            raise ValueError(
                f"`{name}` may differ along {_listed(differing)}, over which the classes are split, and must be the "
                f"same there, by its type too. If it is, cast it: jax.lax.{how}({name}, {axis!r})."
            )


def find_row_split(losses: HeldArray, batch_axis_name: RowAxisNames | None) -> Split:
    """As `find_split`, for losses, which need no `shard_map`."""
    return _split_by_names(batch_axis_name, None, _mesh_of_types(losses))


def find_label_split(labels: HeldArray, where: HeldArray | None) -> Split:
    """As `find_split`, for labels alone, or their mask: by their types."""
    for array in (labels,) if where is None else (labels, where):
        rows = tuple(_explicit(array))
        if any(rows):
            return Split(rows, is_whole=True, mesh=_mesh_of_types(array))
    return UNSPLIT


def _split_by_names(
    batch_axis_name: RowAxisNames | None, class_axis_name: AxisName | None, typed: AbstractMesh | None
) -> Split:
    """What the caller says of a mesh, checked against the one that is there: of the context, or else `typed`."""
    classes = _names("class_axis_name", class_axis_name)
    rows = _row_names(batch_axis_name)
    listed = [*classes, *(name for names in rows for name in names)]
    names = set(listed)
    if len(names) < len(listed):
        raise ValueError(
            "An axis of the mesh splits the rows or the classes, once: `class_axis_name` is "
            f"{reprlib.repr(class_axis_name)} and `batch_axis_name` is {reprlib.repr(batch_axis_name)}."
        )
    mesh = typed or jax.sharding.get_abstract_mesh()
    unknown = names - set(mesh.axis_names)
    if unknown:
        raise ValueError(
            f"{_listed(unknown)} must be an axis of a mesh: of the `shard_map` around the loss, whose arguments are "
            f"slices, or of `jax.set_mesh`, whose arrays are whole; here are {_listed(mesh.axis_names) or 'none'}. "
            f"{_NO_MESH}"
        )
    for name in names & set(mesh.manual_axes):
        if name not in varying(lax.axis_index(name)):
            raise ValueError(
                f"`shard_map` with check_vma=False, and `pmap`, do not know what differs along {name!r}, and would get "
                f"the gradients wrong. Leave check_vma at True, its default. {_NO_MESH}"
            )
    return Split(rows, classes, is_whole=not mesh.manual_axes, mesh=typed)


_NO_MESH = "For `vmap` and `pmap` pass reduction='parts', and add the parts up by their `psum`."


def _mesh_of_types(*arrays: HeldArray) -> AbstractMesh | None:
    """The mesh that the arrays' types carry, where there is none in the context."""
    if not jax.sharding.get_abstract_mesh().empty:
        return None
    meshes = (jax.typeof(array).sharding.mesh for array in arrays)
    return next((mesh for mesh in meshes if not mesh.empty), None)


def check_rows_vary(split: Split, *arrays: HeldArray | None) -> None:
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


def _explicit(array: HeldArray) -> list[tuple[str, ...]]:
    """For every axis of an array, the Explicit mesh axes that split it."""
    sharding = jax.typeof(array).sharding
    explicit = _explicit_axes(sharding.mesh)
    entries = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    return [tuple(name for name in _entry(entry) if name in explicit) for entry in entries]


def is_explicit(*trees: object) -> bool:
    """Whether a type of an array, or the mesh around, says over what it is split."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(trees)]
    return any(_explicit_axes(mesh) for mesh in (jax.sharding.get_abstract_mesh(), *meshes))


def _explicit_axes(mesh: AbstractMesh) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Explicit}


def _entry(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _without(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


def _names(argument: str, value: AxisName | None) -> tuple[str, ...]:
    if value is None:
        return ()
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        rows = ", or a PartitionSpec where several axes of rows are split" if argument == "batch_axis_name" else ""
        raise TypeError(
            f"`{argument}` must be the name of a mesh axis, or a tuple of names{rows}; got {reprlib.repr(value)}."
        )
    return tuple(names)


def _row_names(value: RowAxisNames | None) -> tuple[tuple[str, ...], ...]:
    if isinstance(value, PartitionSpec):
        return tuple(_names("batch_axis_name", entry) for entry in value)
    names = _names("batch_axis_name", value)
    return (names,) if names else ()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(reprlib.repr(name) for name in sorted(names))


def _check_division(split: Split, first: Holder, with_classes: Holder, num_classes: int) -> None:
    name, rows = first.name, tuple(first.array.shape[axis] for axis in first.rows_at)
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
            f"{count} devices along {_listed(split.classes)} cannot share {num_classes} classes of "
            f"`{with_classes.name}` evenly. Fill them up to {-(-num_classes // count) * count} and pass "
            f"num_classes={num_classes}."
        )


def over_devices(
    function: Callable[[*_Arguments], _Result],
    split: Split,
    arguments: tuple[*_Arguments],
    specs: tuple[object, ...],
    out_specs: PartitionSpec,
) -> _Result:
    """function(*arguments), by every device on its slice: enters `shard_map` with arguments that are whole.

    `specs` are the arguments again, with a `PartitionSpec` in the place of arrays.
    """
    mesh = split.mesh or jax.sharding.get_abstract_mesh()
    specs = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: spec, part),
        specs,
        arguments,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    arguments = jax.tree.map(lambda array, spec: _retype(array, mesh, spec), arguments, specs)
    return jax.shard_map(function, mesh=split.mesh, in_specs=specs, out_specs=out_specs)(*arguments)


def aligned(tree: _Tree) -> _Tree:
    """Arrays that broadcast to one shape, all split over the Explicit mesh as the first that has it is."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    ndim = max(map(jnp.ndim, leaves), default=0)
    splits = [_explicit(leaf) for leaf in leaves if leaf.ndim == ndim]
    split = next((split for split in splits if any(split)), None)
    if split is None:
        return tree
    mesh = _mesh_of_types(*leaves) or jax.sharding.get_abstract_mesh()

    def follow(array: HeldArray) -> HeldArray:
        axes = split[ndim - jnp.ndim(array) :]
        names = [() if length == 1 else axis for axis, length in zip(axes, jnp.shape(array), strict=True)]
        return _retype(array, mesh, PartitionSpec(*names))

    return jax.tree.map(follow, tree)


def whole(array: HeldArray) -> HeldArray:
    """The array on every device, of an Explicit mesh that splits it."""
    mesh = _mesh_of_types(array) or jax.sharding.get_abstract_mesh()
    return _retype(array, mesh, PartitionSpec())


def _retype(array: HeldArray, mesh: AbstractMesh, spec: PartitionSpec) -> HeldArray:
    """The array split over the Explicit axes of the mesh as its type must say before `shard_map` takes it."""
    explicit = _explicit_axes(mesh)
    wanted = [tuple(name for name in _entry(entry) if name in explicit) for entry in spec]
    if not explicit or wanted + [()] * (jnp.ndim(array) - len(wanted)) == _explicit(array):
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*wanted)))


def enter(split: Split) -> Split:
    """The same split, of arrays that are not whole any more."""
    return replace(split, is_whole=False, mesh=None)
