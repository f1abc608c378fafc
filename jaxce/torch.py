"""`torch.nn.functional`'s losses by their own names: the same argument order, defaults, divisors and NaN.

For code that is ported line by line, and for checking a port. Classes are on axis 1 (axis 0 of a single sample),
`ignore_index` is −100, and the mean over nothing is NaN. What stays JAX's:

- results are at least float32, and any integer dtype will do for labels;
- a label out of range is an error for NumPy targets and a NaN loss for all others;
- shapes that PyTorch would broadcast with a warning are an error;
- logits of no classes are an error, for probabilities too;
- 0 times an infinite distance is 0 (PyTorch: NaN), and an ignored row has gradient 0 even if it holds NaN.
"""

from __future__ import annotations

from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxce._arguments import (
    as_array,
    check_broadcast,
    check_floating,
    check_integer,
    check_power,
    check_scalar,
    present,
)
from jaxce._elementwise import l1_loss_core, mse_loss_core
from jaxce._formula import reduce_formula
from jaxce._inputs import check_classes, check_elements
from jaxce._logits import LinearLogits
from jaxce._losses import CrossEntropy
from jaxce._scores import multi_margin_loss_core, nll_loss_core
from jaxce._torch import (
    BatchReduction,
    Reduction,
    check_positions,
    check_reduction,
    class_axis,
    ignorable,
    kl_div_core,
    over_positions,
    softmax_along,
    speaks_torch,
    weighted_binary_core,
    without_batch,
)
from jaxce._types import ArrayLike, ClassVector, Distributions, Elements, Hidden, Labels, Logits, Scalar


@speaks_torch
def cross_entropy(
    input: Logits,
    target: Labels | Distributions,
    weight: ClassVector | None = None,
    size_average: bool | None = None,
    ignore_index: SupportsIndex = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: Scalar = 0.0,
) -> Array:
    """`torch.nn.functional.cross_entropy`. See `jaxce.cross_entropy` for JAX's conventions and more options.

    The loss of a row is::

        l = Σ_c w_c ((1−ε) t_c + ε/C) (−log p_c)

    where for a label y the first part is (1−ε) w_y (−log p_y). The mean divides by Σ w_y over labels that count, and by
    the number of rows for probabilities.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, …), floating.
        target: labels, (), (N,) or (N, d1, …), integer; or probabilities of `input`'s shape, floating. The label of a
            single sample may be (1,).
        weight: (C,), the class weights.
        size_average: deprecated by PyTorch in favour of `reduction`.
        ignore_index: label of rows that do not count.
        reduce: deprecated by PyTorch in favour of `reduction`.
        reduction: "none", "mean" or "sum".
        label_smoothing: ε in [0, 1].

    Returns:
        float32 (float64 for float64 inputs): a scalar, or for "none" the shape of `input` without its classes. NaN for
        the mean over nothing.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, `reduction`, `label_smoothing` or a NumPy label is wrong; `ignore_index` ≥ 0 with
            probabilities.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> logits = jnp.array([[-1.0, -3.0, 4.0], [-3.0, 3.0, -1.0]])
        >>> print(f"{jaxce.torch.cross_entropy(logits, jnp.array([0, 1])):.4f}")
        2.5141

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html
    """
    how = check_reduction(reduction, size_average, reduce)
    ignore_index = check_integer("ignore_index", ignore_index)
    logits, targets = as_array("logits", input), as_array("targets", target)
    is_distribution = jnp.issubdtype(targets.dtype, jnp.floating)
    inputs = check_classes(
        logits,
        without_batch(targets, logits.shape),
        axis=class_axis(logits),
        class_weights=weight,
        ignore_index=None if is_distribution and ignore_index < 0 else ignorable(ignore_index, targets),
    )
    label_smoothing = check_scalar("label_smoothing", label_smoothing, low=0, high=1)
    return reduce_formula(CrossEntropy(present(label_smoothing)), inputs, reduction=how)


@speaks_torch
def linear_cross_entropy(
    input: Hidden,
    linear_weight: ArrayLike,
    target: Labels | Distributions,
    *,
    linear_bias: ClassVector | None = None,
    weight: ClassVector | None = None,
    reduction: Reduction = "mean",
    ignore_index: SupportsIndex | None = None,
    label_smoothing: Scalar = 0.0,
) -> Array:
    """`torch.nn.functional.linear_cross_entropy`, without its `options`. See `jaxce.linear_cross_entropy`.

    The loss is that of `cross_entropy` on input · linear_weightᵀ + linear_bias, whose logits are never stored.

    Args:
        input: (D,) or (N, D), floating.
        linear_weight: (C, D), floating; or (C, d1, …, D) for a prediction at each of d1 · … positions, which are taken
            one after another.
        target: labels, () or (N,), integer, or (N, d1, …); or probabilities, (C,), (N, C) or (N, C, d1, …), floating.
            The label of a single sample may be (1,).
        linear_bias: (C,) or (C, d1, …), floating.
        weight: (C,), the class weights.
        reduction: "none", "mean" or "sum". The mean is that over all positions.
        ignore_index: label of rows that do not count; None is −100 for labels.
        label_smoothing: ε in [0, 1].

    Returns:
        float32 (float64 for float64 inputs), as `cross_entropy`. NaN for the mean over nothing.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, `reduction`, `label_smoothing` or a NumPy label is wrong; `ignore_index` with
            probabilities.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> loss = jaxce.torch.linear_cross_entropy(jnp.ones((4, 2)), jnp.eye(1000, 2), jnp.array([0, 1, 2, -100]))
        >>> print(f"{loss:.4f}")
        6.2445

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.linear_cross_entropy.html
    """
    how = check_reduction(reduction, None, None)
    hidden, kernel = check_floating("input", input), check_floating("linear_weight", linear_weight)
    targets = as_array("targets", target)
    num_axes = (1, 2) if kernel.ndim == 2 else (2,)
    if kernel.ndim < 2 or hidden.ndim not in num_axes or kernel.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            "`linear_weight` must have shape (C, D), or (C, d1, …, D) with `input` of shape (N, D), with D the last "
            f"axis of `input`; got {kernel.shape} with `input` of shape {hidden.shape}."
        )
    if ignore_index is None:
        ignored = None if jnp.issubdtype(targets.dtype, jnp.floating) else ignorable(-100, targets)
    else:
        ignored = ignorable(check_integer("ignore_index", ignore_index), targets)
    label_smoothing = check_scalar("label_smoothing", label_smoothing, low=0, high=1)
    loss = CrossEntropy(present(label_smoothing))
    if kernel.ndim > 2:
        inputs, bias = check_positions(hidden, kernel, linear_bias, targets, weight, ignored)
        arrays = (hidden, kernel, bias, inputs.targets, inputs.class_weights)
        return over_positions(loss, arrays, ignore_index=inputs.ignore_index, reduction=how)
    inputs = check_classes(
        LinearLogits(hidden, kernel.T, bias=linear_bias),
        without_batch(targets, (*hidden.shape[:-1], kernel.shape[0])),
        class_weights=weight,
        ignore_index=ignored,
        may_be_lazy=True,
    )
    return reduce_formula(loss, inputs, reduction=how)


@speaks_torch
def nll_loss(
    input: Logits,
    target: Labels,
    weight: ClassVector | None = None,
    size_average: bool | None = None,
    ignore_index: SupportsIndex = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Array:
    """`torch.nn.functional.nll_loss`. See `jaxce.nll_loss`.

    The loss of a row is::

        l = −w_y · input[y]

    The mean divides by Σ w_y over labels that count.

    Args:
        input: log-probabilities, (C,), (N, C) or (N, C, d1, …), floating.
        target: labels, (), (N,) or (N, d1, …), integer. That of a single sample may be (1,).
        weight: (C,), the class weights.
        size_average: deprecated by PyTorch in favour of `reduction`.
        ignore_index: label of rows that do not count.
        reduce: deprecated by PyTorch in favour of `reduction`.
        reduction: "none", "mean" or "sum".

    Returns:
        float32 (float64 for float64 inputs): a scalar, or for "none" the shape of `input` without its classes.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, `reduction` or a NumPy label is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(f"{jaxce.torch.nll_loss(jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([1])):.4f}")
        0.6931

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.nll_loss.html
    """
    how = check_reduction(reduction, size_average, reduce)
    ignore_index = check_integer("ignore_index", ignore_index)
    log_probs, targets = as_array("log_probs", input), as_array("targets", target)
    inputs = check_classes(
        log_probs,
        targets.reshape(()) if log_probs.ndim == 1 and targets.shape == (1,) else targets,
        axis=class_axis(log_probs),
        class_weights=weight,
        ignore_index=ignorable(ignore_index, targets),
        labels_only="nll_loss",
        name="log_probs",
    )
    return nll_loss_core(inputs, reduction=how)


@speaks_torch
def multi_margin_loss(
    input: Logits,
    target: Labels,
    p: SupportsIndex = 1,
    margin: Scalar = 1.0,
    weight: ClassVector | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Array:
    """`torch.nn.functional.multi_margin_loss`. See `jaxce.multi_margin_loss`.

    The loss of a row is::

        l = (w_y / C) Σ_{i≠y} max(0, margin − input[y] + input[i])^p

    The mean divides by the number of rows.

    Args:
        input: scores, (C,) or (N, C), floating. A scalar is one score.
        target: labels, () or (N,), integer. That of one row may be () or (1,).
        p: 1 or 2.
        margin: scalar.
        weight: (C,), the class weights.
        size_average: deprecated by PyTorch in favour of `reduction`.
        reduce: deprecated by PyTorch in favour of `reduction`.
        reduction: "none", "mean" or "sum".

    Returns:
        float32 (float64 for float64 inputs): a scalar, or the shape of the labels for "none".

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, `p`, `margin`, `reduction` or a NumPy label is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(f"{jaxce.torch.multi_margin_loss(jnp.array([[0.1, 0.2, 0.4, 0.8]]), jnp.array([3])):.4f}")
        0.3250

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.multi_margin_loss.html
    """
    how = check_reduction(reduction, size_average, reduce)
    logits, targets = as_array("logits", input), as_array("targets", target)
    if logits.ndim > 2:
        raise ValueError(f"`input` must have shape (C,) or (N, C); got {logits.shape}.")
    shape = targets.shape
    logits = logits.reshape(1) if logits.ndim == 0 else logits
    if {logits.shape[:-1], shape} <= {(), (1,)}:
        targets = targets.reshape(logits.shape[:-1])
    inputs = check_classes(logits, targets, class_weights=weight, labels_only="multi_margin_loss")
    p = check_power(p)
    margin = check_scalar("margin", margin)
    loss = multi_margin_loss_core(inputs, margin, p=p, reduction=how)
    return loss.reshape(shape) if how == "none" else loss


@speaks_torch
def binary_cross_entropy_with_logits(
    input: Elements,
    target: Elements,
    weight: Scalar | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    pos_weight: Scalar | None = None,
) -> Array:
    """`torch.nn.functional.binary_cross_entropy_with_logits`. See `jaxce.binary_cross_entropy`.

    The loss of an element is::

        l = weight · (pos_weight · t log(1 + exp(−z)) + (1−t) log(1 + exp z))

    The mean divides by the number of elements, whatever the weights.

    Args:
        input: logits, any shape, floating.
        target: probabilities of yes, the shape of `input`, floating.
        weight: real, broadcasts to the shape of `input`.
        size_average: deprecated by PyTorch in favour of `reduction`.
        reduce: deprecated by PyTorch in favour of `reduction`.
        reduction: "none", "mean" or "sum".
        pos_weight: real, broadcasts to the shape of `input`.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or the shape of `input` for "none".

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(f"{jaxce.torch.binary_cross_entropy_with_logits(jnp.array([0.0, 2.0]), jnp.ones(2)):.4f}")
        0.4100

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.binary_cross_entropy_with_logits.html
    """
    how = check_reduction(reduction, size_average, reduce)
    inputs = check_elements("logits", input, target, None, None)
    weight = check_broadcast("weights", weight, inputs.values.shape)
    pos_weight = check_broadcast("pos_weight", pos_weight, inputs.values.shape)
    return weighted_binary_core(inputs, weight, pos_weight, reduction=how)


@speaks_torch
def mse_loss(
    input: Elements,
    target: Elements,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    weight: Elements | None = None,
) -> Array:
    """`torch.nn.functional.mse_loss`. See `jaxce.mse_loss`.

    The loss of an element is::

        l = weight · (input − target)²

    The mean divides by Σ weight.

    Args:
        input: any shape, floating.
        target: the shape of `input`, floating. PyTorch would broadcast with a warning; here it is an error.
        size_average: deprecated by PyTorch in favour of `reduction`.
        reduce: deprecated by PyTorch in favour of `reduction`.
        reduction: "none", "mean" or "sum".
        weight: the shape of `input`, real.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or the shape of `input` for "none".

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(jaxce.torch.mse_loss(jnp.array([3.0, 0.0]), jnp.array([1.0, -1.0])))
        2.5

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.mse_loss.html
    """
    how = check_reduction(reduction, size_average, reduce)
    return mse_loss_core(check_elements("predictions", input, target, weight, None), reduction=how)


@speaks_torch
def l1_loss(
    input: Elements,
    target: Elements,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    weight: Elements | None = None,
) -> Array:
    """`torch.nn.functional.l1_loss`. See `jaxce.l1_loss`.

    The loss of an element is::

        l = weight · |input − target|

    The mean divides by Σ weight.

    Args:
        input: any shape, floating.
        target: the shape of `input`, floating. PyTorch would broadcast with a warning; here it is an error.
        size_average: deprecated by PyTorch in favour of `reduction`.
        reduce: deprecated by PyTorch in favour of `reduction`.
        reduction: "none", "mean" or "sum".
        weight: the shape of `input`, real.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or the shape of `input` for "none".

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(jaxce.torch.l1_loss(jnp.array([3.0, 0.0]), jnp.array([1.0, -1.0])))
        1.5

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.l1_loss.html
    """
    how = check_reduction(reduction, size_average, reduce)
    return l1_loss_core(check_elements("predictions", input, target, weight, None), reduction=how)


@speaks_torch
def kl_div(
    input: Elements,
    target: Elements,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: BatchReduction = "mean",
    log_target: bool = False,
) -> Array:
    """`torch.nn.functional.kl_div`. From logits see `jaxce.distillation_loss`, which is more accurate.

    The loss of an element is::

        l = target · (log target − input)

    It is 0 where the target is 0. "mean" divides by the number of elements, which is not the divergence of a
    row; "batchmean" divides by the length of the first axis.

    Args:
        input: log-probabilities, any shape, floating.
        target: probabilities, or log-probabilities with `log_target`, the shape of `input`, floating.
        size_average: deprecated by PyTorch in favour of `reduction`.
        reduce: deprecated by PyTorch in favour of `reduction`.
        reduction: "none", "mean", "sum" or "batchmean".
        log_target: whether `target` holds logarithms.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or the shape of `input` for "none".

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or `reduction` is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> half, quarter = jnp.array([[0.5, 0.5]]), jnp.array([[0.25, 0.75]])
        >>> divergence = jaxce.torch.kl_div(jnp.log(quarter), half, reduction="batchmean")
        >>> print(f"{divergence:.4f}")
        0.1438

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.kl_div.html
    """
    how = check_reduction(reduction, size_average, reduce, names=BatchReduction)
    by_batch = reduction == "batchmean"
    how = "sum" if how == "batchmean" else how
    inputs = check_elements("predictions", input, target, None, None)
    return kl_div_core(inputs, log_target=bool(log_target), by_batch=by_batch, reduction=how)


@speaks_torch
def softmax(
    input: ArrayLike, dim: SupportsIndex | None = None, _stacklevel: int = 3, dtype: DTypeLike | None = None
) -> Float[Array, "*shape"]:
    """`torch.nn.functional.softmax`.

    Along `dim`::

        softmax(z)[c] = exp z_c / Σ_k exp z_k

    Args:
        input: any shape, floating.
        dim: the axis that sums to 1. None chooses 0 for 0, 1 and 3 axes and 1 otherwise, with PyTorch's warning.
        dtype: of the result and the arithmetic; None is float32, or float64 for float64.

    Returns:
        the shape of `input`.

    Raises:
        TypeError: `input` is not floating.
        ValueError: `dim` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(f"{jaxce.torch.softmax(jnp.array([1.0, 2.0, 3.0, 4.0]), dim=0)[3]:.4f}")
        0.6439

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softmax.html
    """
    return softmax_along(jax.nn.softmax, input, dim, _stacklevel, dtype)


@speaks_torch
def log_softmax(
    input: ArrayLike, dim: SupportsIndex | None = None, _stacklevel: int = 3, dtype: DTypeLike | None = None
) -> Float[Array, "*shape"]:
    """`torch.nn.functional.log_softmax`.

    Along `dim`::

        log_softmax(z)[c] = z_c − log Σ_k exp z_k

    Args:
        input: any shape, floating.
        dim: the axis whose exponentials sum to 1. None chooses as in `softmax`.
        dtype: of the result and the arithmetic; None is float32, or float64 for float64.

    Returns:
        the shape of `input`.

    Raises:
        TypeError: `input` is not floating.
        ValueError: `dim` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> print(f"{jaxce.torch.log_softmax(jnp.array([0.0, 0.0]), dim=0)[1]:.4f}")
        -0.6931

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.log_softmax.html
    """
    return softmax_along(jax.nn.log_softmax, input, dim, _stacklevel, dtype)
