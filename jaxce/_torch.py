"""What `torch` needs beside the losses of `jaxce`: PyTorch's arguments and words, and what is PyTorch's alone."""

import functools
import math
import re
import warnings
from collections.abc import Callable
from typing import Literal, ParamSpec, SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxce._arguments import as_array, check_axis, check_floating, check_name
from jaxce._conventions import accumulator
from jaxce._elementwise import binary_cross_entropy_core, with_ndim
from jaxce._formula import reduce_formula
from jaxce._inputs import ClassInputs, ElementInputs, check_classes, holds
from jaxce._logits import LinearLogits
from jaxce._reduction import MeanParts, reduce_rows
from jaxce._rows import Rows
from jaxce._split import aligned
from jaxce._types import ArrayLike, ClassVector, HeldArray, PerRow

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
Reduction = Literal["none", "mean", "sum"]
BatchReduction = Literal["none", "mean", "sum", "batchmean"]

_NAMES = {
    "logits": "input",
    "log_probs": "input",
    "predictions": "input",
    "targets": "target",
    "class_weights": "weight",
    "hidden": "input",
    "kernel": "linear_weight",
    "bias": "linear_bias",
    "weights": "weight",
    "axis": "dim",
}
_OPTIONS_OF_JAXCE = re.compile(r"`where`|where=|\bdim=|Weights of rows")


def speaks_torch(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Words the errors in the arguments of PyTorch, and leaves out advice that only `jaxce` itself can follow."""

    @functools.wraps(function)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("`"):
                raise
            words = re.sub(r"\b({})\b".format("|".join(_NAMES)), lambda match: _NAMES[match[0]], str(error))
            fact, *advice = re.split(r"(?<=[.?]) (?=[A-Z])", words)
            advice = [sentence for sentence in advice if not _OPTIONS_OF_JAXCE.search(sentence)]
            raise type(error)(" ".join([fact, *advice])) from None

    return wrapper


def check_reduction(
    reduction: str,
    size_average: bool | None,
    reduce: bool | None,
    names: object = Reduction,
) -> str:
    """The name of the reduction here: "ratio" is the mean that is NaN over nothing."""
    check_name("reduction", reduction, names)
    if size_average is not None or reduce is not None:
        by_flags = "sum" if size_average is False else "mean"
        reduction = "none" if reduce is False else by_flags
    return "ratio" if reduction == "mean" else reduction


def class_axis(logits: HeldArray) -> int:
    """The axis of the classes: behind that of the samples, if there is one."""
    return 1 if logits.ndim > 1 else 0


def without_batch(target: HeldArray, logits_shape: tuple[int, ...]) -> HeldArray:
    """The label of a single sample, which may be (1,); of logits (1,) that is the shape of probabilities."""
    is_label = jnp.issubdtype(target.dtype, jnp.integer) and target.shape == (1,) != logits_shape
    return target.reshape(()) if is_label and len(logits_shape) == 1 else target


def ignorable(ignore_index: int | None, labels: HeldArray) -> int | None:
    """None where labels cannot be `ignore_index`, as bytes cannot be PyTorch's −100: then nothing is ignored."""
    if ignore_index is None or not jnp.issubdtype(labels.dtype, jnp.integer):
        return ignore_index
    return ignore_index if holds(labels, ignore_index) else None


def check_positions(
    hidden: HeldArray,
    kernel: HeldArray,
    bias: ClassVector | None,
    targets: HeldArray,
    class_weights: ClassVector | None,
    ignore_index: int | None,
) -> tuple[ClassInputs, HeldArray | None]:
    """Checks the arguments of a head with a weight for each position, as those of `cross_entropy`, and its bias."""
    num_classes, *positions, _ = kernel.shape
    if bias is not None:
        bias = check_floating("bias", bias)
        if bias.shape != (num_classes, *positions):
            raise ValueError(
                f"`linear_bias` must have shape {(num_classes, *positions)}, that of `linear_weight` without its last "
                f"axis; got {bias.shape}."
            )
    one_number = np.zeros((), accumulator(hidden, kernel))
    logits = np.broadcast_to(one_number, (hidden.shape[0], num_classes, *positions))
    inputs = check_classes(
        logits, targets, axis=1, class_weights=class_weights, ignore_index=ignore_index, name="hidden · kernel"
    )
    return inputs, bias


@functools.partial(jax.jit, static_argnames=("ignore_index", "reduction"), inline=True)
def over_positions(
    loss: Callable[[Rows], PerRow],
    arrays: tuple[HeldArray, HeldArray, HeldArray | None, HeldArray, HeldArray | None],
    *,
    ignore_index: int | None,
    reduction: str,
) -> Array:
    """The heads of the positions, one after another, so that their memory is that of one."""
    hidden, kernel, bias, targets, class_weights = arrays
    num_classes, *positions, width = kernel.shape
    number = math.prod(positions)
    kernels = jnp.moveaxis(kernel.reshape(num_classes, number, width), 0, -1)
    biases = None if bias is None else bias.reshape(num_classes, number).T
    targets = jnp.moveaxis(targets.reshape(*targets.shape[: -len(positions)], number), -1, 0)

    def at_position(slices: tuple[Array, Array | None, Array]) -> Array | MeanParts:
        kernel, bias, targets = slices
        # The logits are made again: else the gradient of hidden would be kept for every position.
        logits = LinearLogits(hidden, kernel, bias=bias, recompute=True)
        inputs = check_classes(
            logits, targets, class_weights=class_weights, ignore_index=ignore_index, may_be_lazy=True
        )
        return reduce_formula(loss, inputs, reduction="none" if reduction == "none" else "parts")

    reduced = jax.lax.map(at_position, (kernels, biases, targets))
    if reduction == "none":
        return reduced.T.reshape(hidden.shape[0], *positions)
    parts = jax.tree.map(jnp.sum, reduced)
    return parts.total if reduction == "sum" else parts.total / parts.weight


@functools.partial(jax.jit, static_argnames="reduction", inline=True)
def weighted_binary_core(
    inputs: ElementInputs, weight: HeldArray | None, pos_weight: HeldArray | None, *, reduction: str
) -> Array | MeanParts:
    """The jitted half of `binary_cross_entropy_with_logits`."""
    inputs, weight, pos_weight = aligned((inputs, weight, pos_weight))
    losses = binary_cross_entropy_core(inputs, pos_weight, None, reduction="none")
    if weight is not None:
        losses *= with_ndim(weight, losses.ndim).astype(losses.dtype)
    return reduce_rows(losses, None, reduction=reduction)


@functools.partial(jax.jit, static_argnames=("log_target", "by_batch", "reduction"), inline=True)
def kl_div_core(
    inputs: ElementInputs, *, log_target: bool, by_batch: bool, reduction: Literal["none", "sum", "ratio"]
) -> Array:
    """The jitted half of `kl_div`."""
    from jax.scipy.special import xlogy  # not part of `import jax`

    inputs = aligned(inputs)
    dtype = accumulator(inputs.values, inputs.targets)
    log_probs, target = jnp.asarray(inputs.values, dtype), jnp.asarray(inputs.targets, dtype)
    mass = jnp.exp(target) if log_target else target
    negative_entropy = mass * jnp.maximum(target, jnp.finfo(dtype).min) if log_target else xlogy(target, target)
    losses = negative_entropy - mass * jnp.where((mass == 0) & jnp.isneginf(log_probs), 0, log_probs)
    reduced = reduce_rows(losses, None, reduction=reduction)
    return reduced / losses.shape[0] if by_batch and losses.ndim else reduced


def softmax_along(
    function: Callable[..., Array],
    input: ArrayLike,
    dim: SupportsIndex | None,
    stacklevel: int,
    dtype: DTypeLike | None,
) -> Array:
    """Calls a softmax along `dim`."""
    input = check_floating("logits", input) if dtype is None else as_array("logits", input)
    if dim is None:
        dim = 0 if input.ndim in (0, 1, 3) else 1
        warnings.warn(
            f"No `dim` was given, and {dim} was chosen for {input.ndim} axes, as PyTorch does. Pass dim={dim}.",
            stacklevel=stacklevel + 1,
        )
    dim = check_axis(dim, "logits", (1,) if input.ndim == 0 else input.shape)
    return _apply(input, function=function, dim=dim, dtype=None if dtype is None else np.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("function", "dim", "dtype"), inline=True)
def _apply(input: HeldArray, *, function: Callable[..., Array], dim: int, dtype: np.dtype | None) -> Array:
    values = input.astype(accumulator(input) if dtype is None else dtype)
    return function(values.reshape(1), axis=dim).reshape(()) if values.ndim == 0 else function(values, axis=dim)
