"""Sums over some of a row's classes: the slices that blocks and devices make, and how they merge into the row."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxce._conventions import times
from jaxce._mesh import Classes

_Number = Float[Array, "*any"]


class Moment(NamedTuple):
    """How far a mass t over the classes is from the maximum, Σ t (m − z), and the mass itself, Σ t."""

    excess: _Number
    mass: _Number

    def distance(self, log_sum: _Number) -> _Number:
        """Σ t (log_z − z)."""
        return self.excess + self.mass * log_sum

    def shifted(self, by: _Number) -> "Moment":
        """The same mass, from a maximum that is larger."""
        return self._replace(excess=self.excess + times(self.mass, by))


class Slice(NamedTuple):
    """Sums over some of a row's classes, and the number they are measured from. Disjoint slices merge.

    `sum_less_1` is Σ exp(z − maximum) − 1: what is left of a confident row, and −1 of no classes at all.
    """

    maximum: _Number
    sum_less_1: _Number
    target: Moment
    vector: Moment | None


def empty(num_rows: int, dtype: np.dtype, *, has_vector: bool = False) -> Slice:
    """The slices of rows that hold no classes."""
    zeros = jnp.zeros(num_rows, dtype)
    moment = Moment(zeros, zeros)
    return Slice(zeros + jnp.finfo(dtype).min, zeros - 1, moment, moment if has_vector else None)


def merge(left: Slice, right: Slice) -> Slice:
    """The slice of two disjoint sets of one row's classes; as exact as the slices, also where one class dominates."""
    maximum = jnp.maximum(left.maximum, right.maximum)
    is_left = left.maximum >= right.maximum
    top = jnp.where(is_left, left.sum_less_1, right.sum_less_1)
    rest = jnp.where(is_left, right.sum_less_1, left.sum_less_1) + 1
    gap = maximum - jnp.where(is_left, right.maximum, left.maximum)
    sum_less_1 = top + rest * jnp.exp(-gap)

    def moment(left_moment: Moment, right_moment: Moment) -> Moment:
        shifted = left_moment.shifted(maximum - left.maximum), right_moment.shifted(maximum - right.maximum)
        return Moment(shifted[0].excess + shifted[1].excess, left_moment.mass + right_moment.mass)

    vector = None if left.vector is None or right.vector is None else moment(left.vector, right.vector)
    return Slice(maximum, sum_less_1, moment(left.target, right.target), vector)


def merge_devices(part: Slice, classes: Classes) -> Slice:
    """The slice of all classes from those of the devices: one maximum and one sum of a few numbers per row.

    The device that holds the row's maximum keeps its `sum_less_1` as it is, so that this is as exact as `merge`.
    """
    if not classes.axes:
        return part
    maximum = lax.pmax(part.maximum, classes.axes)
    gap = maximum - part.maximum
    is_top = gap == 0
    others = jnp.where(is_top, part.sum_less_1, (part.sum_less_1 + 1) * jnp.exp(-gap))
    moments = part.target.shifted(gap), None if part.vector is None else part.vector.shifted(gap)
    others, tops, (target, vector) = classes.sum((others, is_top.astype(gap.dtype), moments))
    return Slice(maximum, others + (tops - 1), target, vector)


def softmax(logits: Array, classes: Classes) -> Array:
    """The softmax over all classes, at the slice at hand."""
    e = jnp.exp(logits - classes.largest(jnp.max(logits, -1, keepdims=True)))
    return e / classes.sum(jnp.sum(e, -1, keepdims=True))
