"""A kit for classes of unequal size: how often each occurs, and what to do about it.

Count the classes, make class weights or a logit adjustment of the counts, and pass them to the losses. What a mistake
costs may be said directly, with `expected_cost`.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, SupportsIndex, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxce._arguments import check_class_counts, check_log_beta, check_name, check_reduction, check_scalar
from jaxce._checks import report_labels, widen
from jaxce._conventions import accumulator, loud, silence
from jaxce._eager import one_program
from jaxce._formula import reduce_formula
from jaxce._inputs import ClassInputs, LabelInputs, check_classes, check_costs, check_labels, with_dtype_of
from jaxce._mesh import over_axes
from jaxce._reduction import MeanParts
from jaxce._rows import Rows
from jaxce._slice import softmax
from jaxce._split import enter, over_devices, whole
from jaxce._targets import SparseTargets, Targets
from jaxce._types import (
    ClassCounts,
    Costs,
    HeldArray,
    Labels,
    Logits,
    PerRow,
    Reduction,
    RowMask,
    RowOptions,
    RowWeights,
    Scalar,
    ToArray,
    ToParts,
)

Scheme = Literal["balanced", "inverse_sqrt", "effective_number", "median_frequency"]


@one_program
def class_counts(
    targets: Labels, num_classes: SupportsIndex, *, where: RowMask | None = None
) -> Float[Array, " classes"]:
    """How many labels there are of every class.

    Counts of batches add up: with `+`, in the carry of a `scan`, over devices with `jax.lax.psum`. Distributions need
    no counting, the mass of their classes is `targets.sum(axis=0)`.

    Args:
        targets: labels in [0, C), any shape and any integer dtype.
        num_classes: C, a Python int.
        where: boolean, the shape of `targets`. Labels where it is false are not counted and may be anything.

    Returns:
        (C,), float32, which no number of batches overflows. A sum of counts is exact up to 2²⁴ of one class. Beyond,
        every batch that is added makes it wrong by at most 6e-8 of itself; add millions of them in NumPy's float64. A
        label outside [0, C) makes all of them NaN.

    Raises:
        TypeError: `targets` are no integers, `where` is not boolean, or `num_classes` is no integer or traced.
        ValueError: `num_classes` is not positive, a shape is wrong, or a NumPy label is outside [0, C).

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> labels = jnp.array([0, 2, 2, 255])
        >>> print(jaxce.imbalance.class_counts(labels, 3, where=labels != 255))
        [1. 0. 2.]
    """
    inputs = check_labels(targets, num_classes, where)
    return _class_counts(inputs)


@jax.jit
def _class_counts(inputs: LabelInputs) -> Array:
    report_labels(inputs)
    split, num_classes = inputs.split, inputs.num_classes

    def count_slice(targets: HeldArray, where: HeldArray | None) -> Array:
        labels = widen(jnp.asarray(targets))
        in_range = (labels >= 0) & (labels < num_classes)
        counted, wrong = (in_range, ~in_range) if where is None else (in_range & where, ~in_range & where)
        chosen = jnp.where(counted, labels, num_classes)
        counts = jnp.zeros(num_classes + 1, jnp.int32).at[chosen].add(1)[:-1].astype(jnp.float32)
        return over_axes(jnp.where(jnp.any(wrong), jnp.nan, counts), enter(split).row_axes)

    if not split.is_whole:
        return count_slice(inputs.targets, inputs.where)
    spec = split.rows_spec()
    return over_devices(count_slice, split, (inputs.targets, inputs.where), (spec, spec), PartitionSpec())


@one_program
def class_weights(
    counts: ClassCounts, *, scheme: Scheme = "balanced", beta: Scalar = 0.999
) -> Float[Array, " classes"]:
    """Class weights from how often the classes occur: the rarer, the heavier.

    For the `class_weights` of the losses. All schemes trade precision of the rare classes for their recall, from
    "balanced", under which all classes have an equal part in the loss, to milder ones. Where only the ranking between
    classes is biased, `logit_adjustment` is the better founded way; where one kind of mistake hurts, `expected_cost`.

    With n_c the counts, N their sum and C the number of classes that were counted at all, the weights are::

        balanced: w_c = N / (C n_c)
        inverse_sqrt: w_c = N / (√n_c Σ_k √n_k)
        effective_number: w_c = C e_c / Σ_k e_k, e_c = (1−β) / (1−β^{n_c})
        median_frequency: w_c = median_k(n_k) / n_c

    The first two leave the mean weight of a row at 1. A class that was never counted is taken to be as rare as the
    rarest that was, and its weight is finite; it has no part in N, C, the sums and the median. Counts of nothing at all
    are weights of 1.

    Args:
        counts: (C,), real and ≥ 0: of `class_counts`, of `numpy.bincount`, or frequencies.
        scheme: "balanced", "inverse_sqrt", "effective_number" or "median_frequency".
        beta: β in [0, 1), scalar, for "effective_number": 0 is no weights, and near 1 the weights are those of
            "balanced", up to a factor. Its counts have to be counts, not frequencies.

    Returns:
        (C,), float32 (float64 for float64 counts). Differentiable in `counts` and `beta`. A count or a β that is wrong,
        on a device, makes them all NaN.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: `counts` have no shape (C,), `scheme` or `beta` is wrong, or a NumPy count is negative or not
            finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> counts = jnp.array([260, 10, 56, 500])
        >>> print(*(f"{weight:.2f}" for weight in jaxce.imbalance.class_weights(counts)))
        0.79 20.65 3.69 0.41
        >>> print(*(f"{weight:.2f}" for weight in jaxce.imbalance.class_weights(counts, scheme="inverse_sqrt")))
        1.04 5.32 2.25 0.75

    References:
        - scikit-learn's `compute_class_weight` has the same "balanced".
        - Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019.
        - Eigen and Fergus, Predicting Depth, Surface Normals and Semantic Labels with a Common Multi-Scale
          Convolutional Architecture, 2015 (median frequency; they count the pixels of images in which a class occurs).
    """
    counts = check_class_counts(counts)
    check_name("scheme", scheme, Scheme)
    return _class_weights(counts, check_log_beta(beta), scheme=scheme)


@partial(jax.jit, static_argnames="scheme", inline=True)
def _class_weights(counts: HeldArray, log_beta: HeldArray, *, scheme: Scheme) -> Array:
    n, counted = _fill(counts)
    if scheme == "balanced":
        return _mean(n, counted) / n
    if scheme == "inverse_sqrt":
        return _mean(n, counted) / _mean(jnp.sqrt(n), counted) / jnp.sqrt(n)
    if scheme == "effective_number":
        inverse = 1 / -jnp.expm1(n * log_beta.astype(n.dtype))
        return inverse / _mean(inverse, counted)
    return _median(n, counted) / n


@one_program
def logit_adjustment(counts: ClassCounts, *, tau: Scalar = 1.0) -> Float[Array, " classes"]:
    """What to add to the logits in training, so that rare classes are not at a disadvantage when it is left out.

    A network trained on unequal classes learns their frequencies with the rest. Here the frequencies are added to its
    logits, in training alone, so that it learns the rest::

        l(z, y) = cross_entropy(z + a, y), a_c = τ log π_c, π_c = n_c / Σ_k n_k

    At the optimum, with τ = 1, the network's own argmax has the least mean of the classes' error rates, instead of the
    least error rate of all rows. From the logits of a network that was trained without it, subtract `a`. The bias of a
    linear head takes it too.

    Args:
        counts: (C,), real and ≥ 0: of `class_counts`, of `numpy.bincount`, or frequencies.
        tau: τ, scalar. 0 is no adjustment.

    Returns:
        (C,), float32 (float64 for float64 counts): a. For a class axis that is not the last, give it the axes that
        follow, as `a[:, None, None]`. bfloat16 logits to which it is added become float32. Differentiable in both
        arguments. A class that was never counted is taken to be as rare as the rarest that was, and is finite. A count
        that is wrong, on a device, makes it NaN.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: `counts` have no shape (C,), `tau` is no scalar, or a NumPy count is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> adjustment = jaxce.imbalance.logit_adjustment(jnp.array([90, 10]))
        >>> print(f"{jaxce.cross_entropy(jnp.zeros(2) + adjustment, jnp.array(1)):.4f}")
        2.3026

    References:
        Menon et al., Long-Tail Learning via Logit Adjustment, 2021.
    """
    counts = check_class_counts(counts)
    tau = check_scalar("tau", tau)
    return _logit_adjustment(counts, tau)


@partial(jax.jit, inline=True)
def _logit_adjustment(counts: HeldArray, tau: HeldArray) -> Array:
    n, counted = _fill(counts)
    return jnp.asarray(tau, n.dtype) * jnp.log(n / jnp.sum(jnp.where(counted, n, 0)))


def _fill(counts: HeldArray) -> tuple[Float[Array, " classes"], Bool[Array, " classes"]]:
    """Counts without a 0, and which of them were none: all, if none was counted."""
    dtype = accumulator(counts)
    n = whole(jnp.asarray(counts)).astype(dtype)
    n = jnp.where(jnp.all((n >= 0) & (n < jnp.inf)), n, jnp.nan)
    counted = n != 0
    is_any = jnp.any(counted)
    rarest = jnp.where(is_any, jnp.min(jnp.where(counted, n, jnp.inf)), 1)
    return jnp.where(counted, n, rarest), counted | ~is_any


def _mean(values: Float[Array, " classes"], counted: Bool[Array, " classes"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(counted, values, 0)) / jnp.sum(counted, dtype=values.dtype)


def _median(values: Float[Array, " classes"], counted: Bool[Array, " classes"]) -> Float[Array, ""]:
    ascending = jnp.sort(jnp.where(counted, values, jnp.inf))
    number = jnp.sum(counted, dtype=jnp.int32)
    return (ascending[(number - 1) // 2] + ascending[number // 2]) / 2


@overload
def expected_cost(
    logits: Logits,
    targets: Targets,
    costs: Costs,
    *,
    axis: SupportsIndex = ...,
    reduction: ToArray = ...,
    **options: Unpack[RowOptions],
) -> Array: ...
@overload
def expected_cost(
    logits: Logits,
    targets: Targets,
    costs: Costs,
    *,
    axis: SupportsIndex = ...,
    reduction: ToParts,
    **options: Unpack[RowOptions],
) -> MeanParts: ...
@one_program
def expected_cost(
    logits: Logits,
    targets: Targets,
    costs: Costs,
    *,
    axis: SupportsIndex = -1,
    weights: RowWeights | None = None,
    where: RowMask | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """What the predictions are expected to cost, where every mistake has its price.

    For mistakes that differ: a class weight makes every mistake about a class dearer, a price the one that hurts. A
    confident mistake has hardly any gradient, as p is flat there; so add it to `cross_entropy`, with a factor to
    choose, rather than train on it alone.

    With p = softmax(z) and costs K, of true classes by predicted ones, the loss of a row is::

        l = Σ_c K_{y c} p_c

    and with a distribution q::

        l = Σ_k q_k Σ_c K_{k c} p_c

    Costs of 1 off the diagonal and 0 on it are the probability of a mistake. To heed prices without training on them,
    take the class of the least expected cost, `jnp.argmin(jax.nn.softmax(logits) @ costs, axis=-1)`.

    Args:
        logits: (..., C), or the classes along `axis`, all of them inside `shard_map` too. Any floating dtype.
        targets: labels in [0, C), any integer dtype, the shape of `logits` without the class axis; or distributions, a
            floating dtype, the shape of `logits`; or `SparseTargets`.
        costs: (C, C), real and finite, true classes along the first axis, predicted ones along the second. A negative
            cost is a gain.
        axis: the class axis of `logits` and of distributions.
        weights: weights of the rows, the shape of the losses.
        where: boolean, the shape of the losses; rows where it is false are not read.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs): a scalar, the shape of the losses for "none", or a `MeanParts`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, `axis`, `reduction` or a NumPy label is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> costs = jnp.array([[0.0, 1.0], [5.0, 0.0]])  # to take class 1 for class 0 is five times as bad
        >>> print(f"{jaxce.imbalance.expected_cost(jnp.zeros((2, 2)), jnp.array([0, 1]), costs):.4f}")
        1.5000

    References:
        Elkan, The Foundations of Cost-Sensitive Learning, 2001.
    """
    inputs = check_classes(logits, targets, axis=axis, weights=weights, where=where)
    costs = check_costs(costs, inputs.logits.shape[inputs.axis])
    check_reduction(reduction)
    return _expected_cost(inputs, costs, reduction=reduction)


@partial(jax.jit, static_argnames="reduction", inline=True)
def _expected_cost(inputs: ClassInputs, costs: HeldArray, *, reduction: Reduction) -> Array | MeanParts:
    return reduce_formula(_ExpectedCost(whole(costs)), with_dtype_of(inputs, costs), reduction=reduction)


#     p   the softmax          k   costs of the row's true class          k_m   that of the most probable class
#
# Σ k p as it stands has the gradient p (k − Σ k p), a difference of nearly equal numbers for the most probable class of
# a confident row, and so has none of its digits where k_m is not 0. As Σ p = 1, it is k_m + Σ (k − k_m) p, whose terms
# are as small as what they say, and whose derivative by k_m is 0.


class _ExpectedCost(NamedTuple):
    """The expected cost per row, before the weights of rows. The costs are whole where classes are split."""

    costs: HeldArray

    def __call__(self, rows: Rows) -> PerRow:
        dtype, size, classes = rows.dtype, rows.logits.shape[-1], rows.classes
        costs = jnp.asarray(self.costs).astype(dtype)
        start = classes.start(size)
        if rows.has_labels:
            costs = costs[rows.targets]
        elif isinstance(rows.targets, SparseTargets):
            masses = silence(rows.counts, rows.targets.masses.astype(dtype))
            costs = jnp.sum(masses[..., None] * costs[rows.targets.classes], axis=-2)
        else:
            targets = silence(rows.counts, rows.targets.astype(dtype))
            costs = lax.dynamic_slice_in_dim(costs, start, size)
            costs = classes.sum(jnp.matmul(targets, costs, precision=lax.Precision.HIGHEST))
        costs = lax.dynamic_slice_in_dim(costs, start, size, axis=-1)
        p = softmax(silence(rows.counts, rows.logits.astype(dtype)), classes)
        is_top = p == classes.largest(jnp.max(p, axis=-1, keepdims=True))
        top_cost = classes.largest(jnp.max(jnp.where(is_top, costs, -jnp.inf), axis=-1, keepdims=True))
        expected = top_cost[..., 0] + classes.sum(jnp.sum((costs - top_cost) * p, axis=-1))
        return loud(rows.valid, silence(rows.counts, expected))
