"""One primitive for the library's derivative rules: every mode and order of differentiation from a backward pass.

A `jax.custom_vjp` function refuses `jvp`, `jacfwd` and every second order that needs them, and a policy of
`jax.checkpoint` looks into it. A rule is one operation to JAX instead, and so are its derivatives:

    rule   inputs → outputs
    push   inputs, outputs, tangents of inputs → tangents of outputs       the transpose of pull
    pull   inputs, outputs, cotangents of outputs → of inputs              the backward pass itself

What they consist of is traced when they are compiled. Reverse mode binds push and transposes it to pull, so that a
backward pass need not be transposable: it may be a kernel. Derivatives of push and pull are taken by JAX of what
they consist of, and are operations of the same kind.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive  # not part of `import jax`
from jax.interpreters import ad, batching, mlir
from jax.stages import Traced
from jaxtyping import Array

_Inputs = TypeVar("_Inputs")
_Outputs = TypeVar("_Outputs")
_Tree = TypeVar("_Tree", covariant=True)
_Context = tuple[str | None, bool]  # the precision of matrix products, and whether there are 64 bits
_Arrays = Sequence[Array]
_Indices = tuple[int, ...]

# Whether the arrays are a device's own. If the partitioner has spread them over several, a device does not know which
# rows it has, and must not be asked for others.
is_local = jax.make_user_context(True)


def rule(
    forward: Callable[[_Inputs], _Outputs],
    backward: Callable[[_Inputs, _Outputs, _Outputs], _Inputs],
    *,
    beside: Callable[[_Inputs], _Outputs] | None = None,
    outputs: Callable[[_Inputs], _Outputs] | None = None,
) -> Callable[[_Inputs], _Outputs]:
    """A function of a pytree of arrays, whose derivatives all come from its backward pass.

    Args:
        forward: inputs → outputs, a pytree of arrays. Integers have tangents of float0, as everywhere in JAX.
        backward: (inputs, outputs, cotangents of the outputs) → cotangents of the inputs, in the types of the inputs;
            None for what has no derivative. It is linear in the cotangents. All of these are functions of a module:
            what they need comes in the inputs, or the rule would be traced for every call.
        beside: what computes the same as `forward` where a derivative is taken; None is `forward`.
        outputs: inputs → arrays of the types of the outputs, in fewer operations; None is `forward`.

    Returns:
        a function of the inputs. Those that stand still take no part in a derivative: a zero tangent times an infinite
        derivative would be NaN.
    """

    def call(inputs: _Inputs) -> _Outputs:
        leaves, structure = jax.tree.flatten(inputs)
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        config: Any = jax.config  # whose type knows none of its values
        context = config.jax_default_matmul_precision, config.jax_enable_x64
        op = _Rule(forward, backward, beside or forward, outputs or forward, structure)
        op = replace(op, outputs=jax.tree.structure(_trace_types(op, (), context, arrays).out_info))
        return op.outputs.unflatten(_rule_p.bind(*arrays, op=op, levels=(), context=context))

    return call


class Structure(Protocol[_Tree]):
    """A pytree without its leaves: JAX's `PyTreeDef`, for which JAX has no types."""

    def unflatten(self, leaves: Iterable[object], /) -> _Tree: ...

    def flatten_up_to(self, tree: object, /) -> list[Array | None]: ...


class _Op(Protocol):
    """What the primitive is bound with: a rule, or a derivative of an op.

    Pull and push are by the inputs that are `moving`: to their cotangents, and from their tangents.
    """

    def run(self, *arguments: Array) -> object: ...

    def pull(self, moving: _Indices, inputs: _Arrays, outputs: _Arrays, cotangents: _Arrays) -> list[Array]: ...

    def push(self, moving: _Indices, inputs: _Arrays, outputs: _Arrays, tangents: _Arrays) -> list[Array]: ...


@dataclass(frozen=True)
class _Rule(Generic[_Inputs, _Outputs]):
    forward: Callable[[_Inputs], _Outputs]
    backward: Callable[[_Inputs, _Outputs, _Outputs], _Inputs]
    beside: Callable[[_Inputs], _Outputs]
    types: Callable[[_Inputs], _Outputs]
    structure: Structure[_Inputs]
    outputs: Structure[_Outputs] = field(default=jax.tree.structure(None), compare=False)  # follows from the inputs

    def run(self, *arguments: Array) -> _Outputs:
        return self.forward(self.structure.unflatten(arguments))

    def pull(self, moving: _Indices, inputs: _Arrays, outputs: _Arrays, cotangents: _Arrays) -> list[Array]:
        trees = self.structure.unflatten(inputs), self.outputs.unflatten(outputs), self.outputs.unflatten(cotangents)
        gradients = self.structure.flatten_up_to(self.backward(*trees))
        return [jnp.zeros_like(inputs[i]) if (by := gradients[i]) is None else by for i in moving]

    def push(self, moving: _Indices, inputs: _Arrays, outputs: _Arrays, tangents: _Arrays) -> list[Array]:
        # By `vjp` and not by `linear_transpose`: the backward pass may have a forward derivative of its own. Where it
        # is taken does not matter, as it is linear.
        pullback = jax.vjp(lambda *cotangents: self.pull(moving, inputs, outputs, cotangents), *outputs)[1]
        return list(pullback(list(tangents)))


@dataclass(frozen=True)
class _Derivative:
    """Push or pull of an op, by some of its inputs. Linear in the arguments after the first `fixed`."""

    op: _Op
    moving: _Indices
    num_inputs: int
    fixed: int  # the number of inputs, and of outputs if they are arguments too
    is_push: bool

    def run(self, *arguments: Array) -> list[Array]:
        n, fixed = self.num_inputs, self.fixed
        derivative = self.op.push if self.is_push else self.op.pull
        return derivative(self.moving, arguments[:n], arguments[n:fixed], arguments[fixed:])

    def push(self, moving: _Indices, inputs: _Arrays, outputs: _Arrays, tangents: _Arrays) -> list[Array]:
        return jax.jvp(self._of(moving, inputs), [inputs[i] for i in moving], list(tangents))[1]

    def pull(self, moving: _Indices, inputs: _Arrays, outputs: _Arrays, cotangents: _Arrays) -> list[Array]:
        return list(jax.vjp(self._of(moving, inputs), *(inputs[i] for i in moving))[1](list(cotangents)))

    def _of(self, moving: _Indices, inputs: _Arrays) -> Callable[..., list[Array]]:
        def run_at(*moved: Array) -> list[Array]:
            replaced = dict(zip(moving, moved, strict=True))
            return self.run(*(replaced.get(i, array) for i, array in enumerate(inputs)))

        return run_at


@dataclass(frozen=True)
class _Level:
    """An axis of `vmap`: the arguments that have it, in front, and the results that are summed over it."""

    mapped: tuple[bool, ...]
    summed: tuple[int, ...] = ()

    def over(self, function: Callable[..., object]) -> Callable[..., object]:
        """The function of all along the axis."""

        def mapped(*arguments: Array) -> object:
            results = jax.vmap(function, in_axes=[0 if is_mapped else None for is_mapped in self.mapped])(*arguments)
            if not self.summed:
                return results
            return [
                jnp.sum(result, 0) if i in self.summed else result for i, result in enumerate(jax.tree.leaves(results))
            ]

        return mapped

    def of_push(self, moving: _Indices, num_outputs: int) -> "_Level":
        """The level of a push, whose results are summed where those of the op are."""
        tangents = (self.mapped[i] for i in moving)
        return replace(self, mapped=(*self.mapped, *[True] * num_outputs, *tangents))

    def transposed(self, fixed: int, num_results: int) -> "_Level":
        """The level of the transpose: what all share gets a sum, and what is summed all share."""
        cotangents = (i not in self.summed for i in range(num_results))
        shared = tuple(i for i, is_mapped in enumerate(self.mapped[fixed:]) if not is_mapped)
        return _Level((*self.mapped[:fixed], *cotangents), shared)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(op: _Op, levels: tuple[_Level, ...], context: _Context, *arguments: Array) -> object:
    function = op.run
    for level in levels:
        function = level.over(function)
    precision, x64 = context  # of the caller, whose own has been left
    with jax.default_matmul_precision(precision), jax.enable_x64(x64):
        return function(*arguments)


def _run_flat(*arguments: Array, op: _Op, levels: tuple[_Level, ...], context: _Context) -> list[Array]:
    return jax.tree.leaves(_run(op, levels, context, *arguments))


def _types(*types: ShapedArray, op: _Op, levels: tuple[_Level, ...], context: _Context) -> list[ShapedArray]:
    if isinstance(op, _Derivative) and op.is_push:
        # Reverse mode has no use for push itself, which may be impossible.
        outputs = slice(op.num_inputs, op.fixed)
        if types[outputs] and all(all(level.mapped[outputs]) for level in levels):
            return [of_output.to_tangent_aval() for of_output in types[outputs]]
    return list(_trace_types(op, levels, context, types).jaxpr.out_avals)


def _trace_types(
    op: _Op, levels: tuple[_Level, ...], context: _Context, types: Sequence[Array | ShapedArray]
) -> Traced:
    return _run.trace(replace(op, forward=op.types) if isinstance(op, _Rule) else op, levels, context, *types)


_rule_p = Primitive("rule")
_rule_p.multiple_results = True
_rule_p.def_abstract_eval(_types)


@_rule_p.def_impl
def _run_now(*arguments: Array, **how: Any) -> list[Array]:
    with is_local(all(len(array.sharding.device_set) == 1 for array in arguments if isinstance(array, jax.Array))):
        return _run_flat(*arguments, **how)


def _lower(lowering: mlir.LoweringRuleContext, *arguments: Any, **how: Any) -> Any:
    around: Any = lowering.module_context.axis_context  # of a partitioned program, or of `shard_map`
    split = around.num_devices > 1 if hasattr(around, "num_devices") else {*around.mesh.axis_names} - around.manual_axes
    with is_local(not split):
        return mlir.lower_fun(_run_flat, multiple_results=True)(lowering, *arguments, **how)


mlir.register_lowering(_rule_p, _lower)


def _push(
    primals: _Arrays,
    tangents: Sequence[Array | ad.Zero],
    *,
    op: _Op,
    levels: tuple[_Level, ...],
    context: _Context,
) -> tuple[list[Array], list[Array]]:
    bind = partial(_rule_p.bind, context=context)
    moving = tuple(i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero))
    if isinstance(op, _Derivative) and moving[0] >= op.fixed:  # it is linear in all that moves
        moved = map(ad.instantiate_zeros, tangents[op.fixed :])
        return bind(*primals, op=op, levels=levels), bind(*primals[: op.fixed], *moved, op=op, levels=levels)
    if isinstance(op, _Rule):
        op = replace(op, forward=op.beside)
    outputs = bind(*primals, op=op, levels=levels)
    kept = outputs if isinstance(op, _Rule) else []
    push = _Derivative(op, moving, len(primals), len(primals) + len(kept), is_push=True)
    levels = tuple(level.of_push(moving, len(kept)) for level in levels)
    return outputs, bind(*primals, *kept, *(tangents[i] for i in moving), op=push, levels=levels)


def _transpose(
    cotangents: Sequence[Array | ad.Zero],
    *arguments: Array | ad.UndefinedPrimal,
    op: "_Derivative",
    levels: tuple[_Level, ...],
    context: _Context,
) -> list[Array | None]:
    fixed = op.fixed
    transposed = replace(op, is_push=not op.is_push)
    levels = tuple(level.transposed(fixed, len(cotangents)) for level in levels)
    moved = map(ad.instantiate_zeros, cotangents)
    results = _rule_p.bind(*arguments[:fixed], *moved, op=transposed, levels=levels, context=context)
    # Arguments that are known are zeros, as it is linear in all of them.
    wanted = map(ad.is_undefined_primal, arguments[fixed:])
    of_moving = [result if is_wanted else None for result, is_wanted in zip(results, wanted, strict=True)]
    return [*[None] * fixed, *of_moving]


def _batch(
    arguments: _Arrays,
    axes: Sequence[int | None],
    *,
    op: _Op,
    levels: tuple[_Level, ...],
    context: _Context,
) -> tuple[list[Array], list[int]]:
    arguments = [
        array if axis is None else jnp.moveaxis(array, axis, 0) for array, axis in zip(arguments, axes, strict=True)
    ]
    level = _Level(tuple(axis is not None for axis in axes))
    results = _rule_p.bind(*arguments, op=op, levels=(*levels, level), context=context)
    return results, [0] * len(results)


ad.primitive_jvps[_rule_p] = _push
ad.primitive_transposes[_rule_p] = _transpose
batching.primitive_batchers[_rule_p] = _batch
