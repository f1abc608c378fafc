"""Losses of single numbers: independent yes/no outputs, and the squared and absolute errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxce._arguments import check_broadcast, check_reduction, check_scalar, present
from jaxce._autodiff import is_local, rule
from jaxce._blocks import over_chunks
from jaxce._checks import report_elements
from jaxce._conventions import accumulator, silence
from jaxce._eager import one_program
from jaxce._inputs import ElementInputs, check_elements
from jaxce._reduction import MeanParts, reduce_rows
from jaxce._split import aligned, is_explicit
from jaxce._types import ElementMask, Elements, HeldArray, Reduction, RowOptions, Scalar, ToArray, ToParts
from jaxce._xla import on_cpu

_Result = TypeVar("_Result")
_ELEMENTS_AT_A_TIME = 2**16  # a few arrays of which stay in a CPU's cache

_core = partial(jax.jit, static_argnames="reduction", inline=True)


@overload
def binary_cross_entropy(
    logits: Elements,
    targets: Elements,
    *,
    pos_weight: Elements | Scalar | None = ...,
    label_smoothing: Scalar = ...,
    reduction: ToArray = ...,
    **options: Unpack[RowOptions],
) -> Array: ...
@overload
def binary_cross_entropy(
    logits: Elements,
    targets: Elements,
    *,
    pos_weight: Elements | Scalar | None = ...,
    label_smoothing: Scalar = ...,
    reduction: ToParts,
    **options: Unpack[RowOptions],
) -> MeanParts: ...
@one_program
def binary_cross_entropy(
    logits: Elements,
    targets: Elements,
    *,
    pos_weight: Elements | Scalar | None = None,
    weights: Elements | None = None,
    where: ElementMask | None = None,
    label_smoothing: Scalar = 0.0,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Cross entropy of independent yes/no outputs.

    For two classes with one output, and for labels of which several may hold at once. For one class out of many use
    `cross_entropy`.

    With t the target after smoothing, t (1−ε) + ε/2, the loss of an element is::

        l = pos_weight · t log(1 + exp(−z)) + (1−t) log(1 + exp z)

    Args:
        logits: any shape, any floating dtype. ±inf is a certain answer.
        targets: probabilities of yes, the shape of `logits`, any floating dtype.
        pos_weight: weight of the yes part, real: a scalar, or what broadcasts to the shape of `logits`, such as one
            number for each output along the last axis.
        weights: weights of the elements, the shape of `logits`.
        where: boolean, the shape of `logits`; elements where it is false are not read.
        label_smoothing: ε in [0, 1].
        reduction: "mean" (over elements that count), "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs): a scalar, the shape of `logits` for "none", or a `MeanParts`.

    Raises:
        TypeError: a dtype is wrong; labels 0 and 1 must be cast to a floating dtype.
        ValueError: a shape, `label_smoothing` or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(f"{jaxce.binary_cross_entropy(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0])):.4f}")
        0.4100

    References:
        PyTorch's `torch.nn.BCEWithLogitsLoss` means the same.
    """
    inputs = check_elements("logits", logits, targets, weights, where)
    pos_weight = check_broadcast("pos_weight", pos_weight, inputs.values.shape)
    label_smoothing = check_scalar("label_smoothing", label_smoothing, low=0, high=1)
    check_reduction(reduction)
    return binary_cross_entropy_core(inputs, pos_weight, present(label_smoothing), reduction=reduction)


@_core
def binary_cross_entropy_core(
    inputs: ElementInputs, pos_weight: HeldArray | None, label_smoothing: HeldArray | None, *, reduction: str
) -> Array | MeanParts:
    """The jitted half of `binary_cross_entropy`."""
    inputs, pos_weight = aligned((inputs, pos_weight))
    z, t, dtype = _read(inputs, None if pos_weight is None or pos_weight.ndim == 0 else pos_weight)
    if label_smoothing is not None:
        epsilon = label_smoothing.astype(dtype)
        t = t * (1 - epsilon) + epsilon / 2
    positive = None if pos_weight is None else with_ndim(pos_weight, z.ndim).astype(dtype) * jnp.ones_like(z)
    return _reduce(_binary_losses((z, t, positive)), inputs, dtype, reduction)


@overload
def binary_focal_loss(
    logits: Elements,
    targets: Elements,
    *,
    gamma: Scalar = ...,
    alpha: Scalar | None = ...,
    reduction: ToArray = ...,
    **options: Unpack[RowOptions],
) -> Array: ...
@overload
def binary_focal_loss(
    logits: Elements,
    targets: Elements,
    *,
    gamma: Scalar = ...,
    alpha: Scalar | None = ...,
    reduction: ToParts,
    **options: Unpack[RowOptions],
) -> MeanParts: ...
@one_program
def binary_focal_loss(
    logits: Elements,
    targets: Elements,
    *,
    gamma: Scalar = 2.0,
    alpha: Scalar | None = None,
    weights: Elements | None = None,
    where: ElementMask | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Focal loss of independent yes/no outputs.

    For detectors, where almost every output is an easy no. With one class out of many use `focal_loss`.

    With p = sigmoid(z) and target t, the loss of an element is::

        l = α_t (1 − p_t)^γ (t log(1 + exp(−z)) + (1−t) log(1 + exp z))

    where p_t = p t + (1−p)(1−t), and α_t = α t + (1−α)(1−t), or 1 without α. The power is taken in log space: values
    and derivatives are finite for every γ.

    Args:
        logits: any shape, any floating dtype.
        targets: probabilities of yes, the shape of `logits`, any floating dtype.
        gamma: γ ≥ 0, scalar; 0 is binary cross entropy.
        alpha: α in [0, 1], the weight of yes against no; None weighs both by 1.
        weights: weights of the elements, the shape of `logits`.
        where: boolean, the shape of `logits`; elements where it is false are not read.
        reduction: "mean", "sum", "none" or "parts". Detectors often take "sum" and divide by the number of objects.

    Returns:
        float32 (float64 for float64 inputs): a scalar, the shape of `logits` for "none", or a `MeanParts`.

    Raises:
        TypeError: a dtype is wrong; labels 0 and 1 must be cast to a floating dtype.
        ValueError: a shape, `gamma`, `alpha` or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(f"{jaxce.binary_focal_loss(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0]), alpha=0.25):.4f}")
        0.0219

    References:
        Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    inputs = check_elements("logits", logits, targets, weights, where)
    gamma = check_scalar("gamma", gamma, low=0)
    alpha = None if alpha is None else check_scalar("alpha", alpha, low=0, high=1)
    check_reduction(reduction)
    return _binary_focal_loss(inputs, gamma, alpha, reduction=reduction)


@_core
def _binary_focal_loss(
    inputs: ElementInputs, gamma: HeldArray, alpha: HeldArray | None, *, reduction: str
) -> Array | MeanParts:
    inputs = aligned(inputs)
    z, t, dtype = _read(inputs)
    losses = _focal_losses((z, t, gamma.astype(dtype) * jnp.ones_like(z)))
    if alpha is not None:
        alpha = alpha.astype(dtype)
        losses *= alpha * t + (1 - alpha) * (1 - t)
    return _reduce(losses, inputs, dtype, reduction)


# The inputs of the rules of single numbers, all of one shape: z, t, and the weight of yes if there is one, or γ.
_Elements = tuple[Array, Array, Any]


def _binary(elements: _Elements) -> Array:
    """The sum positive · t · softplus(−z) + (1−t) · softplus(z), where no mass on an infinite distance is 0."""
    z, t, positive = elements
    yes, no = _distances(z)
    yes = yes if positive is None else positive * yes
    return t * _where_any(t, yes) + (1 - t) * _where_any(1 - t, no)


def _pull_binary(elements: _Elements, _: Array, d_losses: Array) -> _Elements:
    """(1−t) σ(z) − positive · t σ(−z), and the distances themselves, from the inputs alone."""
    z, t, positive = elements
    (p, q), (yes, no) = _sigmoids(z), _distances(z)
    d_positive = None
    if positive is not None:
        d_positive = d_losses * t * _where_any(t, yes)
        q, yes = positive * q, positive * yes
    d_targets = d_losses * (_where_any(t, yes) - _where_any(1 - t, no))
    return d_losses * ((1 - t) * p - t * q), d_targets, d_positive


def _focal(elements: _Elements) -> Array:
    """The binary losses times (1 − p_t)^γ."""
    z, t, gamma = elements
    return jnp.exp(gamma * _log_miss(z, t)) * _binary((z, t, None))


def _pull_focal(elements: _Elements, _: Array, d_losses: Array) -> _Elements:
    return jax.vjp(_focal, elements)[1](d_losses)[0]


def _some_at_a_time(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """The function of trees of arrays of one shape. A CPU would write out, whole, most of what it makes on the way."""

    def run(*trees: Any) -> _Result:
        shape = trees[0][0].shape

        def by_chunks(*trees: Any) -> _Result:
            flat = jax.tree.map(jnp.ravel, trees)
            results = over_chunks(lambda chunk: function(*chunk), flat, _ELEMENTS_AT_A_TIME)
            return jax.tree.map(lambda array: array.reshape(shape), results)

        are_own = is_local.value and not is_explicit(trees) and all(isinstance(size, int) for size in shape)
        are_many = are_own and _ELEMENTS_AT_A_TIME < math.prod(shape) < 2**31  # by the last number of an int32
        return on_cpu(by_chunks, function)(*trees) if are_many else function(*trees)

    return run


_binary_losses = rule(_some_at_a_time(_binary), _some_at_a_time(_pull_binary))
_focal_losses = rule(_some_at_a_time(_focal), _some_at_a_time(_pull_focal))


@jax.custom_jvp
def _distances(z: Array) -> tuple[Array, Array]:
    """−log σ(z) and −log σ(−z): exact where either is small, and at ±inf."""
    rest = jnp.log1p(jnp.exp(-_size(z)))
    return jnp.maximum(-z, 0) + rest, jnp.maximum(z, 0) + rest


@_distances.defjvp
def _push_distances(primals, tangents):
    p, q = _sigmoids(*primals)
    return _distances(*primals), (-tangents[0] * q, tangents[0] * p)


@jax.custom_jvp
def _sigmoids(z: Array) -> tuple[Array, Array]:
    """σ(z) and σ(−z), each with all of its digits."""
    e = jnp.exp(-_size(z))
    large = 1 / (1 + e)
    return jnp.where(z >= 0, large, e * large), jnp.where(z >= 0, e * large, large)


@_sigmoids.defjvp
def _push_sigmoids(primals, tangents):
    p, q = _sigmoids(*primals)
    slope = tangents[0] * p * q
    return (p, q), (slope, -slope)


def _size(z: Array) -> Array:
    """|z|, with a derivative of 1 at 0."""
    return jnp.where(z >= 0, z, -z)


def _where_any(mass: Array, distance: Array) -> Array:
    """The distance, or 0 where it is infinite and there is no mass."""
    return jnp.where((mass == 0) & jnp.isposinf(distance), 0, distance)


def _log_miss(z: Array, t: Array) -> Array:
    """log(1 − p_t), where 1 − p_t = t σ(−z) + (1−t) σ(z) may be far below the smallest float.

    With s = |z| and τ the target's mass on the side that z leans to, 1 − p_t = σ(s) ((1−τ) + τ exp(−s)). The bracket is
    taken as it stands where 1−τ leads, and as exp(−s) (1 + (1−τ) expm1(s)) where exp(−s) does: so hard targets are
    exact.
    """
    leans_to_yes, s = z >= 0, _size(z)
    tau, rest = jnp.where(leans_to_yes, t, 1 - t), jnp.where(leans_to_yes, 1 - t, t)
    e = jnp.exp(-s)
    wrong = rest > e
    as_is = jnp.log(jnp.where(wrong, rest + tau * e, 1))
    capped = jnp.where(wrong | (s > 80), 80, s)  # with more, 1−τ is 0 here
    factored = jnp.log1p(jnp.where(wrong, 0, rest * jnp.expm1(capped))) - s
    log_miss = jnp.where(wrong, as_is, factored) - jnp.log1p(e)
    return jnp.maximum(log_miss, jnp.finfo(z.dtype).min / 4)  # γ = 0 times a finite number


@overload
def mse_loss(
    predictions: Elements, targets: Elements, *, reduction: ToArray = ..., **options: Unpack[RowOptions]
) -> Array: ...
@overload
def mse_loss(
    predictions: Elements, targets: Elements, *, reduction: ToParts, **options: Unpack[RowOptions]
) -> MeanParts: ...
@one_program
def mse_loss(
    predictions: Elements,
    targets: Elements,
    *,
    weights: Elements | None = None,
    where: ElementMask | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Squared error.

    A regression loss. As a loss for classification, against one-hot targets, it is a baseline: it punishes outputs that
    are too far on the right side, which cross entropy does not.

    The loss of an element is::

        l = (prediction − target)²

    Args:
        predictions: any shape, any floating dtype.
        targets: the shape of `predictions`, any floating dtype. Nothing is broadcast: (N, 1) against (N,) is an error.
        weights: weights of the elements, the same shape.
        where: boolean, the same shape; elements where it is false are not read.
        reduction: "mean" (over elements that count), "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs): a scalar, the shape of `predictions` for "none", or a `MeanParts`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(jaxce.mse_loss(jnp.array([3.0, 0.0]), jnp.array([1.0, -1.0])))
        2.5

    References:
        Fleuret, EE-559 Deep Learning, lecture 5.1: Cross-entropy loss, 2018.
    """
    inputs = check_elements("predictions", predictions, targets, weights, where)
    check_reduction(reduction)
    return mse_loss_core(inputs, reduction=reduction)


@_core
def mse_loss_core(inputs: ElementInputs, *, reduction: str) -> Array | MeanParts:
    """The jitted half of `mse_loss`."""
    inputs = aligned(inputs)
    predictions, targets, dtype = _read(inputs)
    return _reduce(jnp.square(predictions - targets), inputs, dtype, reduction)


@overload
def l1_loss(
    predictions: Elements, targets: Elements, *, reduction: ToArray = ..., **options: Unpack[RowOptions]
) -> Array: ...
@overload
def l1_loss(
    predictions: Elements, targets: Elements, *, reduction: ToParts, **options: Unpack[RowOptions]
) -> MeanParts: ...
@one_program
def l1_loss(
    predictions: Elements,
    targets: Elements,
    *,
    weights: Elements | None = None,
    where: ElementMask | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts:
    """Absolute error.

    A regression loss that outliers move less than `mse_loss`. Its gradient where prediction and target agree is 0.

    The loss of an element is::

        l = |prediction − target|

    Args:
        predictions: any shape, any floating dtype.
        targets: the shape of `predictions`, any floating dtype. Nothing is broadcast: (N, 1) against (N,) is an error.
        weights: weights of the elements, the same shape.
        where: boolean, the same shape; elements where it is false are not read.
        reduction: "mean" (over elements that count), "sum", "none" or "parts".

    Returns:
        float32 (float64 for float64 inputs): a scalar, the shape of `predictions` for "none", or a `MeanParts`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(jaxce.l1_loss(jnp.array([3.0, 0.0]), jnp.array([1.0, -1.0])))
        1.5

    References:
        PyTorch's `torch.nn.L1Loss` means the same.
    """
    inputs = check_elements("predictions", predictions, targets, weights, where)
    check_reduction(reduction)
    return l1_loss_core(inputs, reduction=reduction)


@_core
def l1_loss_core(inputs: ElementInputs, *, reduction: str) -> Array | MeanParts:
    """The jitted half of `l1_loss`."""
    inputs = aligned(inputs)
    predictions, targets, dtype = _read(inputs)
    errors = predictions - targets
    return _reduce(errors * jnp.sign(errors), inputs, dtype, reduction)  # with the derivative 0 at 0; abs has 1


def _read(inputs: ElementInputs, *others: HeldArray | None) -> tuple[Array, Array, DTypeLike]:
    """Values and targets in the dtype of the arithmetic, which comes with them; 0 where they do not count."""
    report_elements(inputs)
    dtype = accumulator(inputs.values, inputs.targets, inputs.weights, *others)
    values, targets = (silence(inputs.where, x.astype(dtype)) for x in (inputs.values, inputs.targets))
    return values, targets, dtype


def with_ndim(factor: HeldArray, ndim: int) -> Array:
    """A factor that broadcasts, with leading axes of length 1 for those that it lacks."""
    return jnp.expand_dims(factor, range(ndim - factor.ndim))


def _reduce(losses: Array, inputs: ElementInputs, dtype: DTypeLike, reduction: str) -> Array | MeanParts:
    weights = None if inputs.weights is None else silence(inputs.where, inputs.weights.astype(dtype))
    return reduce_rows(silence(inputs.where, losses), inputs.where, weights, reduction=reduction)
