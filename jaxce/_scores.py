"""Losses over classes that take scores as they are, with no softmax: log-probabilities and margins."""

from __future__ import annotations

from functools import partial
from typing import SupportsIndex, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxce._arguments import check_power, check_reduction, check_scalar
from jaxce._conventions import loud, silence
from jaxce._eager import one_program
from jaxce._inputs import check_classes
from jaxce._reduction import MeanParts, reduce_rows
from jaxce._rows import at_label, on_slices, read_classes
from jaxce._types import (
    ClassVector,
    Labels,
    Logits,
    Reduction,
    RowMask,
    RowOptions,
    RowWeights,
    Scalar,
    ScoreOptions,
    ToArray,
    ToParts,
)


@overload
def nll_loss(
    log_probs: Logits, targets: Labels, *, reduction: ToArray = ..., **options: Unpack[ScoreOptions]
) -> Array: ...
@overload
def nll_loss(
    log_probs: Logits, targets: Labels, *, reduction: ToParts, **options: Unpack[ScoreOptions]
) -> MeanParts: ...
@one_program
def nll_loss(
    log_probs: Logits,
    targets: Labels,
    *,
    axis: SupportsIndex = -1,
    weights: RowWeights | None = None,
    class_weights: ClassVector | None = None,
    where: RowMask | None = None,
    ignore_index: SupportsIndex | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Negative log-likelihood of labels under given log-probabilities.

    For models that end in a log-softmax, or whose probabilities come from elsewhere. From logits call `cross_entropy`:
    it is more accurate and needs less memory.

    The loss of a row is::

        l = −w_y · log_probs[y]

    The mean is Σ v l / Σ v w_y for rows of weight v.

    Args:
        log_probs: (..., C), or the classes along `axis`. Any floating dtype.
        targets: labels in [0, C), any integer dtype, the shape of `log_probs` without the class axis.
        axis: the class axis of `log_probs`.
        weights: weights of the rows, the shape of the losses.
        class_weights: (C,), real.
        where: boolean, the shape of the losses; rows where it is false are not read.
        ignore_index: label of rows that do not count.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs): a scalar, the shape of the losses for "none", or a `MeanParts`.

    Raises:
        TypeError: `targets` are distributions, or a dtype is wrong.
        ValueError: a shape, `axis`, `reduction` or a NumPy label is wrong.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> log_probs = jax.nn.log_softmax(jnp.array([[-1.0, -3.0, 4.0], [-3.0, 3.0, -1.0]]))
        >>> print(f"{jaxce.nll_loss(log_probs, jnp.array([0, 1])):.4f}")
        2.5141

    References:
        PyTorch's `torch.nn.NLLLoss` means the same.
    """
    inputs = check_classes(
        log_probs,
        targets,
        axis=axis,
        weights=weights,
        class_weights=class_weights,
        where=where,
        ignore_index=ignore_index,
        labels_only="nll_loss",
        name="log_probs",
    )
    check_reduction(reduction)
    return nll_loss_core(inputs, reduction=reduction)


@partial(jax.jit, static_argnames="reduction", inline=True)
def nll_loss_core(inputs, *, reduction):
    """The jitted half of `nll_loss`."""

    def reduce_slice(inputs, _):
        rows = read_classes(inputs)
        losses = loud(rows.valid, silence(rows.counts, -_at_label(rows)))
        if rows.label_weights is not None:
            losses *= rows.label_weights
        row_weights = rows.counts, rows.weights, rows.label_weights
        return reduce_rows(losses, *row_weights, axes=inputs.split.row_axes, reduction=reduction)

    return on_slices(reduce_slice, inputs, None, per_row=reduction == "none")


@overload
def multi_margin_loss(
    logits: Logits,
    targets: Labels,
    *,
    p: SupportsIndex = ...,
    margin: Scalar = ...,
    axis: SupportsIndex = ...,
    class_weights: ClassVector | None = ...,
    reduction: ToArray = ...,
    **options: Unpack[RowOptions],
) -> Array: ...
@overload
def multi_margin_loss(
    logits: Logits,
    targets: Labels,
    *,
    p: SupportsIndex = ...,
    margin: Scalar = ...,
    axis: SupportsIndex = ...,
    class_weights: ClassVector | None = ...,
    reduction: ToParts,
    **options: Unpack[RowOptions],
) -> MeanParts: ...
@one_program
def multi_margin_loss(
    logits: Logits,
    targets: Labels,
    *,
    p: SupportsIndex = 1,
    margin: Scalar = 1.0,
    axis: SupportsIndex = -1,
    class_weights: ClassVector | None = None,
    weights: RowWeights | None = None,
    where: RowMask | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Multi-class hinge loss: every other score should stay a margin below the label's.

    For support vector machines and rankings; it asks for a distance and not for probabilities, so a row with enough of
    it has no gradient at all. For probabilities use `cross_entropy`.

    The loss of a row is::

        l = (w_y / C) Σ_{i≠y} max(0, margin − z_y + z_i)^p

    Class weights do not enter the mean's divisor, as in PyTorch.

    Args:
        logits: scores, (..., C), or the classes along `axis`. Any floating dtype.
        targets: labels in [0, C), any integer dtype, the shape of `logits` without the class axis.
        p: 1 or 2, a Python int.
        margin: scalar.
        axis: the class axis of `logits`.
        class_weights: (C,), real.
        weights: weights of the rows, the shape of the losses.
        where: boolean, the shape of the losses; rows where it is false are not read.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs): a scalar, the shape of the losses for "none", or a `MeanParts`.

    Raises:
        TypeError: `targets` are distributions, or a dtype is wrong.
        ValueError: a shape, `p`, `margin`, `axis`, `reduction` or a NumPy label is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(f"{jaxce.multi_margin_loss(jnp.array([[0.1, 0.2, 0.4, 0.8]]), jnp.array([3])):.4f}")
        0.3250

    References:
        Crammer and Singer, On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines, 2001.
    """
    inputs = check_classes(
        logits,
        targets,
        axis=axis,
        weights=weights,
        class_weights=class_weights,
        where=where,
        labels_only="multi_margin_loss",
    )
    p = check_power(p)
    margin = check_scalar("margin", margin)
    check_reduction(reduction)
    return multi_margin_loss_core(inputs, margin, p=int(p), reduction=reduction)


@partial(jax.jit, static_argnames=("p", "reduction"), inline=True)
def multi_margin_loss_core(inputs, margin, *, p, reduction):
    """The jitted half of `multi_margin_loss`."""

    def reduce_slice(inputs, margin):
        rows = read_classes(inputs)
        counts, valid = (None if mask is None else mask[..., None] for mask in (rows.counts, rows.valid))
        # Wrong labels are loud on both sides of the hinge, which swallows a NaN in either direction.
        rows = rows._replace(logits=loud(valid, silence(counts, rows.logits.astype(rows.dtype))))
        shortfall = jax.nn.relu(margin.astype(rows.dtype) - _at_label(rows)[..., None] + rows.logits)
        size = rows.logits.shape[-1]
        local = rows.targets - rows.classes.start(size)
        classes = jnp.expand_dims(jnp.arange(size, dtype=local.dtype), range(local.ndim))
        is_other = classes != local[..., None]
        penalties = rows.classes.sum(jnp.sum(jnp.where(is_other, shortfall**p, 0), axis=-1))
        losses = loud(rows.valid, silence(rows.counts, penalties / rows.classes.number))
        if rows.label_weights is not None:
            losses *= rows.label_weights
        return reduce_rows(losses, rows.counts, rows.weights, axes=inputs.split.row_axes, reduction=reduction)

    return on_slices(reduce_slice, inputs, margin, per_row=reduction == "none")


def _at_label(rows):
    """The score of every row's label, in the dtype of the arithmetic."""
    return at_label(rows.logits, rows).astype(rows.dtype)
