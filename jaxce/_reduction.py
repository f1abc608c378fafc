"""From losses per row to the number that is trained on.

A mean over a batch that is split, over micro-batches, devices or hosts, is a ratio of two sums. `MeanParts` keeps them
apart, so that every split gives the loss of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxce._arguments import check_floating, check_reduction, check_weights_and_mask
from jaxce._checks import report_losses
from jaxce._conventions import accumulator, silence
from jaxce._eager import one_program
from jaxce._mesh import over_axes
from jaxce._split import aligned, check_rows_vary, find_row_split
from jaxce._types import (
    AxisName,
    ElementMask,
    Elements,
    HeldArray,
    PerRow,
    Reduction,
    ReductionOptions,
    RowAxisNames,
    ToArray,
    ToParts,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeanParts:
    """A weighted mean as its two sums, for batches that come in parts.

    Means of parts do not average to the mean of the whole when masks or weights differ; their sums do. Add the parts of
    micro-batches with `+` (or `sum`), of devices with `psum`, and divide once, at the end, with `mean`. Gradients
    accumulate in the same way: add up those of `total`, and divide with `MeanParts(gradient, weight).mean()`.
    To a type checker `sum(parts)` may be 0, that of no parts; `sum(others, first)` is a `MeanParts`.

    Attributes:
        total: Σ w l, the weighted losses. Scalar, float32 or float64.
        weight: Σ w, the weights. Scalar, of the same dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> first = jaxce.MeanParts(total=jnp.float32(6.0), weight=jnp.float32(2.0))
        >>> second = jaxce.MeanParts(total=jnp.float32(0.0), weight=jnp.float32(1.0))
        >>> print((first + second).mean())
        2.0
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: MeanParts) -> MeanParts:
        if not isinstance(other, MeanParts):
            return NotImplemented
        return MeanParts(self.total + other.total, self.weight + other.weight)

    def __radd__(self, other: int) -> MeanParts:
        """Lets `sum(parts)` start from its 0."""
        return self if other == 0 else NotImplemented

    def psum(self, axis_name: AxisName) -> MeanParts:
        """Adds the parts of all devices along a mapped axis, or axes, of `shard_map`, `pmap` or `vmap`."""
        return jax.lax.psum(self, axis_name)

    def mean(self) -> Float[Array, ""]:
        """Total / weight; 0, with zero gradient, where both are 0 because nothing counted."""
        empty = (self.weight == 0) & (self.total == 0)
        mean = self.total / jnp.where(empty, jnp.ones_like(self.weight), self.weight)
        return jnp.where(empty, jnp.zeros_like(mean), mean)


@overload
def reduce_losses(
    losses: Elements, weights: Elements | None = ..., *, reduction: ToArray = ..., **options: Unpack[ReductionOptions]
) -> Array: ...
@overload
def reduce_losses(
    losses: Elements, weights: Elements | None = ..., *, reduction: ToParts, **options: Unpack[ReductionOptions]
) -> MeanParts: ...
@one_program
def reduce_losses(
    losses: Elements,
    weights: Elements | None = None,
    *,
    where: ElementMask | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Reduces losses of any shape as every loss of this library does.

    For a loss of your own that should treat weights, masks and empty batches like the others. The losses here call it
    for you: use their `reduction`.

    With w the weights, 0 where `where` is false, "none" is w l, "sum" is Σ w l, "parts" is `MeanParts(Σ w l, Σ w)`, and
    "mean" is::

        Σ w l / Σ w

    Args:
        losses: any shape, floating. bfloat16 and float16 are summed in float32.
        weights: the shape of `losses`, real; None is 1 everywhere. A weight of 0 multiplies: 0 · NaN is NaN.
        where: the shape of `losses`, boolean. Where it is false the loss counts as 0 and neither it nor its weight is
            read.
        batch_axis_name: mesh axes that split the losses, as in `cross_entropy`. Outside `shard_map` it changes nothing.
        reduction: "none", "sum", "mean" or "parts".

    Returns:
        float32 (float64 for float64 inputs): the shape of `losses` for "none", a scalar for "sum" and "mean", a
        `MeanParts` for "parts". The mean of nothing (an empty batch, all masked, all weights 0) is 0 with zero
        gradient.

    Raises:
        TypeError: `losses` are not floating, `where` is not boolean.
        ValueError: a shape differs from that of `losses`, `reduction` is none of the four, or there is no axis
            `batch_axis_name`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> losses = jnp.array([1.0, 2.0, jnp.nan])
        >>> print(jaxce.reduce_losses(losses, where=jnp.array([True, True, False])))
        1.5
    """
    values = check_floating("losses", losses)
    weights, where = check_weights_and_mask(weights, where, values.shape)
    check_reduction(reduction)
    split = find_row_split(values, batch_axis_name)
    check_rows_vary(split, values, weights, where)
    return _reduce_losses(values, weights, where, axes=split.row_axes, reduction=reduction)


@partial(jax.jit, static_argnames=("axes", "reduction"), inline=True)
def _reduce_losses(
    losses: HeldArray,
    weights: HeldArray | None,
    where: HeldArray | None,
    *,
    axes: tuple[str, ...],
    reduction: Reduction,
) -> Array | MeanParts:
    report_losses(losses, weights, where)
    losses, weights, where = aligned((losses, weights, where))
    dtype = accumulator(losses, weights)
    factors = None if weights is None else silence(where, weights.astype(dtype))
    return reduce_rows(silence(where, losses.astype(dtype)), where, factors, axes=axes, reduction=reduction)


@overload
def reduce_rows(
    losses: PerRow,
    counts: HeldArray | None,
    weights: PerRow | None = ...,
    shares: PerRow | None = ...,
    *,
    axes: tuple[str, ...] = ...,
    reduction: ToArray | Literal["ratio"],
) -> Array: ...
@overload
def reduce_rows(
    losses: PerRow,
    counts: HeldArray | None,
    weights: PerRow | None = ...,
    shares: PerRow | None = ...,
    *,
    axes: tuple[str, ...] = ...,
    reduction: str,
) -> Array | MeanParts: ...
def reduce_rows(
    losses: PerRow,
    counts: HeldArray | None,
    weights: PerRow | None = None,
    shares: PerRow | None = None,
    *,
    axes: tuple[str, ...] = (),
    reduction: str,
) -> Array | MeanParts:
    """Weighs and reduces losses that are already silent where they do not count.

    `weights` are a factor of the loss and of its share in the divisor of the mean; `shares` of the share alone, for
    losses that have the factor inside already (class weights). `axes` are mesh axes that split the rows. `reduction` is
    one of the public four, or "ratio": the mean that is NaN over nothing, as PyTorch has it.
    """
    losses = losses if weights is None else losses * weights
    if reduction == "none":
        return losses
    weight = total_weight(losses.size, losses.dtype, counts, weights, shares)
    parts = over_axes(MeanParts(jnp.sum(losses), weight), axes)
    if reduction == "sum":
        return parts.total
    if reduction == "ratio":
        return parts.total / parts.weight
    return parts if reduction == "parts" else parts.mean()


def total_weight(
    size: int, dtype: DTypeLike, counts: HeldArray | None, weights: PerRow | None, shares: HeldArray | None
) -> Float[Array, ""]:
    """The divisor of the mean over `size` losses; the arrays as in `reduce_rows`."""
    if weights is not None and shares is not None:
        shares = weights * shares
    elif shares is None:
        shares = weights if weights is not None else counts
    return jnp.asarray(size, dtype) if shares is None else jnp.sum(shares, dtype=dtype)
