"""The distance between two models' predictions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, SupportsIndex, Unpack, overload

import jax.numpy as jnp
from jaxtyping import Array

from jaxce._arguments import check_mixture, check_name, check_reduction, check_temperature
from jaxce._conventions import silence
from jaxce._divergence import Heads, Pair, measure_heads, measure_pairs
from jaxce._eager import one_program
from jaxce._formula import reduce_formula
from jaxce._inputs import OnMesh, check_teacher
from jaxce._jensen_shannon import jensen_shannon
from jaxce._logits import LinearLogits
from jaxce._mesh import vary_rule
from jaxce._reduction import MeanParts
from jaxce._rows import Rows
from jaxce._types import (
    AxisName,
    DistillationOptions,
    Divergence,
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
    divergence: Divergence = "forward",
    mixture: Scalar = 0.5,
    axis: SupportsIndex = -1,
    weights: RowWeights | None = None,
    where: RowMask | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Distance of a student's softened predictions from a teacher's.

    For knowledge distillation, beside the cross entropy with the true labels. The teacher receives a gradient too: wrap
    its logits in `jax.lax.stop_gradient` unless both are trained.

    With temperature T, q = softmax(teacher / T), p = softmax(z / T), and β = `mixture`, the loss of a row is::

        forward: l = T² KL(q ‖ p) = T² Σ_c q_c (log q_c − log p_c)
        reverse: l = T² KL(p ‖ q)
        jensen_shannon: l = T² (β KL(q ‖ m) + (1 − β) KL(p ‖ m)), m = β q + (1 − β) p

    The factor T² keeps the gradient's size when T changes. The forward divergence wants the student to have mass
    wherever the teacher has; the reverse one wants it to have none where the teacher has none, and may leave much of
    the teacher out. The third is between them: divided by β it becomes the forward one as β goes to 0, and divided by
    1 − β the reverse one as β goes to 1. It is at most T² log 2.

    Args:
        logits: the student's, (..., C), or the classes along `axis`, any floating dtype; or `LinearLogits`.
        teacher_logits: the teacher's, the shape of `logits`, any floating dtype; or `LinearLogits`. Either may be held
            beside the other that is not. −inf leaves a class out: the forward divergence of a student that leaves out
            what the teacher does not is +inf, the reverse one the other way round.
        temperature: T in [1e-9, 1e9], scalar.
        divergence: "forward", "reverse" or "jensen_shannon". The last goes over the classes twice: of lazy logits that
            recompute, its gradient needs five matrix multiplications for four.
        mixture: β in (0, 1), scalar, the teacher's part in the mixture; of "jensen_shannon", and not read otherwise.
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
        ValueError: a shape, `axis`, `temperature`, `divergence`, `mixture` or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 0.0]])
        >>> print(f"{jaxce.distillation_loss(student, teacher, temperature=2.0):.4f}")
        0.3610
        >>> print(f"{jaxce.distillation_loss(student, teacher, temperature=2.0, divergence='reverse'):.4f}")
        0.4195
        >>> print(f"{jaxce.distillation_loss(student, teacher, divergence='jensen_shannon', mixture=0.1):.4f}")
        0.0157

    References:
        - Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
        - Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2024 (reverse).
        - Agarwal et al., On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes, 2024
          (generalized knowledge distillation: Jensen–Shannon).
    """
    inputs = check_teacher(
        logits, teacher_logits, axis, weights, where, OnMesh(num_classes, class_axis_name, batch_axis_name)
    )
    temperature = check_temperature("temperature", temperature)
    check_name("divergence", divergence, Divergence)
    check_reduction(reduction)
    if divergence == "jensen_shannon":
        formula = JensenShannon(temperature, check_mixture(mixture))
    else:
        formula = Forward(temperature) if divergence == "forward" else Reverse(temperature)
    return reduce_formula(formula, inputs, reduction=reduction)


# The losses per row, before the weights of rows. The teacher's logits are the rows' targets.


class Forward(NamedTuple):
    """T² KL(teacher ‖ student)."""

    temperature: HeldArray

    def __call__(self, rows: Rows) -> PerRow:
        models = _models(self.temperature, rows)
        return _scaled(_kullback_leibler(models), self.temperature, rows)


class Reverse(NamedTuple):
    """T² KL(student ‖ teacher): the forward divergence with the roles swapped."""

    temperature: HeldArray

    def __call__(self, rows: Rows) -> PerRow:
        models = _models(self.temperature, rows)
        student, teacher = models.student, models.teacher
        if isinstance(student, LinearLogits) and isinstance(teacher, LinearLogits):
            teacher = replace(teacher, block_bytes=student.block_bytes)  # by the student's word, as ever
        swapped = models._replace(student=teacher, teacher=student)
        return _scaled(_kullback_leibler(swapped), self.temperature, rows)


class JensenShannon(NamedTuple):
    """T² times the divergence of the two from their mixture."""

    temperature: HeldArray
    mixture: HeldArray

    def __call__(self, rows: Rows) -> PerRow:
        models, mixture = _models(self.temperature, rows), jnp.asarray(self.mixture, rows.dtype)
        divergence = jensen_shannon(models if isinstance(models, Heads) else _held_heads(models), mixture)
        return _scaled(jnp.reshape(divergence, rows.logits.shape[:-1]), self.temperature, rows)


def _models(temperature: HeldArray, rows: Rows) -> Pair | Heads:
    """The inputs of the rules."""
    real = rows.classes.real(rows.logits.shape[-1])
    of_rows = (jnp.asarray(temperature, rows.dtype), rows.counts, real, rows.classes)
    if isinstance(rows.logits, LinearLogits) or isinstance(rows.targets, LinearLogits):
        return Heads(rows.logits, rows.targets, *of_rows)
    return Pair(rows.logits, rows.targets, *of_rows)


def _held_heads(pairs: Pair) -> Heads:
    """Logits that are held, with their rows along one axis."""
    shape = math.prod(pairs.student.shape[:-1]), pairs.student.shape[-1]
    counts = None if pairs.counts is None else jnp.reshape(pairs.counts, shape[:1])
    student, teacher = jnp.reshape(pairs.student, shape), jnp.reshape(pairs.teacher, shape)
    return Heads(student, teacher, *pairs[2:])._replace(counts=counts)


def _kullback_leibler(models: Pair | Heads) -> PerRow:
    """KL(teacher ‖ student) of every row."""
    if isinstance(models, Heads):
        return measure_heads(vary_rule(models)).divergence
    return measure_pairs(vary_rule(models)).divergence


def _scaled(divergence: PerRow, temperature: HeldArray, rows: Rows) -> PerRow:
    """T² times the divergence; 0 where rows do not count."""
    return jnp.square(jnp.asarray(temperature, rows.dtype)) * silence(rows.counts, divergence.astype(rows.dtype))
