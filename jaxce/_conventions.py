"""What holds in every room: the dtype of the arithmetic, padding, 0 · ∞ = 0, and rows that are silent or loud."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def accumulator(*arrays: Any) -> Any:
    """The dtype of the arithmetic: float64 where any input has it, else float32."""
    is_double = any(array is not None and jnp.result_type(array.dtype) == jnp.float64 for array in arrays)
    return jnp.float64 if is_double else jnp.float32


def without_padding(values: Array, real: Any, otherwise: float | int) -> Array:
    """The values along the last axis, with something else in place of padding."""
    if real is None:
        return values
    return jnp.where(jnp.arange(values.shape[-1], dtype=jnp.int32) < real, values, jnp.asarray(otherwise, values.dtype))


def silence(counts: Any, values: Any) -> Any:
    """Zero, in value and every derivative, where rows do not count; both may be None.

    `values` may have axes beyond those of the rows.
    """
    if counts is None or values is None:
        return values
    counts = jnp.expand_dims(counts, range(counts.ndim, values.ndim))
    return jnp.where(counts, values, jnp.zeros_like(values))


def loud(valid: Any, values: Any) -> Any:
    """NaN, in value and every derivative, where a label is wrong.

    A factor and not a `where`: it has to be linear in the tangent, or forward mode would lose the NaN.
    """
    if valid is None:
        return values
    return values * jnp.where(valid, jnp.ones((), values.dtype), jnp.full((), jnp.nan, values.dtype))


def times(mass: Any, distance: Any) -> Any:
    """The product with 0 · inf = 0: a class without mass adds nothing, however far it is."""
    return jnp.where(mass == 0, 0, mass * distance)
