"""What holds in every room: the dtype of the arithmetic, padding, 0 · ∞ = 0, and rows that are silent or loud."""

from typing import Protocol, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_Values = jax.Array | np.ndarray


class HasDtype(Protocol):
    """An array, or what stands for one."""

    @property
    def dtype(self) -> np.dtype: ...


def accumulator(*arrays: HasDtype | None) -> np.dtype:
    """The dtype of the arithmetic: float64 where any input has it, else float32."""
    is_double = any(array is not None and jnp.result_type(array.dtype) == jnp.float64 for array in arrays)
    return np.dtype(np.float64 if is_double else np.float32)


def without_padding(values: Array, real: Array | int | None, otherwise: float) -> Array:
    """The values along the last axis, with something else in place of padding."""
    if real is None:
        return values
    return jnp.where(jnp.arange(values.shape[-1], dtype=jnp.int32) < real, values, jnp.asarray(otherwise, values.dtype))


@overload
def silence(counts: _Values | None, values: _Values) -> Array: ...
@overload
def silence(counts: _Values | None, values: None) -> None: ...
def silence(counts: _Values | None, values: _Values | None) -> Array | None:
    """Zero, in value and every derivative, where rows do not count; both may be None.

    `values` may have axes beyond those of the rows.
    """
    if values is None:
        return None
    values = jnp.asarray(values)
    if counts is None:
        return values
    counts = jnp.expand_dims(counts, range(counts.ndim, values.ndim))
    return jnp.where(counts, values, jnp.zeros_like(values))


def loud(valid: Array | None, values: Array) -> Array:
    """NaN, in value and every derivative, where a label is wrong.

    A factor and not a `where`: it has to be linear in the tangent, or forward mode would lose the NaN.
    """
    if valid is None:
        return values
    return values * jnp.where(valid, jnp.ones((), values.dtype), jnp.full((), jnp.nan, values.dtype))


def times(mass: Array, distance: Array) -> Array:
    """The product with 0 · inf = 0: a class without mass adds nothing, however far it is."""
    return jnp.where(mass == 0, 0, mass * distance)
