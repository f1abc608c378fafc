"""The distance between two models' predictions."""

from typing import NamedTuple, SupportsIndex, Unpack, overload

import jax.numpy as jnp
from jaxtyping import Array

from jaxce._arguments import check_reduction, check_temperature
from jaxce._conventions import silence
from jaxce._divergence import Heads, Pair, measure_heads, measure_pairs
from jaxce._eager import one_program
from jaxce._formula import reduce_formula
from jaxce._inputs import OnMesh, check_teacher
from jaxce._logits import LinearLogits
from jaxce._mesh import vary_rule
from jaxce._reduction import MeanParts
from jaxce._rows import Rows
from jaxce._types import (
    AxisName,
    DistillationOptions,
    HeldArray,
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
def distillation_loss(
    logits: Logits | LinearLogits,
    teacher_logits: Logits | LinearLogits,
    *,
    temperature: Scalar = ...,
    axis: SupportsIndex = ...,
    reduction: ToArray = ...,
    **options: Unpack[DistillationOptions],
) -> Array: ...
@overload
def distillation_loss(
    logits: Logits | LinearLogits,
    teacher_logits: Logits | LinearLogits,
    *,
    temperature: Scalar = ...,
    axis: SupportsIndex = ...,
    reduction: ToParts,
    **options: Unpack[DistillationOptions],
) -> MeanParts: ...
@one_program
def distillation_loss(
    logits: Logits | LinearLogits,
    teacher_logits: Logits | LinearLogits,
    *,
    temperature: Scalar = 1.0,
    axis: SupportsIndex = -1,
    weights: RowWeights | None = None,
    where: RowMask | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    r"""Distance of a student's softened predictions from a teacher's.

    For knowledge distillation, beside the cross entropy with the true labels. The teacher receives a gradient too: wrap
    its logits in `jax.lax.stop_gradient` unless both are trained.

    With temperature T, q = softmax(teacher / T) and p = softmax(z / T),

    .. math:: l = T^2 Σ_c q_c (\log q_c − \log p_c)

    The factor T² keeps the gradient's size when T changes.

    Args:
        logits: the student's, (..., C), or the classes along `axis`, any floating dtype; or `LinearLogits`.
        teacher_logits: the teacher's, the shape of `logits`, any floating dtype; or `LinearLogits`. Either may be held
            beside the other that is not. −inf leaves a class out.
        temperature: T in [1e-9, 1e9], scalar.
        axis: the class axis of both.
        weights: weights of the rows, the shape of the losses.
        where: boolean, the shape of the losses; rows where it is false are not read.
        num_classes: how many classes are no padding, as in `cross_entropy`.
        class_axis_name: mesh axes that split the classes, as in `cross_entropy`.
        batch_axis_name: mesh axes that split the rows, as in `cross_entropy`.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs), as `cross_entropy`. 0 where student and teacher agree, never negative, and
        right to float32's relative precision however close they are.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, `axis`, `temperature` or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 0.0]])
        >>> print(f"{jaxce.distillation_loss(student, teacher, temperature=2.0):.4f}")
        0.3610

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    inputs = check_teacher(
        logits, teacher_logits, axis, weights, where, OnMesh(num_classes, class_axis_name, batch_axis_name)
    )
    temperature = check_temperature("temperature", temperature)
    check_reduction(reduction)
    return reduce_formula(Distillation(temperature), inputs, reduction=reduction)


class Distillation(NamedTuple):
    """The distillation loss per row, before the weights of rows; the teacher's logits are the rows' targets."""

    temperature: HeldArray

    def __call__(self, rows: Rows) -> PerRow:
        temperature = jnp.asarray(self.temperature, rows.dtype)
        real = rows.classes.real(rows.logits.shape[-1])
        of_rows = (temperature, rows.counts, real, rows.classes)
        if isinstance(rows.logits, LinearLogits) or isinstance(rows.targets, LinearLogits):
            distance = measure_heads(vary_rule(Heads(rows.logits, rows.targets, *of_rows)))
        else:
            distance = measure_pairs(vary_rule(Pair(rows.logits, rows.targets, *of_rows)))
        divergence = silence(rows.counts, distance.divergence.astype(rows.dtype))
        return jnp.square(temperature) * divergence
