"""What a device has to know of the others inside `shard_map`: which classes it holds, what differs, what adds up."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import jax
from jax import lax
from jaxtyping import Array

_Tree = TypeVar("_Tree")


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

    def start(self, size: int) -> Array | int:
        """The first class of the slice at hand; `size` is that of a slice."""
        return lax.axis_index(self.axes) * size if self.axes else 0

    def real(self, size: int) -> Array | int | None:
        """How many classes from `start` on are no padding, perhaps more than the slice has or less than 0; or None."""
        return None if self.number == self.slices * size else self.number - self.start(size)

    def sum(self, parts: _Tree) -> _Tree:
        """The sum over the slices."""
        return over_axes(parts, self.axes)

    def largest(self, parts: Array) -> Array:
        """The largest of the slices, a constant to every derivative."""
        parts = lax.stop_gradient(parts)
        return lax.pmax(parts, self.axes) if self.axes else parts


class _OfClasses(Protocol):
    """The inputs of a rule, over classes that may be split."""

    @property
    def classes(self) -> Classes: ...


_Inputs = TypeVar("_Inputs", bound=_OfClasses)


def varying(*trees: object) -> frozenset[str]:
    """The mesh axes of a `shard_map` around along which any of the arrays differs from device to device."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(trees)))


def vary(tree: _Tree, axes: Iterable[str]) -> _Tree:
    """The same arrays, of a type that may differ along the axes.

    A derivative by one of them is then the device's own, and the cast adds it up over the devices, once.
    """

    def cast(array: Array) -> Array:
        missing = tuple(sorted(set(axes) - varying(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(cast, tree)


def over_axes(total: _Tree, axes: tuple[str, ...]) -> _Tree:
    """The sum over the devices along mesh axes; as it is where there are none."""
    return lax.psum(total, axes) if axes else total


def vary_rule(inputs: _Inputs) -> _Inputs:
    """Inputs of a rule, its `classes` among them, in the one type that its gradients have: each device's own."""
    return vary(inputs, varying(inputs) | {*inputs.classes.axes})
