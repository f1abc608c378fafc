"""Cross entropy of hidden · kernel by its own name, for who looks for it."""

from __future__ import annotations

from typing import Any, SupportsIndex, Unpack, overload

from jaxtyping import Array

from jaxce._logits import LinearLogits
from jaxce._losses import cross_entropy
from jaxce._reduction import MeanParts
from jaxce._targets import Targets
from jaxce._types import (
    AxisName,
    ClassVector,
    Hidden,
    Kernel,
    LinearOptions,
    Reduction,
    RowAxisNames,
    RowMask,
    RowWeights,
    Scalar,
    ToArray,
    ToParts,
)


@overload
def linear_cross_entropy(
    hidden: Hidden,
    kernel: Kernel,
    targets: Targets,
    *,
    label_smoothing: Scalar = ...,
    z_loss: Scalar = ...,
    reduction: ToArray = ...,
    **options: Unpack[LinearOptions],
) -> Array: ...
@overload
def linear_cross_entropy(
    hidden: Hidden,
    kernel: Kernel,
    targets: Targets,
    *,
    label_smoothing: Scalar = ...,
    z_loss: Scalar = ...,
    reduction: ToParts,
    **options: Unpack[LinearOptions],
) -> MeanParts: ...
def linear_cross_entropy(
    hidden: Hidden,
    kernel: Kernel,
    targets: Targets,
    *,
    bias: ClassVector | None = None,
    softcap: Scalar | None = None,
    temperature: Scalar | None = None,
    weights: RowWeights | None = None,
    class_weights: ClassVector | None = None,
    where: RowMask | None = None,
    ignore_index: SupportsIndex | None = None,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    feature_axis_name: AxisName | None = None,
    block_bytes: SupportsIndex | None = None,
    recompute: bool | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Cross entropy of the logits hidden · kernel, which are never stored.

    Short for `cross_entropy` of `LinearLogits`, which the other losses over classes take as well.

    Args:
        hidden: (..., D), any floating dtype, as in `LinearLogits`.
        kernel: (D, V), any floating dtype, as in `flax`'s Dense; of tied embeddings (V, D) pass `embedding.T`.
        targets: labels in [0, V), any integer dtype, shape (...); or distributions (..., V), floating; or
            `SparseTargets`.
        bias: (V,), floating.
        softcap: s > 0, scalar: the logits are s · tanh((hidden · kernel + bias) / s).
        temperature: T in [1e-9, 1e9], scalar or of the losses' shape, by which they are divided.
        weights: weights of the rows, the shape of the losses (...).
        class_weights: (V,), real; as in `cross_entropy`.
        where: boolean, the shape of the losses. A row where it is false counts as nothing and is not read.
        ignore_index: label of rows that do not count; labels only.
        label_smoothing: ε in [0, 1].
        z_loss: λ ≥ 0.
        feature_axis_name: mesh axes that split the features of `kernel`, as in `LinearLogits`.
        block_bytes: what one block of logits may take in float32, as in `LinearLogits`.
        recompute: whether the backward pass makes the logits again, as in `LinearLogits`.
        num_classes: how many classes there are in all, as in `cross_entropy`. Padding of `kernel` and `bias` must be
            finite.
        class_axis_name: mesh axes that split the classes, as in `cross_entropy`: those of `kernel`, `bias`,
            `class_weights` and distributions. On an Auto mesh, plain `jit` gathers the kernel unless it is given.
        batch_axis_name: mesh axes that split the rows, as in `cross_entropy`.
        reduction: "mean", "sum", "none" (which always recomputes) or "parts".

    Returns:
        float32 (float64 for float64 inputs), as `cross_entropy`. Gradients have the dtype of their arrays; that of the
        logits is rounded to the dtype of the products on its way to them, and in float16 classes less likely than 6e-8
        vanish from it. A label outside [0, V) makes its loss NaN, and with it every gradient that is a sum over rows.

    Raises:
        TypeError: a dtype contradicts its meaning, an argument is no array, or `recompute` is not a bool.
        ValueError: a shape, a setting, `block_bytes`, `reduction` or a NumPy label is wrong, or `ignore_index` comes
            with distributions.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> hidden, kernel = jnp.ones((4, 2)), jnp.eye(2, 1000)
        >>> targets = jnp.array([0, 1, 2, -1])
        >>> print(f"{jaxce.linear_cross_entropy(hidden, kernel, targets, ignore_index=-1):.4f}")
        6.2445
        >>> print(f"{jaxce.cross_entropy(hidden @ kernel, targets, ignore_index=-1):.4f}")
        6.2445

    References:
        - Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.
        - Gemma Team, Gemma 2: Improving Open Language Models at a Practical Size, 2024 (soft-capping).
    """
    logits = LinearLogits(
        hidden,
        kernel,
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        feature_axis_name=feature_axis_name,
        block_bytes=block_bytes,
        recompute=recompute,
    )
    how: Any = reduction  # one of which the overloads take some
    return cross_entropy(
        logits,
        targets,
        weights=weights,
        class_weights=class_weights,
        where=where,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        num_classes=num_classes,
        class_axis_name=class_axis_name,
        batch_axis_name=batch_axis_name,
        reduction=how,
    )
