"""Checked arguments in the form that the losses compute on.

Inside `jit`: the class axis goes last, labels become safe to index with, masks and `ignore_index` become one mask of
the rows that count, weights take the dtype of the arithmetic.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxce._inputs import ClassInputs
from jaxce._types import MaskPerRow, PerRow


class Rows(NamedTuple):
    """What a loss over classes computes on. Rows that do not count have label 0 and weight 0.

    `counts` and `valid` are None where every row counts and no label can be wrong.
    """

    logits: Float[Array, "*rows classes"]
    targets: Integer[Array, "*rows"] | Float[Array, "*rows classes"]
    counts: MaskPerRow | None
    valid: MaskPerRow | None
    weights: PerRow | None
    class_weights: Float[Array, " classes"] | None

    @property
    def dtype(self) -> Any:
        """The dtype of the arithmetic."""
        return accumulator(self.logits, self.targets, self.weights, self.class_weights)

    @property
    def has_labels(self) -> bool:
        """Whether the targets are class indices, and not distributions."""
        return jnp.issubdtype(self.targets.dtype, jnp.integer)

    @property
    def label_weights(self) -> PerRow | None:
        """The class weight of every row's label; None without class weights or labels."""
        if self.class_weights is None or not self.has_labels:
            return None
        return silence(self.counts, self.class_weights[self.targets])


def read_classes(inputs: ClassInputs) -> Rows:
    """Puts the arguments of a loss over classes into the form that the losses compute on."""
    logits = jnp.moveaxis(jnp.asarray(inputs.logits), inputs.axis, -1)
    targets = jnp.asarray(inputs.targets)
    counts = inputs.where
    valid = None
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets = _widen(targets)
        if inputs.ignore_index is not None and _representable(inputs.ignore_index, targets.dtype):
            kept = targets != inputs.ignore_index
            counts = kept if counts is None else counts & kept
        num_classes = logits.shape[-1]
        in_range = (targets >= 0) & (targets < num_classes)
        valid = in_range if counts is None else in_range | ~counts
        _report_wrong_labels(targets, valid, num_classes)
        targets = jnp.where(in_range & valid, targets, 0).astype(jnp.int32)
        if counts is not None:
            targets = jnp.where(counts, targets, 0)
    else:
        targets = jnp.moveaxis(targets, inputs.axis, -1)
    dtype = accumulator(inputs.logits, inputs.targets, inputs.weights, inputs.class_weights)
    weights, class_weights = (
        None if array is None else jnp.asarray(array, dtype) for array in (inputs.weights, inputs.class_weights)
    )
    return Rows(logits, targets, counts, valid, silence(counts, weights), class_weights)


def accumulator(*arrays: Any) -> Any:
    """The dtype of the arithmetic: float64 where any input has it, else float32."""
    is_double = any(array is not None and jnp.asarray(array).dtype == jnp.float64 for array in arrays)
    return jnp.float64 if is_double else jnp.float32


def silence(counts: Any, values: Any) -> Any:
    """Zero, in value and every derivative, where rows do not count; both may be None."""
    if counts is None or values is None:
        return values
    return jnp.where(counts, values, jnp.zeros_like(values))


def loud(valid: Any, values: Any) -> Any:
    """NaN, in value and every derivative, where a label is wrong.

    A factor and not a `where`: it has to be linear in the tangent, or forward mode would lose the NaN.
    """
    if valid is None:
        return values
    return values * jnp.where(valid, jnp.ones((), values.dtype), jnp.full((), jnp.nan, values.dtype))


def _widen(labels: Array) -> Array:
    """No comparison with a class number may overflow: 8 and 16 bits become 32."""
    return labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels


def _representable(value: int, dtype: Any) -> bool:
    return jnp.iinfo(dtype).min <= value <= jnp.iinfo(dtype).max


def _report_wrong_labels(labels: Array, valid: Array, num_classes: int) -> None:
    """Under `jax.experimental.checkify`, an error that names a wrong label; otherwise nothing is compiled."""
    from jax.experimental import checkify  # not part of `import jax`

    if labels.size == 0:
        return
    position = jnp.argmin(valid.ravel())
    checkify.debug_check(
        jnp.all(valid),
        f"`targets` must be class indices in [0, {num_classes}); got {{label}} at position {{position}}.",
        label=labels.ravel()[position],
        position=jnp.array(jnp.unravel_index(position, labels.shape), jnp.int32),
    )
