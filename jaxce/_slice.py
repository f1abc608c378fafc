"""Sums over some of a row's classes: the slices that blocks and devices make, and how they merge into the row."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer

from jaxce._conventions import times
from jaxce._mesh import Classes

_Number = Float[Array, "*any"]
_ClassNumber = Integer[Array, "*any"]
_NO_CLASS = np.iinfo(np.int32).max


@jax.tree_util.register_static
@dataclass(frozen=True)
class Asked:
    """What a row is asked for beside the sums that every loss needs."""

    entropy: bool = False
    argmax: bool = False


NOTHING = Asked()


class Moment(NamedTuple):
    """How far a mass t over the classes is from the maximum, Σ t (m − z), and the mass itself, Σ t.

    Of a target that lists its classes there is one for each of them, of mass 1 where the class is.
    """

    excess: _Number
    mass: _Number

    def distance(self, log_sum: _Number) -> _Number:
        """Σ t (log_z − z)."""
        return self.excess + self.mass * self._along(log_sum)

    def shifted(self, by: _Number) -> "Moment":
        """The same mass, from a maximum that is larger."""
        return self._replace(excess=self.excess + times(self.mass, self._along(by)))

    def _along(self, number: _Number) -> _Number:
        """A number of every row, for each of the masses where a row has several."""
        return jnp.expand_dims(number, range(number.ndim, self.mass.ndim))


class Slice(NamedTuple):
    """Sums over some of a row's classes, and the number they are measured from. Disjoint slices merge.

    Attributes:
        sum_less_1: Σ exp(z − maximum) − 1: what is left of a confident row, and −1 of no classes at all.
        depth: Σ exp(z − maximum) (maximum − z), of terms that are not negative; None where it is not asked for.
        argmax: the smallest class of the largest logit, a number that no class has where all are −inf; or None.
    """

    maximum: _Number
    sum_less_1: _Number
    target: Moment
    vector: Moment | None
    depth: _Number | None = None
    argmax: _ClassNumber | None = None

    def depth_below(self, gap: _Number) -> _Number | None:
        """The depth from a maximum that is larger by a gap."""
        if self.depth is None:
            return None
        return times(jnp.exp(-gap), self.depth + times(self.sum_less_1 + 1, gap))

    def numbered_from(self, start: Array | int) -> "Slice":
        """The slice whose first class is number `start`, of one whose first class is 0."""
        if self.argmax is None:
            return self
        is_any = self.sum_less_1 != -1
        return self._replace(argmax=jnp.where(is_any, self.argmax + start, _NO_CLASS))


def empty(
    num_rows: int,
    dtype: np.dtype,
    *,
    listed: tuple[int, ...] = (),
    has_vector: bool = False,
    asked: Asked = NOTHING,
) -> Slice:
    """The slices of rows that hold no classes; `listed` is (K,) where targets list K classes."""
    zeros = jnp.zeros(num_rows, dtype)
    moment, of_listed = Moment(zeros, zeros), jnp.zeros((num_rows, *listed), dtype)
    return Slice(
        zeros + jnp.finfo(dtype).min,
        zeros - 1,
        Moment(of_listed, of_listed) if listed else moment,
        moment if has_vector else None,
        zeros if asked.entropy else None,
        jnp.full(num_rows, _NO_CLASS, jnp.int32) if asked.argmax else None,
    )


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
    depths = left.depth_below(maximum - left.maximum), right.depth_below(maximum - right.maximum)
    depth = None if depths[0] is None or depths[1] is None else depths[0] + depths[1]
    return Slice(maximum, sum_less_1, moment(left.target, right.target), vector, depth, _merge_argmax(left, right))


def _merge_argmax(left: Slice, right: Slice) -> _ClassNumber | None:
    """The smallest class of the largest logit, and of NaN where there is one."""
    if left.argmax is None or right.argmax is None:
        return None
    is_nan, is_other_nan = jnp.isnan(left.maximum), jnp.isnan(right.maximum)
    is_ahead = (left.maximum > right.maximum) | (is_nan & ~is_other_nan)
    is_tied = (left.maximum == right.maximum) | (is_nan & is_other_nan)
    return jnp.where(is_ahead | (is_tied & (left.argmax < right.argmax)), left.argmax, right.argmax)


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
    others, tops, (target, vector), depth = classes.sum(
        (others, is_top.astype(gap.dtype), moments, part.depth_below(gap))
    )
    argmax = _argmax_of_devices(part, maximum, classes)
    return Slice(maximum, others + (tops - 1), target, vector, depth, argmax)


def _argmax_of_devices(part: Slice, maximum: _Number, classes: Classes) -> _ClassNumber | None:
    """As `merge` has it, by one minimum: the classes of NaN are put before all others."""
    if part.argmax is None:
        return None
    first = np.int32(np.iinfo(np.int32).min)
    candidate = jnp.where(part.maximum == maximum, part.argmax, _NO_CLASS)
    candidate = jnp.where(jnp.isnan(part.maximum), part.argmax + first, candidate)
    chosen = lax.pmin(candidate, classes.axes)
    return jnp.where(chosen < 0, chosen - first, chosen)


def argmax_of(row: Slice) -> _ClassNumber | None:
    """The argmax, once the slice is over all of the row's classes: if all are −inf it is the first."""
    return None if row.argmax is None else jnp.where(row.argmax == _NO_CLASS, 0, row.argmax)


def softmax(logits: Array, classes: Classes) -> Array:
    """The softmax over all classes, at the slice at hand."""
    e = jnp.exp(logits - classes.largest(jnp.max(logits, -1, keepdims=True)))
    return e / classes.sum(jnp.sum(e, -1, keepdims=True))
