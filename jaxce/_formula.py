"""The frame of every loss over classes: from checked inputs and the formula of a row to the number that is trained on.

A formula is a pytree of its settings that is called with `Rows` and returns their losses, before the rows' weights. It
sees no reduction and no mesh, and does not know whether its logits are held.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxce._forward_gradient import total_loss
from jaxce._inputs import ClassInputs
from jaxce._logits import LinearLogits
from jaxce._mesh import over_axes
from jaxce._reduction import MeanParts, reduce_rows, total_weight
from jaxce._rows import Rows, on_slices, read_classes
from jaxce._types import MaskPerRow, PerRow


@partial(jax.jit, static_argnames="reduction", inline=True)
def reduce_formula(formula, inputs, *, reduction):
    """The jitted half of the losses over classes: `formula` is that of a row, such as `CrossEntropy`."""

    def reduce_slice(inputs, formula):
        rows, axes = read_classes(inputs), inputs.split.row_axes
        if reduction != "none" and not _recomputes(inputs):
            return _reduce_with_gradients(formula, rows, axes, reduction)
        reduced = reduce_rows(formula(rows), *_row_weights(rows), axes=axes, reduction=reduction)
        shape = inputs.rows_shape
        return jnp.reshape(reduced, shape) if reduction == "none" and reduced.shape != shape else reduced

    return on_slices(reduce_slice, inputs, formula, per_row=reduction == "none")


def _row_weights(rows: Rows) -> tuple[MaskPerRow | None, PerRow | None, PerRow | None]:
    return rows.counts, rows.weights, rows.label_weights


def _recomputes(inputs: ClassInputs) -> bool:
    """Whether the backward pass works on the logits; if not, the forward pass makes the gradients.

    By the first lazy logits' word, and without one by the rule that `LinearLogits` states. Logits that are held are
    there for the backward pass.
    """
    lazy = next((logits for logits in (inputs.logits, inputs.targets) if isinstance(logits, LinearLogits)), None)
    if lazy is None:
        return True
    return lazy.kernel.dtype.itemsize < 4 if lazy.recompute is None else lazy.recompute


def _reduce_with_gradients(
    formula: Callable[[Rows], PerRow], rows: Rows, axes: tuple[str, ...], reduction: str
) -> Array | MeanParts:
    """Reduces to a scalar whose gradients are made in the forward pass."""
    weight = over_axes(total_weight(rows.logits.shape[0], rows.dtype, *_row_weights(rows)), axes)
    if reduction in ("mean", "ratio"):
        # Divided before the sum, not after: then the gradients need not be multiplied by anything afterwards.
        divisor = jnp.where(weight == 0, jnp.ones_like(weight), weight) if reduction == "mean" else weight
        weights = jnp.ones(rows.logits.shape[:1], rows.dtype) if rows.weights is None else rows.weights
        rows = rows._replace(weights=weights / divisor)
    total = over_axes(total_loss(formula, rows), axes)
    if reduction == "mean":
        undivided = MeanParts(jnp.where(weight == 0, total, jnp.zeros_like(total)), weight)
        return jnp.where(weight == 0, undivided.mean(), total)
    if reduction == "ratio":
        return total + 0 / weight  # NaN over nothing, where the sum of no rows is 0
    return MeanParts(total, weight) if reduction == "parts" else total
