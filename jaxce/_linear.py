"""The losses over classes for a linear head: hidden and kernel in place of logits, which are never held."""

from functools import partial
from typing import Any, SupportsIndex, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxce._distillation import Distillation
from jaxce._eager import one_program
from jaxce._forward_gradient import total_loss
from jaxce._inputs import (
    ClassInputs,
    OnMesh,
    check_classes,
    check_head,
    check_recompute,
    check_reduction,
    check_scalar,
    check_teacher_head,
    present,
)
from jaxce._losses import CrossEntropy, Focal, Poly
from jaxce._mesh import over_axes
from jaxce._reduction import MeanParts, reduce_rows, total_weight
from jaxce._rows import on_slices, read_classes
from jaxce._types import (
    AxisName,
    ClassVector,
    Distributions,
    Hidden,
    Kernel,
    Labels,
    LinearOptions,
    Reduction,
    RowAxisNames,
    RowMask,
    RowWeights,
    Scalar,
    TeacherHidden,
    TeacherKernel,
    TeacherOptions,
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
    reduction: ToArray = ...,
    **options: Unpack[LinearOptions],
) -> Array: ...
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
@one_program
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
    ignore_index: SupportsIndex | None = None,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    block_bytes: SupportsIndex | None = None,
    recompute: bool | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    r"""Cross entropy of hidden · kernel, without the logits ever being held.

    For language models and other heads with many classes, where the logits and their gradient would be the largest
    arrays of the step. The loss is that of `cross_entropy(hidden @ kernel + bias, targets, …)`, with every option of
    it; where the logits are small, that is simpler and as fast.

    With softcap s the logits are

    .. math:: z = s · \tanh((\text{hidden} · \text{kernel} + \text{bias}) / s)

    There are two ways to the gradient. Recomputing goes through blocks of classes: the backward pass makes each block
    of logits a second time, four matrix multiplications in all. Beside the gradients it needs one float32 array of
    hidden's shape and a block, whatever V is. The other goes through blocks of rows and makes the gradients in the
    forward pass, three matrix multiplications in all, but holds float32 gradients of hidden and kernel until they are
    rounded. It serves scalar reductions and first derivatives, and hands over to recomputing for all others; without a
    derivative, neither computes a gradient.

    Args:
        hidden: (..., D), any floating dtype. The products with `kernel` are in the dtype of both, accumulated in at
            least float32; their precision is that of `jax.default_matmul_precision`.
        kernel: (D, V), any floating dtype, as in `flax`'s Dense. Of tied embeddings (V, D) pass `embedding.T`: GPUs
            and TPUs read it as it lies. A TPU may copy the finished gradient, where V is large.
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
            512 classes need, and 512 MiB for blocks of rows. For N rows a block has max(1, block_bytes // 4N) classes,
            or max(1, block_bytes // 4V) rows.
        recompute: whether the backward pass makes the logits again. None does so where `kernel` is narrower than
            float32, so that its float32 gradient would be an array of its own, the largest of the step; and not
            otherwise.
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
    head = check_head(hidden, kernel, bias, softcap, block_bytes)
    inputs = check_classes(
        head,
        targets,
        weights=weights,
        class_weights=class_weights,
        where=where,
        ignore_index=ignore_index,
        on_mesh=OnMesh(num_classes, class_axis_name, batch_axis_name),
    )
    label_smoothing = check_scalar("label_smoothing", label_smoothing, low=0, high=1)
    z_loss = check_scalar("z_loss", z_loss, low=0)
    loss = CrossEntropy(present(label_smoothing), present(z_loss))
    return _reduce(loss, inputs, reduction, recompute)


@overload
def linear_focal_loss(
    hidden: Hidden,
    kernel: Kernel,
    targets: Labels,
    *,
    gamma: Scalar = ...,
    reduction: ToArray = ...,
    **options: Unpack[LinearOptions],
) -> Array: ...
@overload
def linear_focal_loss(
    hidden: Hidden,
    kernel: Kernel,
    targets: Labels,
    *,
    gamma: Scalar = ...,
    reduction: ToParts,
    **options: Unpack[LinearOptions],
) -> MeanParts: ...
@one_program
def linear_focal_loss(
    hidden: Hidden,
    kernel: Kernel,
    targets: Labels,
    *,
    gamma: Scalar = 2.0,
    bias: ClassVector | None = None,
    softcap: Scalar | None = None,
    weights: RowWeights | None = None,
    class_weights: ClassVector | None = None,
    where: RowMask | None = None,
    ignore_index: SupportsIndex | None = None,
    block_bytes: SupportsIndex | None = None,
    recompute: bool | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    r"""Focal loss over the classes of hidden · kernel, without the logits ever being held.

    What `focal_loss` is to `cross_entropy`, this is to `linear_cross_entropy`:

    .. math:: l = w_y (1 − p_y)^γ (−\log p_y)

    Args:
        hidden: (..., D), any floating dtype.
        kernel: (D, V), any floating dtype.
        targets: labels in [0, V), any integer dtype, shape (...).
        gamma: γ ≥ 0, scalar.
        bias: (V,), floating.
        softcap: s > 0, scalar; the logits are s · tanh((hidden · kernel + bias) / s).
        weights: weights of the rows, the shape of the losses (...).
        class_weights: (V,), real; they weigh the loss and the mean's divisor.
        where: boolean, the shape of the losses; rows where it is false are not read.
        ignore_index: label of rows that do not count.
        block_bytes: what one block of logits may take in float32, as in `linear_cross_entropy`.
        recompute: whether the backward pass makes the logits again, as in `linear_cross_entropy`.
        num_classes: how many classes are no padding, as in `linear_cross_entropy`.
        class_axis_name: mesh axes that split the classes, as in `linear_cross_entropy`.
        batch_axis_name: mesh axes that split the rows, as in `linear_cross_entropy`.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs), as `linear_cross_entropy`.

    Raises:
        TypeError: `targets` are distributions, or a dtype is wrong.
        ValueError: a shape, `gamma`, `softcap`, `block_bytes`, `reduction` or a NumPy label is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> hidden, kernel = jnp.array([[2.0, 0.0]]), jnp.eye(2)
        >>> print(f"{jaxce.linear_focal_loss(hidden, kernel, jnp.array([0])):.6f}")
        0.001804

    References:
        Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    head = check_head(hidden, kernel, bias, softcap, block_bytes)
    inputs = check_classes(
        head,
        targets,
        weights=weights,
        class_weights=class_weights,
        where=where,
        ignore_index=ignore_index,
        on_mesh=OnMesh(num_classes, class_axis_name, batch_axis_name),
        labels_only="linear_focal_loss",
    )
    gamma = check_scalar("gamma", gamma, low=0)
    return _reduce(Focal(gamma), inputs, reduction, recompute)


@overload
def linear_poly_loss(
    hidden: Hidden,
    kernel: Kernel,
    targets: Labels,
    *,
    epsilon: Scalar = ...,
    reduction: ToArray = ...,
    **options: Unpack[LinearOptions],
) -> Array: ...
@overload
def linear_poly_loss(
    hidden: Hidden,
    kernel: Kernel,
    targets: Labels,
    *,
    epsilon: Scalar = ...,
    reduction: ToParts,
    **options: Unpack[LinearOptions],
) -> MeanParts: ...
@one_program
def linear_poly_loss(
    hidden: Hidden,
    kernel: Kernel,
    targets: Labels,
    *,
    epsilon: Scalar = 1.0,
    bias: ClassVector | None = None,
    softcap: Scalar | None = None,
    weights: RowWeights | None = None,
    class_weights: ClassVector | None = None,
    where: RowMask | None = None,
    ignore_index: SupportsIndex | None = None,
    block_bytes: SupportsIndex | None = None,
    recompute: bool | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    r"""Poly-1 loss over the classes of hidden · kernel, without the logits ever being held.

    What `poly_loss` is to `cross_entropy`, this is to `linear_cross_entropy`:

    .. math:: l = w_y (−\log p_y + ε (1 − p_y))

    Args:
        hidden: (..., D), any floating dtype.
        kernel: (D, V), any floating dtype.
        targets: labels in [0, V), any integer dtype, shape (...).
        epsilon: ε, scalar.
        bias: (V,), floating.
        softcap: s > 0, scalar; the logits are s · tanh((hidden · kernel + bias) / s).
        weights: weights of the rows, the shape of the losses (...).
        class_weights: (V,), real; they weigh the loss and the mean's divisor.
        where: boolean, the shape of the losses; rows where it is false are not read.
        ignore_index: label of rows that do not count.
        block_bytes: what one block of logits may take in float32, as in `linear_cross_entropy`.
        recompute: whether the backward pass makes the logits again, as in `linear_cross_entropy`.
        num_classes: how many classes are no padding, as in `linear_cross_entropy`.
        class_axis_name: mesh axes that split the classes, as in `linear_cross_entropy`.
        batch_axis_name: mesh axes that split the rows, as in `linear_cross_entropy`.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs), as `linear_cross_entropy`.

    Raises:
        TypeError: `targets` are distributions, or a dtype is wrong.
        ValueError: a shape, `epsilon`, `softcap`, `block_bytes`, `reduction` or a NumPy label is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> hidden, kernel = jnp.array([[2.0, 0.0]]), jnp.eye(2)
        >>> print(f"{jaxce.linear_poly_loss(hidden, kernel, jnp.array([0])):.4f}")
        0.2461

    References:
        Leng et al., PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions, 2022.
    """
    head = check_head(hidden, kernel, bias, softcap, block_bytes)
    inputs = check_classes(
        head,
        targets,
        weights=weights,
        class_weights=class_weights,
        where=where,
        ignore_index=ignore_index,
        on_mesh=OnMesh(num_classes, class_axis_name, batch_axis_name),
        labels_only="linear_poly_loss",
    )
    epsilon = check_scalar("epsilon", epsilon)
    return _reduce(Poly(epsilon), inputs, reduction, recompute)


@overload
def linear_distillation_loss(
    hidden: Hidden,
    kernel: Kernel,
    teacher_hidden: TeacherHidden,
    teacher_kernel: TeacherKernel,
    *,
    temperature: Scalar = ...,
    reduction: ToArray = ...,
    **options: Unpack[TeacherOptions],
) -> Array: ...
@overload
def linear_distillation_loss(
    hidden: Hidden,
    kernel: Kernel,
    teacher_hidden: TeacherHidden,
    teacher_kernel: TeacherKernel,
    *,
    temperature: Scalar = ...,
    reduction: ToParts,
    **options: Unpack[TeacherOptions],
) -> MeanParts: ...
@one_program
def linear_distillation_loss(
    hidden: Hidden,
    kernel: Kernel,
    teacher_hidden: TeacherHidden,
    teacher_kernel: TeacherKernel,
    *,
    temperature: Scalar = 1.0,
    bias: ClassVector | None = None,
    softcap: Scalar | None = None,
    teacher_bias: ClassVector | None = None,
    teacher_softcap: Scalar | None = None,
    weights: RowWeights | None = None,
    where: RowMask | None = None,
    block_bytes: SupportsIndex | None = None,
    recompute: bool | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    r"""Distance of a linear head's softened predictions from a teacher's, without the logits of either being held.

    The loss is that of `distillation_loss` on the logits of both heads. With q = softmax(teacher / T) and
    p = softmax(z / T),

    .. math:: l = T^2 Σ_c q_c (\log q_c − \log p_c)

    The teacher receives a gradient too: wrap what belongs to it in `jax.lax.stop_gradient` unless both are trained,
    and its gradient is not computed.

    Args:
        hidden: the student's, (..., D), any floating dtype.
        kernel: the student's, (D, V), any floating dtype.
        teacher_hidden: (..., E), any floating dtype; its own width E.
        teacher_kernel: (E, V), any floating dtype.
        temperature: T in [1e-9, 1e9], scalar.
        bias: the student's, (V,), floating.
        softcap: the student's s > 0, scalar; the logits are s · tanh((hidden · kernel + bias) / s).
        teacher_bias: (V,), floating.
        teacher_softcap: > 0, scalar.
        weights: weights of the rows, the shape of the losses (...).
        where: boolean, the shape of the losses; rows where it is false are not read.
        block_bytes: what one block of the student's logits may take in float32, as in `linear_cross_entropy`. The
            teacher's block comes beside it.
        recompute: whether the backward pass makes the logits again, as in `linear_cross_entropy`.
        num_classes: how many classes are no padding, as in `linear_cross_entropy`.
        class_axis_name: mesh axes that split the classes, as in `linear_cross_entropy`.
        batch_axis_name: mesh axes that split the rows, as in `linear_cross_entropy`.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs), as `linear_cross_entropy`. 0 where student and teacher agree, and as
        exact for the logits of a block as `distillation_loss`.

    Raises:
        TypeError: a dtype is wrong, or `recompute` is not a bool.
        ValueError: a shape, `temperature`, a softcap, `block_bytes` or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 0.0]])
        >>> loss = jaxce.linear_distillation_loss(student, jnp.eye(2), teacher, jnp.eye(2), temperature=2.0)
        >>> print(f"{loss:.4f}")
        0.3610

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    student = check_head(hidden, kernel, bias, softcap, block_bytes)
    teacher = check_head(teacher_hidden, teacher_kernel, teacher_bias, teacher_softcap, block_bytes, prefix="teacher_")
    inputs = check_teacher_head(student, teacher, weights, where, OnMesh(num_classes, class_axis_name, batch_axis_name))
    temperature = check_scalar("temperature", temperature, low=1e-9, high=1e9)
    return _reduce(Distillation(temperature), inputs, reduction, recompute)


def _reduce(loss: Any, inputs: Any, reduction: str, recompute: bool | None) -> Any:
    check_reduction(reduction)
    check_recompute(recompute)
    return reduce_linear_loss(loss, inputs, reduction=reduction, recompute=recomputes(recompute, inputs))


def recomputes(recompute: bool | None, inputs: ClassInputs) -> bool:
    """Whether the backward pass makes the logits again; of None, by the rule that `linear_cross_entropy` states."""
    return inputs.logits.kernel.dtype.itemsize < 4 if recompute is None else recompute


@partial(jax.jit, static_argnames=("reduction", "recompute"), inline=True)
def reduce_linear_loss(loss, inputs, *, reduction, recompute):
    """The jitted half of the losses of a linear head: `loss` is the formula of a row, such as `CrossEntropy`."""

    def reduce_slice(inputs, loss):
        rows = read_classes(inputs)
        row_weights = (rows.counts, rows.weights, rows.label_weights)
        axes = inputs.split.row_axes
        if recompute or reduction == "none":
            reduced: Any = reduce_rows(loss(rows), *row_weights, axes=axes, reduction=reduction)
            return jnp.reshape(reduced, inputs.logits.shape[:-1]) if reduction == "none" else reduced
        weight = over_axes(total_weight(rows.logits.shape[0], rows.dtype, *row_weights), axes)
        if reduction in ("mean", "ratio"):
            # Divided before the sum, not after: then the gradients need not be multiplied by anything afterwards.
            divisor = jnp.where(weight == 0, jnp.ones_like(weight), weight) if reduction == "mean" else weight
            weights = jnp.ones(rows.logits.shape[:1], rows.dtype) if rows.weights is None else rows.weights
            rows = rows._replace(weights=weights / divisor)
        total = over_axes(total_loss(loss, rows), axes)
        if reduction == "mean":
            undivided = MeanParts(jnp.where(weight == 0, total, jnp.zeros_like(total)), weight)
            return jnp.where(weight == 0, undivided.mean(), total)
        if reduction == "ratio":
            return total + 0 / weight  # NaN over nothing, where the sum of no rows is 0
        return MeanParts(total, weight) if reduction == "parts" else total

    return on_slices(reduce_slice, inputs, loss, per_row=reduction == "none")
