"""The losses that are arithmetic on a row's summary: cross entropy, focal, poly; a formula each.

Their derivatives are plain autodiff above the rule of `_summary`.
"""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex, Unpack, overload

import jax.numpy as jnp
from jaxtyping import Array

from jaxce._arguments import check_reduction, check_scalar, present
from jaxce._eager import one_program
from jaxce._formula import reduce_formula
from jaxce._inputs import OnMesh, check_classes
from jaxce._logits import LinearLogits
from jaxce._reduction import MeanParts
from jaxce._rows import Rows
from jaxce._summary import summarize_rows
from jaxce._targets import Targets
from jaxce._types import (
    AxisName,
    ClassOptions,
    ClassVector,
    HeldArray,
    Labels,
    Logits,
    PerRow,
    Reduction,
    RowAxisNames,
    RowMask,
    RowWeights,
    Scalar,
    ToArray,
    ToParts,
)


@overload
def cross_entropy(
    logits: Logits | LinearLogits,
    targets: Targets,
    *,
    label_smoothing: Scalar = ...,
    z_loss: Scalar = ...,
    reduction: ToArray = ...,
    **options: Unpack[ClassOptions],
) -> Array: ...
@overload
def cross_entropy(
    logits: Logits | LinearLogits,
    targets: Targets,
    *,
    label_smoothing: Scalar = ...,
    z_loss: Scalar = ...,
    reduction: ToParts,
    **options: Unpack[ClassOptions],
) -> MeanParts: ...
@one_program
def cross_entropy(
    logits: Logits | LinearLogits,
    targets: Targets,
    *,
    axis: SupportsIndex = -1,
    weights: RowWeights | None = None,
    class_weights: ClassVector | None = None,
    where: RowMask | None = None,
    ignore_index: SupportsIndex | None = None,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Cross entropy between logits and class indices or distributions.

    The loss of classification, segmentation and language models. For independent yes/no outputs use
    `binary_cross_entropy`, for log-probabilities `nll_loss`.

    With p = softmax(z), label y, class weights w (1 without), smoothing ε over C classes and z-loss λ, the loss of a
    row is::

        l = (1−ε) w_y (−log p_y) + (ε/C) Σ_c w_c (−log p_c) + λ w_y log² Σ_c exp z_c

    and with a distribution q::

        l = Σ_c w_c ((1−ε) q_c + ε/C) (−log p_c) + λ log² Σ_c exp z_c

    The mean over rows of weight v is Σ v l / Σ v w_y for labels and Σ v l / Σ v for distributions, whose class weights
    are inside l, as in PyTorch.

    Args:
        logits: (..., C), or the classes along `axis`. Any floating dtype; the arithmetic is at least float32. Or
            `LinearLogits`, which are never stored.
        targets: labels in [0, C), any integer dtype, the shape of `logits` without the class axis; or distributions, a
            floating dtype, the shape of `logits`. They need not sum to 1. The dtype decides. Or `SparseTargets`, which
            list a few classes of every row, and stand for a distribution.
        axis: the class axis of `logits` and of distributions. `LinearLogits` have theirs last.
        weights: weights of the rows, the shape of the losses. 0 multiplies: 0 · NaN is NaN.
        class_weights: (C,), real.
        where: boolean, the shape of the losses. A row where it is false counts as nothing and is not read: it may hold
            NaN.
        ignore_index: label of rows that do not count, inside [0, C) or out; labels only. The same as
            `where=targets != ignore_index`.
        label_smoothing: ε in [0, 1]. The share of the target that is spread evenly over all C classes.
        z_loss: λ ≥ 0. Holds the softmax's denominator near 1; 1e-4 is common for language models.
        num_classes: how many classes there are, by default all in the arrays. If fewer, those from `num_classes` on are
            padding, and are not read.
        class_axis_name: mesh axis, or axes in the order of their spec, over which the classes are split. Inside
            `shard_map`, whatever has classes is the device's slice, and labels stay numbers of all classes. Outside,
            arrays are whole, on the mesh of `jax.set_mesh`; on an Explicit mesh their types say how they are split, and
            no name is needed.
        batch_axis_name: mesh axis, or axes, over which the rows are split; outside `shard_map` a `PartitionSpec` if
            they split several axes of rows. The sum, the mean and the parts are then those of all rows.
        reduction: "mean", "sum", "none" (the losses, times `weights`) or "parts" (a `MeanParts`, for batches that are
            split).

    Returns:
        float32 (float64 for float64 inputs): a scalar, the shape of the losses for "none", or a `MeanParts`. The mean
        of nothing is 0 with zero gradient. A label outside [0, C) makes its loss and its gradient row NaN, and no
        other.

    Raises:
        TypeError: `targets` or `where` have a dtype that contradicts their meaning, or an argument is no array.
        ValueError: a shape, `axis`, `label_smoothing`, `z_loss`, `reduction` or a NumPy label is wrong, or
            `ignore_index` comes with distributions.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> logits = jnp.array([[-1.0, -3.0, 4.0], [-3.0, 3.0, -1.0]])
        >>> print(f"{jaxce.cross_entropy(logits, jnp.array([0, 1])):.4f}")
        2.5141
        >>> print(f"{jaxce.cross_entropy(logits, jnp.array([0, -100]), ignore_index=-100):.4f}")
        5.0076

    References:
        - Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015 (label smoothing).
        - Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022 (z-loss).
    """
    inputs = check_classes(
        logits,
        targets,
        axis=axis,
        weights=weights,
        class_weights=class_weights,
        where=where,
        ignore_index=ignore_index,
        on_mesh=OnMesh(num_classes, class_axis_name, batch_axis_name),
        may_be_lazy=True,
    )
    label_smoothing = check_scalar("label_smoothing", label_smoothing, low=0, high=1)
    z_loss = check_scalar("z_loss", z_loss, low=0)
    check_reduction(reduction)
    return reduce_formula(CrossEntropy(present(label_smoothing), present(z_loss)), inputs, reduction=reduction)


class CrossEntropy(NamedTuple):
    """Cross entropy per row, before the weights of rows; a setting that is None is a term that is not there."""

    label_smoothing: HeldArray | None = None
    z_loss: HeldArray | None = None

    def __call__(self, rows: Rows) -> PerRow:
        dtype = rows.dtype
        num_classes = rows.classes.number
        label_weights = rows.label_weights
        class_weights = rows.class_weights
        if self.label_smoothing is not None and class_weights is None:
            class_vector = jnp.ones(rows.logits.shape[-1], dtype)
        else:
            class_vector = None if self.label_smoothing is None else class_weights
        target_weights = None if rows.has_labels else class_weights
        summary = summarize_rows(rows, class_vector=class_vector, target_weights=target_weights)
        losses = _weigh(label_weights, summary.nll)
        if self.label_smoothing is not None and summary.spread is not None:
            epsilon = jnp.asarray(self.label_smoothing, dtype)
            losses = (1 - epsilon) * losses + epsilon / num_classes * summary.spread
        if self.z_loss is not None:
            losses += jnp.asarray(self.z_loss, dtype) * _weigh(label_weights, jnp.square(summary.log_z))
        return losses


@overload
def focal_loss(
    logits: Logits | LinearLogits,
    targets: Labels,
    *,
    gamma: Scalar = ...,
    reduction: ToArray = ...,
    **options: Unpack[ClassOptions],
) -> Array: ...
@overload
def focal_loss(
    logits: Logits | LinearLogits,
    targets: Labels,
    *,
    gamma: Scalar = ...,
    reduction: ToParts,
    **options: Unpack[ClassOptions],
) -> MeanParts: ...
@one_program
def focal_loss(
    logits: Logits | LinearLogits,
    targets: Labels,
    *,
    gamma: Scalar = 2.0,
    axis: SupportsIndex = -1,
    weights: RowWeights | None = None,
    class_weights: ClassVector | None = None,
    where: RowMask | None = None,
    ignore_index: SupportsIndex | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Focal loss over classes: cross entropy that turns away from rows that are right already.

    For many easy rows and few hard ones. For independent yes/no outputs, as in the paper's detector, use
    `binary_focal_loss`.

    With p_y the softmax probability of the label, the loss of a row is::

        l = w_y (1 − p_y)^γ (−log p_y)

    γ = 0 is cross entropy.

    Args:
        logits: (..., C), or the classes along `axis`, any floating dtype; or `LinearLogits`.
        targets: labels in [0, C), any integer dtype, the shape of `logits` without the class axis.
        gamma: γ ≥ 0, scalar.
        axis: the class axis of `logits`.
        weights: weights of the rows, the shape of the losses.
        class_weights: (C,), real; as in `cross_entropy` they weigh the loss and the mean's divisor.
        where: boolean, the shape of the losses; rows where it is false are not read.
        ignore_index: label of rows that do not count.
        num_classes: how many classes are no padding, as in `cross_entropy`.
        class_axis_name: mesh axes that split the classes, as in `cross_entropy`.
        batch_axis_name: mesh axes that split the rows, as in `cross_entropy`.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs), as `cross_entropy`. All derivatives are finite at any confidence and any
        γ.

    Raises:
        TypeError: `targets` are distributions, or a dtype is wrong.
        ValueError: a shape, `axis`, `gamma`, `reduction` or a NumPy label is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(f"{jaxce.focal_loss(jnp.array([[2.0, 0.0]]), jnp.array([0])):.6f}")
        0.001804

    References:
        Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    inputs = check_classes(
        logits,
        targets,
        axis=axis,
        weights=weights,
        class_weights=class_weights,
        where=where,
        ignore_index=ignore_index,
        on_mesh=OnMesh(num_classes, class_axis_name, batch_axis_name),
        labels_only="focal_loss",
        may_be_lazy=True,
    )
    gamma = check_scalar("gamma", gamma, low=0)
    check_reduction(reduction)
    return reduce_formula(Focal(gamma), inputs, reduction=reduction)


class Focal(NamedTuple):
    """Focal loss per row, before the weights of rows."""

    gamma: HeldArray

    def __call__(self, rows: Rows) -> PerRow:
        return _weigh(rows.label_weights, _focal(summarize_rows(rows).nll, jnp.asarray(self.gamma, rows.dtype)))


def _focal(nll: PerRow, gamma) -> PerRow:
    """(1 − p)^γ nll with p = exp(−nll), whose derivatives stay finite where nll is small, zero or infinite.

    As it stands, the second derivative meets nll^(γ−2), which overflows for a confident row. Near zero it is therefore
    written nll^(1+γ) φ^γ with φ = (1 − exp(−nll)) / nll = 1 − nll/2 (1 − nll/3 (1 − …)), smooth at 0.
    """
    near = nll < 0.25
    is_near = near & (nll > 0)
    small = jnp.where(is_near, nll, 0.25)
    ratio = jnp.ones_like(small)
    for order in range(13, 1, -1):
        ratio = 1 - small / order * ratio
    near_loss = jnp.where(is_near, jnp.power(small, 1 + gamma) * jnp.power(ratio, gamma), 0)
    large = jnp.where(near, 0.25, nll)
    miss = -jnp.expm1(-jnp.where(large < 100, large, 100))  # 1 − p; of an infinite nll no derivative
    return jnp.where(near, near_loss, jnp.power(miss, gamma) * large)


@overload
def poly_loss(
    logits: Logits | LinearLogits,
    targets: Labels,
    *,
    epsilon: Scalar = ...,
    reduction: ToArray = ...,
    **options: Unpack[ClassOptions],
) -> Array: ...
@overload
def poly_loss(
    logits: Logits | LinearLogits,
    targets: Labels,
    *,
    epsilon: Scalar = ...,
    reduction: ToParts,
    **options: Unpack[ClassOptions],
) -> MeanParts: ...
@one_program
def poly_loss(
    logits: Logits | LinearLogits,
    targets: Labels,
    *,
    epsilon: Scalar = 1.0,
    axis: SupportsIndex = -1,
    weights: RowWeights | None = None,
    class_weights: ClassVector | None = None,
    where: RowMask | None = None,
    ignore_index: SupportsIndex | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Poly-1 loss: cross entropy with its leading term in 1 − p changed by ε.

    Where focal loss takes weight off confident rows, a positive ε adds to it. Tune ε; 0 is cross entropy.

    With p_y the softmax probability of the label, the loss of a row is::

        l = w_y (−log p_y + ε (1 − p_y))

    Args:
        logits: (..., C), or the classes along `axis`, any floating dtype; or `LinearLogits`.
        targets: labels in [0, C), any integer dtype, the shape of `logits` without the class axis.
        epsilon: ε, scalar.
        axis: the class axis of `logits`.
        weights: weights of the rows, the shape of the losses.
        class_weights: (C,), real; as in `cross_entropy` they weigh the loss and the mean's divisor.
        where: boolean, the shape of the losses; rows where it is false are not read.
        ignore_index: label of rows that do not count.
        num_classes: how many classes are no padding, as in `cross_entropy`.
        class_axis_name: mesh axes that split the classes, as in `cross_entropy`.
        batch_axis_name: mesh axes that split the rows, as in `cross_entropy`.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs), as `cross_entropy`.

    Raises:
        TypeError: `targets` are distributions, or a dtype is wrong.
        ValueError: a shape, `axis`, `epsilon`, `reduction` or a NumPy label is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(f"{jaxce.poly_loss(jnp.array([[2.0, 0.0]]), jnp.array([0])):.4f}")
        0.2461

    References:
        Leng et al., PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions, 2022.
    """
    inputs = check_classes(
        logits,
        targets,
        axis=axis,
        weights=weights,
        class_weights=class_weights,
        where=where,
        ignore_index=ignore_index,
        on_mesh=OnMesh(num_classes, class_axis_name, batch_axis_name),
        labels_only="poly_loss",
        may_be_lazy=True,
    )
    epsilon = check_scalar("epsilon", epsilon)
    check_reduction(reduction)
    return reduce_formula(Poly(epsilon), inputs, reduction=reduction)


class Poly(NamedTuple):
    """Poly-1 loss per row, before the weights of rows."""

    epsilon: HeldArray

    def __call__(self, rows: Rows) -> PerRow:
        nll = summarize_rows(rows).nll
        return _weigh(rows.label_weights, nll - jnp.asarray(self.epsilon, rows.dtype) * jnp.expm1(-nll))


def _weigh(label_weights: PerRow | None, losses: PerRow) -> PerRow:
    return losses if label_weights is None else label_weights * losses
