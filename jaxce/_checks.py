"""What `jax.experimental.checkify` reports of values that are only known when the program runs.

A program with a check in it has an effect, which JAX neither exports nor dispatches by its fast path. So the checks are
part of a trace only where the caller asks for them. Every report names the argument, the value and its position.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxce._inputs import ClassInputs, ElementInputs, LabelInputs
from jaxce._logits import LinearLogits
from jaxce._split import is_explicit
from jaxce._targets import SparseTargets
from jaxce._types import ArrayLike, HeldArray

_are_checked = jax.make_user_context(False)  # part of what jit's caches go by


def debug_checks(enabled: bool = True) -> AbstractContextManager[None]:
    """Puts checks of values into what is traced inside of it, for `jax.experimental.checkify` to report.

    For finding the row that makes a loss NaN. A loss cannot raise for a value that is on a device: a wrong label makes
    its loss NaN. Inside of `with jaxce.debug_checks():`, a function under `checkify` returns an error instead, which
    names the argument, the value and its position, for labels outside [0, C), negative weights and masses, and NaN in
    logits; rows that do not count are not looked at. A function that was compiled outside is traced anew.

    Checks take time, and `jax.export` refuses them, so leave them out of finished programs. They report nothing of
    arrays that are split over an Explicit mesh, where `checkify` cannot carry its errors.

    Args:
        enabled: whether there are checks inside. False takes them out of a part.

    Returns:
        a context manager.

    Raises:
        TypeError: `enabled` is not a bool.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> from jax.experimental import checkify
        >>> loss = checkify.checkify(jax.jit(jaxce.cross_entropy))
        >>> with jaxce.debug_checks():
        ...     error, _ = loss(jnp.zeros((2, 3)), jnp.array([0, 5]))
        >>> print(error.get().partition(" (")[0])
        `targets` must be class indices in [0, 3); got 5 at position [1].

    References:
        https://docs.jax.dev/en/latest/debugging/checkify_guide.html
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"`enabled` must be True or False; got {type(enabled).__qualname__}.")
    return _are_checked(enabled)


def _looks(*inputs: object) -> bool:
    """Whether values are looked at. The errors of `checkify` cannot be split over an Explicit mesh."""
    return _are_checked.value and not is_explicit(*inputs)


def report_classes(inputs: ClassInputs) -> None:
    """Reports wrong labels, negative weights and masses, and NaN in rows that count."""
    if not _looks(inputs):
        return
    targets, counts = inputs.targets, inputs.where
    if isinstance(targets, SparseTargets):
        classes, in_range = read_listed(targets, inputs)
        masses, listed = jnp.asarray(targets.masses), _along(counts, inputs.logits.ndim - 1)
        wanted = f"class indices in [0, {inputs.classes.number})"
        _report("targets.classes", wanted, classes, ~in_range & (masses != 0), listed)
        _report("targets.masses", "≥ 0", masses, ~(masses >= 0), listed)
    elif not isinstance(targets, LinearLogits):
        targets = jnp.asarray(targets)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            labels, counts, in_range = read_labels(targets, counts, inputs)
            _report("targets", f"class indices in [0, {inputs.classes.number})", labels, ~in_range, counts)
        elif inputs.targets_name == "targets":
            _report("targets", "masses ≥ 0", targets, ~(targets >= 0), _real_and_counted(inputs, counts))
    _report_weights(inputs.weights, counts)
    if inputs.class_weights is not None:
        class_weights = jnp.asarray(inputs.class_weights)
        _report("class_weights", "≥ 0", class_weights, ~(class_weights >= 0), _is_real(inputs))
    named = [(inputs.name, inputs.logits)]
    if inputs.targets_name != "targets" and not isinstance(inputs.targets, SparseTargets):
        named.append((inputs.targets_name, inputs.targets))
    for name, logits in named:
        if not isinstance(logits, LinearLogits):
            _report_nan(name, logits, _real_and_counted(inputs, counts))
            continue
        prefix = "" if logits is inputs.logits else f"{name}."
        _report_nan(f"{prefix}hidden", logits.hidden, _along(counts, logits.ndim - 1))
        _report_nan(f"{prefix}kernel", logits.kernel, None)


def report_labels(inputs: LabelInputs) -> None:
    """Reports wrong labels."""
    if _looks(inputs):
        labels = widen(jnp.asarray(inputs.targets))
        wrong = (labels < 0) | (labels >= inputs.num_classes)
        _report("targets", f"class indices in [0, {inputs.num_classes})", labels, wrong, inputs.where)


def report_elements(inputs: ElementInputs) -> None:
    """Reports negative weights, and NaN in elements that count."""
    if _looks(inputs):
        _report_weights(inputs.weights, inputs.where)
        _report_nan(inputs.name, inputs.values, inputs.where)


def report_losses(losses: HeldArray, weights: HeldArray | None, where: HeldArray | None) -> None:
    """Reports negative weights alone: a loss may be anything."""
    if _looks(losses, weights, where):
        _report_weights(weights, where)


def read_labels(labels: Array, counts: HeldArray | None, inputs: ClassInputs) -> tuple[Array, Array | None, Array]:
    """Labels of a dtype that no class number overflows, the rows that count, and which of the labels are classes."""
    mask = None if counts is None else jnp.asarray(counts)
    if not _is_cut(labels):
        labels = widen(labels)  # first, as XLA:CPU may compare labels of 2 bits wrongly
    if inputs.ignore_index is not None:
        with _without_cutting(labels):
            kept = labels != np.asarray(inputs.ignore_index, labels.dtype)  # of a Python number JAX would make an int32
        mask = kept if mask is None else mask & kept
    labels = widen(labels)
    return labels, mask, (labels >= 0) & (labels < inputs.classes.number)


def read_listed(targets: SparseTargets, inputs: ClassInputs) -> tuple[Array, Array]:
    """Listed classes of a dtype that no class number overflows, and which of them are classes."""
    classes = widen(jnp.asarray(targets.classes))
    return classes, (classes >= 0) & (classes < inputs.classes.number)


def widen(labels: Array) -> Array:
    """Labels of a dtype that no class number overflows, and that JAX does not cut."""
    if labels.dtype.itemsize < 4:
        return labels.astype(jnp.int32)
    if not _is_cut(labels):
        return labels
    with _without_cutting(labels):
        fits = (labels >= 0) & (labels <= np.asarray(np.iinfo(np.int32).max, labels.dtype))
        return jnp.where(fits, labels, jnp.zeros_like(labels)).astype(jnp.int32) - (~fits).astype(jnp.int32)


def _is_cut(labels: Array) -> bool:
    """Whether they have 64 bits, of which JAX's operations take 32: they were made where x64 was on, and it is off."""
    return labels.dtype != jax.dtypes.canonicalize_dtype(labels.dtype)


def _without_cutting(labels: Array) -> AbstractContextManager[None]:
    return jax.enable_x64(True) if _is_cut(labels) else nullcontext()


def _along(counts: HeldArray | None, axis: int) -> Array | None:
    """The mask of rows with an axis for the classes."""
    return None if counts is None else jnp.expand_dims(counts, axis)


def _is_real(inputs: ClassInputs) -> Array | None:
    """Which classes are no padding, or None."""
    size = inputs.logits.shape[inputs.axis]
    real = inputs.classes.real(size)
    return None if real is None else jnp.arange(size, dtype=jnp.int32) < real


def _real_and_counted(inputs: ClassInputs, counts: HeldArray | None) -> Array | None:
    """The mask of rows with an axis for the classes, and without padding."""
    counts, is_real = _along(counts, inputs.axis), _is_real(inputs)
    if is_real is None:
        return counts
    ndim = len(inputs.logits.shape)
    is_real = jnp.expand_dims(is_real, [axis for axis in range(ndim) if axis != inputs.axis])
    return is_real if counts is None else is_real & counts


def _report_weights(weights: HeldArray | None, counts: HeldArray | None) -> None:
    if weights is not None:
        weights = jnp.asarray(weights)
        _report("weights", "≥ 0", weights, ~(weights >= 0), counts)


def _report_nan(name: str, values: ArrayLike, counts: HeldArray | None) -> None:
    values = jnp.asarray(values)
    _report(name, "numbers", values, jnp.isnan(values), counts)


def _report(name: str, wanted: str, values: Array, wrong: Array, counts: HeldArray | None) -> None:
    from jax.experimental import checkify  # not part of `import jax`

    if values.size == 0:
        return
    wrong = wrong if counts is None else wrong & counts
    position = jnp.argmax(wrong.ravel())
    checkify.debug_check(
        ~jnp.any(wrong),
        f"`{name}` must be {wanted}; got {{value}} at position {{position}}.",
        value=values.ravel()[position],
        position=jnp.array(jnp.unravel_index(position, values.shape), jnp.int32),
    )
