"""What XLA:CPU has to be told; no mathematics. Elsewhere each of these is what its name says, and no more."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

_Values = TypeVar("_Values")
_Class = Float[Array, " classes"]
_Number = Float[Array, ""]
_Label = Integer[Array, ""]
Places = Integer[Array, "*any"] | int


# Whether what is summed shall be written out, as there is little of it at a time.
writes_out = jax.make_user_context(False)


def keep(values: _Values) -> _Values:
    """The values, which nothing sees through: what makes them is not merged with what reads them."""
    return lax.optimization_barrier(values)


def on_cpu(for_cpu: Callable[..., _Values], elsewhere: Callable[..., _Values]) -> Callable[..., _Values]:
    """One function of arrays for a CPU, and another that returns the same for all else."""

    def choose(*arrays: object) -> _Values:
        return lax.platform_dependent(*arrays, cpu=for_cpu, default=elsewhere)

    return choose


def apart(values: _Values, count: int) -> list[_Values]:
    """The values for one sum after another: XLA:CPU would write out, for every class, what two sums share."""

    def barred(values: _Values) -> list[_Values]:
        copies = [values]
        for _ in range(count - 1):
            copies.append(keep(copies[-1]))
        return copies

    if count == 1:
        return [values]
    return on_cpu(barred, lambda values: [values] * count)(values)


def sum_alone(values: _Class) -> _Number:
    """The sum in a loop that ends with it: XLA:CPU would sum over rows in the same one, and write out what it sums."""
    return _selected(jnp.sum(_selected(values) if writes_out.value else values))


def is_long(num_classes: int) -> bool:
    """Whether XLA:CPU's library takes several times as long to sum so many values that are computed as it sums."""
    return isinstance(num_classes, int) and num_classes > 2**15


def _selected(values: Array) -> Array:
    """The values, by a selection, which ends a loop, and is not known to the library."""
    return jnp.where(jnp.isnan(values), jnp.nan, values)


def zero_at(values: _Class, label: _Label, *, shares_exp: bool) -> _Class:
    """`values` with 0 at the label's class, if it is one of them."""

    def select(values: _Class, label: _Label) -> _Class:
        return jnp.where(_is_label(values, label), 0, values)

    def scatter(values: _Class, label: _Label) -> _Class:
        return values.at[label].set(0, mode="drop", wrap_negative_indices=False)

    # XLA:CPU writes out what it scatters into, and so shares it.
    return on_cpu(scatter, select)(values, label) if shares_exp else select(values, label)


def add_at(values: _Class, label: _Label, number: _Number, *, is_final: bool) -> _Class:
    """`values` with a number added at the label's class, if it is one of them; `is_final` if nothing is done to it."""

    def select(values: _Class, label: _Label, number: _Number) -> _Class:
        return values + jnp.where(_is_label(values, label), number, 0)

    def scatter(values: _Class, label: _Label, number: _Number) -> _Class:
        return values.at[label].add(number, mode="drop", wrap_negative_indices=False)

    # Accelerators fuse the comparison into what comes next. XLA:CPU's loop takes longer with one in it.
    if not is_final:
        return select(values, label, number)
    return on_cpu(scatter, select)(values, label, number)


def each(function: Callable[[Array], _Values], numbers: Array) -> _Values:
    """The function of each of the numbers, along a first axis: one after another where XLA:CPU would write all out."""

    def one_by_one(numbers: Array) -> _Values:
        return lax.map(function, numbers)

    return on_cpu(one_by_one, jax.vmap(function))(numbers)


def put_at(values: _Class, classes: Integer[Array, " listed"], numbers: Float[Array, " listed"]) -> _Class:
    """`values` with numbers in place of those at listed classes, if these are among them. All must be different."""

    def put(values: Array, numbers: Array, classes: Array) -> Array:
        return values.at[classes].set(numbers, mode="drop", unique_indices=True)

    return move(put, values, numbers, to=classes)


def move(function: Callable[..., Array], *arrays: Array, to: Places) -> Array:
    """`function(*arrays, to)`, which computes nothing, and only puts what arrays of one dtype hold elsewhere.

    XLA:CPU moves narrow floats as float32, of which it makes a whole array outside a loop. It moves integers as they
    are.
    """
    is_narrow = jnp.issubdtype(arrays[0].dtype, jnp.floating) and jnp.finfo(arrays[0].dtype).bits < 32
    return _move_narrow(function, *arrays, to) if is_narrow else function(*arrays, to)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _move_narrow(function, *arrays_and_places):
    dtype = arrays_and_places[0].dtype
    bits = jnp.dtype(f"uint{jnp.finfo(dtype).bits}")

    def move_bits(*arrays_and_places):
        *arrays, places = arrays_and_places
        moved = function(*(lax.bitcast_convert_type(array, bits) for array in arrays), places)
        return lax.bitcast_convert_type(moved, dtype)

    return on_cpu(move_bits, function)(*arrays_and_places)


@_move_narrow.defjvp
def _push_move(function, primals, tangents):
    return _move_narrow(function, *primals), jax.jvp(function, primals, tangents)[1]


def _is_label(values: _Class, label: _Label) -> Bool[Array, " classes"]:
    return jnp.arange(values.shape[0], dtype=label.dtype) == label
