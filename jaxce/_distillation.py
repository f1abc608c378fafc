"""The distance between two models' predictions."""

from dataclasses import replace
from typing import Any, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxce._divergence import Heads, measure_divergence
from jaxce._inputs import Head, check_reduction, check_scalar, check_teacher
from jaxce._losses import reduce_class_loss
from jaxce._reduction import MeanParts
from jaxce._rows import Rows, silence
from jaxce._summary import summarize_rows
from jaxce._types import Logits, PerRow, Reduction, RowMask, RowOptions, RowWeights, Scalar, ToArray, ToParts


@overload
def distillation_loss(
    logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Scalar = ...,
    axis: int = ...,
    reduction: ToParts,
    **options: Unpack[RowOptions],
) -> MeanParts: ...
@overload
def distillation_loss(
    logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Scalar = ...,
    axis: int = ...,
    reduction: ToArray = ...,
    **options: Unpack[RowOptions],
) -> Array: ...
def distillation_loss(
    logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Scalar = 1.0,
    axis: int = -1,
    weights: RowWeights | None = None,
    where: RowMask | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Distance of a student's softened predictions from a teacher's.

    For knowledge distillation, beside the cross entropy with the true labels. The teacher receives a gradient too: wrap
    its logits in `jax.lax.stop_gradient` unless both are trained.

    With temperature T, q = softmax(teacher / T) and p = softmax(z / T), l = T² Σ_c q_c (log q_c − log p_c). The factor
    T² keeps the gradient's size when T changes.

    Args:
        logits: the student's, (..., C), or the classes along `axis`. Any floating dtype.
        teacher_logits: the teacher's, the shape of `logits`, any floating dtype. −inf leaves a class out.
        temperature: T > 0, scalar.
        axis: the class axis of both.
        weights: weights of the rows, the shape of the losses.
        where: boolean, the shape of the losses; rows where it is false are not read.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs), as `cross_entropy`. 0 where student and teacher agree.

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
    inputs = check_teacher(logits, teacher_logits, axis, weights, where)
    temperature = check_scalar("temperature", temperature, low=0, open_low=True)
    check_reduction(reduction)
    return reduce_class_loss(Distillation(temperature), inputs, reduction=reduction)


class Distillation(NamedTuple):
    """The distillation loss per row, before the weights of rows; the teacher's logits are the rows' targets."""

    temperature: Any

    def __call__(self, rows: Rows) -> PerRow:
        temperature = self.temperature.astype(rows.dtype)
        if isinstance(rows.logits, Head):
            student, teacher = (replace(head, temperature=temperature) for head in (rows.logits, rows.targets))
            divergence = measure_divergence(Heads(student, teacher, rows.counts)).divergence
            divergence = silence(rows.counts, divergence.astype(rows.dtype))
        else:
            student, teacher = (
                silence(rows.counts, logits.astype(rows.dtype)) / temperature for logits in (rows.logits, rows.targets)
            )
            rows = rows._replace(targets=jax.nn.softmax(teacher))
            cross = summarize_rows(rows._replace(logits=student)).nll
            divergence = cross - summarize_rows(rows._replace(logits=teacher)).nll
        return jnp.square(temperature) * divergence
