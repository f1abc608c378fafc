"""Calls outside of every transformation: one jitted function each, as fast as the user's own would be."""

import functools
import inspect
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Literal, ParamSpec, SupportsIndex, TypeVar, get_args, get_origin

import jax
from jax.core import eval_context

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def one_program(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Lets a call whose arrays are all on a device skip the door, once it has been through it with such arrays.

    NumPy arrays and Python numbers are looked at on every call.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    names, known = [*parameters], {*parameters}
    static = {name for name in names if _is_static(parameters[name].annotation)}
    compiled = jax.jit(function, static_argnames=tuple(static))

    @functools.wraps(function)
    def call(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        get_state, outside = _trace_state()
        if get_state() != outside:
            return function(*arguments, **options)
        given = dict(zip(names, arguments, strict=False)) | options
        is_compiled = given.keys() <= known and _are_on_device(given, static)
        return (compiled if is_compiled else function)(*arguments, **options)

    return call


def _is_static(annotation: object) -> bool:
    """Whether what a parameter takes is no array, but a part of the program: a Python int, a bool, a choice."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else [annotation]
    return all(kind in (SupportsIndex, bool, NoneType) or get_origin(kind) is Literal for kind in kinds)


def _are_on_device(given: dict[str, object], static: set[str]) -> bool:
    """Whether there is nothing in a call that the door would have to look at again.

    A pytree may hold anything in what is not an array, and is looked at.
    """
    for name, value in given.items():
        if not isinstance(value, int | str | None if name in static else jax.Array | None):
            return False
    return True


@functools.cache
def _trace_state() -> tuple[Callable[[], object], object]:
    """What says which transformation is at work, and what it says where none is."""
    from jax.extend.core import get_opaque_trace_state  # not part of `import jax`

    with eval_context():
        return get_opaque_trace_state, get_opaque_trace_state()
