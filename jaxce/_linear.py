"""The losses over classes for a linear head: hidden and kernel in place of logits, which are never held."""

from functools import partial
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxce._forward_gradient import total_loss
from jaxce._inputs import (
    check_classes,
    check_head,
    check_recompute,
    check_reduction,
    check_scalar,
    present,
)
from jaxce._losses import CrossEntropy, Focal, Poly
from jaxce._reduction import MeanParts, reduce_rows, reduce_total, total_weight
from jaxce._rows import read_classes
from jaxce._types import (
    ClassVector,
    Distributions,
    Hidden,
    Kernel,
    Labels,
    LinearOptions,
    Reduction,
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
    targets: Labels | Distributions,
    *,
    label_smoothing: Scalar = ...,
    z_loss: Scalar = ...,
    reduction: ToParts,
    **options: Unpack[LinearOptions],
) -> MeanParts: ...
@overload
def linear_cross_entropy(
    hidden: Hidden,
    kernel: Kernel,
    targets: Labels | Distributions,
    *,
    label_smoothing: Scalar = ...,
    z_loss: Scalar = ...,
    reduction: ToArray = ...,
    **options: Unpack[LinearOptions],
) -> Array: ...
def linear_cross_entropy(
    hidden: Hidden,
    kernel: Kernel,
    targets: Labels | Distributions,
    *,
    bias: ClassVector | None = None,
    softcap: Scalar | None = None,
    weights: RowWeights | None = None,
    class_weights: ClassVector | None = None,
    where: RowMask | None = None,
    ignore_index: int | None = None,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    block_bytes: int | None = None,
    recompute: bool | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Cross entropy of hidden · kernel, without the logits ever being held.

    For language models and other heads with many classes, where the logits and their gradient would be the largest
    arrays of the step. The loss is that of `cross_entropy(hidden @ kernel + bias, targets, …)`, with every option of
    it; where the logits are small, that is simpler and as fast.

    With softcap s the logits are s · tanh((hidden · kernel + bias) / s).

    There are two ways to the gradient. Recomputing goes through blocks of classes: the backward pass makes each block
    of logits a second time, four matrix multiplications in all. Beside the gradients it needs one float32 array of
    hidden's shape and a block, whatever V is. The other goes through blocks of rows and makes the gradients in the
    forward pass, three matrix multiplications in all, but holds float32 gradients of hidden and kernel until they are
    rounded. It serves scalar reductions and first derivatives, and hands over to recomputing for all others; without a
    derivative, neither computes a gradient.

    Args:
        hidden: (..., D), any floating dtype. The products with `kernel` are in the dtype of both, accumulated in at
            least float32; their precision is that of `jax.default_matmul_precision`.
        kernel: (D, V), any floating dtype, as in `flax`'s Dense. Of tied embeddings (V, D) pass `embedding.T`, which
            is not copied.
        targets: labels in [0, V), any integer dtype, shape (...); or distributions (..., V), floating.
        bias: (V,), floating. −inf leaves a class out, unless there is a softcap.
        softcap: s > 0, scalar. Gemma 2 has 30.
        weights: weights of the rows, the shape of the losses (...).
        class_weights: (V,), real; as in `cross_entropy`.
        where: boolean, the shape of the losses. A row where it is false counts as nothing and is not read.
        ignore_index: label of rows that do not count; labels only.
        label_smoothing: ε in [0, 1].
        z_loss: λ ≥ 0.
        block_bytes: what one block of logits may take in float32. None is 64 MiB for blocks of classes, or as much as
            512 classes need, and 256 MiB for blocks of rows. For N rows a block has max(1, block_bytes // 4N) classes,
            or max(1, block_bytes // 4V) rows.
        recompute: whether the backward pass makes the logits again. None does so where `kernel` is narrower than
            float32, so that its float32 gradient would be an array of its own, the largest of the step; and not
            otherwise.
        reduction: "mean", "sum", "none" (which always recomputes) or "parts".

    Returns:
        float32 (float64 for float64 inputs), as `cross_entropy`. Gradients have the dtype of their arrays. A label
        outside [0, V) makes its loss NaN, and with it every gradient that is a sum over rows.

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
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.
        Gemma Team, Gemma 2: Improving Open Language Models at a Practical Size, 2024 (soft-capping).
    """
    inputs = check_classes(
        check_head(hidden, kernel, bias, softcap, block_bytes),
        targets,
        weights=weights,
        class_weights=class_weights,
        where=where,
        ignore_index=ignore_index,
        name="hidden · kernel",
    )
    label_smoothing = check_scalar("label_smoothing", label_smoothing, low=0, high=1)
    z_loss = check_scalar("z_loss", z_loss, low=0)
    loss = CrossEntropy(present(label_smoothing), present(z_loss))
    return _reduce(loss, inputs, reduction, recompute)


def _reduce(loss: Any, inputs: Any, reduction: str, recompute: bool | None) -> Any:
    check_reduction(reduction)
    check_recompute(recompute)
    if recompute is None:
        recompute = jnp.dtype(inputs.logits.kernel.dtype).itemsize < 4
    return reduce_linear_loss(loss, inputs, reduction=reduction, recompute=recompute)


@partial(jax.jit, static_argnames=("reduction", "recompute"), inline=True)
def reduce_linear_loss(loss, inputs, *, reduction, recompute):
    """The jitted half of the losses of a linear head: `loss` is the formula of a row, such as `CrossEntropy`."""
    rows = read_classes(inputs)
    row_weights = (rows.counts, rows.weights, rows.label_weights)
    if recompute or reduction == "none":
        reduced = reduce_rows(loss(rows), *row_weights, reduction=reduction)
        return jnp.reshape(reduced, inputs.logits.shape[:-1]) if reduction == "none" else reduced
    weight = total_weight(rows.logits.shape[0], rows.dtype, *row_weights)
    if reduction not in ("mean", "ratio"):
        return reduce_total(total_loss(loss, rows), weight, reduction=reduction)
    # Divided before the sum, not after: then the gradients need not be multiplied by anything afterwards.
    if reduction == "mean":
        weight = jnp.where(weight == 0, jnp.ones_like(weight), weight)
    weights = jnp.ones(rows.logits.shape[:1], rows.dtype) if rows.weights is None else rows.weights
    return total_loss(loss, rows._replace(weights=weights / weight))
