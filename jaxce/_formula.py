"""The frame of every loss over classes: from checked inputs and the formula of a row to the number that is trained on.

A formula is a pytree of its settings that is called with `Rows` and returns their losses, before the rows' weights, or
these and a pytree of numbers beside them. It sees no reduction and no mesh, and does not know whether its logits are
held.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxce._forward_gradient import losses_of, total_loss
from jaxce._inputs import ClassInputs
from jaxce._logits import LinearLogits
from jaxce._mesh import over_axes
from jaxce._reduction import MeanParts, reduce_rows, total_weight
from jaxce._rows import Rows, on_slices, read_classes
from jaxce._types import MaskPerRow, PerRow

_Formula = Callable[[Rows], PerRow | tuple[PerRow, object]]
_F = TypeVar("_F", bound=_Formula)
_Reduced = Array | MeanParts


def evaluate(
    formula: _F, inputs: ClassInputs, reduction: str, *, close: Callable[[_F, Rows], _F | None] | None = None
) -> tuple[_Reduced, object]:
    """The reduced losses, and what the formula returns beside them, reduced alike.

    `close` makes of a formula one that closes over nothing that is traced, as gradients in the forward pass need it,
    or None.
    """

    def reduce_slice(inputs: ClassInputs, formula: _F) -> tuple[_Reduced, object]:
        rows, axes = read_classes(inputs), inputs.split.row_axes
        if not recomputes(inputs, reduction):
            closed = formula if close is None else close(formula, rows)
            if closed is not None:
                return _reduce_with_gradients(closed, rows, axes, reduction)

        def reduced(numbers: PerRow) -> _Reduced:
            result = reduce_rows(numbers, *_row_weights(rows), axes=axes, reduction=reduction)
            if isinstance(result, MeanParts) or reduction != "none" or result.shape == inputs.rows_shape:
                return result
            return jnp.reshape(result, inputs.rows_shape)

        losses, aux = losses_of(formula, rows)
        return reduced(losses), jax.tree.map(reduced, aux)

    return on_slices(reduce_slice, inputs, formula, per_row=reduction == "none")


@partial(jax.jit, static_argnames="reduction", inline=True)
def reduce_formula(formula, inputs, *, reduction):
    """The jitted half of the losses over classes: `formula` is that of a row, such as `CrossEntropy`."""
    return evaluate(formula, inputs, reduction)[0]


def _row_weights(rows: Rows) -> tuple[MaskPerRow | None, PerRow | None, PerRow | None]:
    return rows.counts, rows.weights, rows.label_weights


def recomputes(inputs: ClassInputs, reduction: str) -> bool:
    """Whether the backward pass works on the logits; if not, the forward pass makes the gradients.

    By the first lazy logits' word, and without one by the rule that `LinearLogits` states. Logits that are held are
    there for the backward pass, and losses of rows have no gradient that could be made before. Of a kernel whose
    features are split, blocks of rows would gather all.
    """
    all_lazy = [logits for logits in (inputs.logits, inputs.targets) if isinstance(logits, LinearLogits)]
    if not all_lazy or reduction == "none" or any(logits.feature_axis_name for logits in all_lazy):
        return True
    lazy = all_lazy[0]
    return lazy.kernel.dtype.itemsize < 4 if lazy.recompute is None else lazy.recompute


def _reduce_with_gradients(
    formula: _Formula, rows: Rows, axes: tuple[str, ...], reduction: str
) -> tuple[_Reduced, object]:
    """Reduces to scalars, of which the first has its gradients made in the forward pass."""
    weight = over_axes(total_weight(rows.logits.shape[0], rows.dtype, *_row_weights(rows)), axes)
    if reduction in ("mean", "ratio"):
        # Divided before the sum, not after: then the gradients need not be multiplied by anything afterwards.
        divisor = jnp.where(weight == 0, jnp.ones_like(weight), weight) if reduction == "mean" else weight
        weights = jnp.ones(rows.logits.shape[:1], rows.dtype) if rows.weights is None else rows.weights
        rows = rows._replace(weights=weights / divisor)

    def reduced(total: Float[Array, ""]) -> _Reduced:
        if reduction == "mean":
            undivided = MeanParts(jnp.where(weight == 0, total, jnp.zeros_like(total)), weight)
            return jnp.where(weight == 0, undivided.mean(), total)
        if reduction == "ratio":
            return total + 0 / weight  # NaN over nothing, where the sum of no rows is 0
        return MeanParts(total, weight) if reduction == "parts" else total

    total, aux = over_axes(total_loss(formula, rows), axes)
    return reduced(total), jax.tree.map(reduced, aux)
