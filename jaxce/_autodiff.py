"""Forward mode for a reverse rule.

A `jax.custom_vjp` function answers `grad` with its own rule, but refuses `jvp`, `jacfwd` and every second order that
needs them. The rule is linear in its cotangent, so its transpose is the forward derivative: nothing has to be written
twice.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero


def forward_mode(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a `jax.custom_vjp` function so that every order and mode of differentiation runs through its one rule.

    For the function to differentiate further, its forward pass must compute its outputs by calling the wrapped
    function, so that second derivatives meet the rule again and not the arithmetic of the primal.

    Memory stays that of the bare rule: the pushed tangent is under `jax.checkpoint`, whose only residuals are those of
    the rule. `prevent_cse=False` lets the compiler see through it.

    Args:
        rule: a `jax.custom_vjp` function of positional pytrees of arrays.

    Returns:
        a function of the same arguments and values.
    """

    @jax.custom_jvp
    def lifted(*args):
        return rule(*args)

    def jvp(primals, tangents):
        # Arguments that stand still are left out: a zero tangent times an infinite derivative would be NaN.
        values, structure = jax.tree.flatten(primals)
        tangents = jax.tree.leaves(tangents, is_leaf=lambda tangent: isinstance(tangent, SymbolicZero))
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

        def rule_of_moving(*moved):
            replaced = dict(zip(moving, moved, strict=True))
            return rule(*structure.unflatten([replaced.get(i, value) for i, value in enumerate(values)]))

        outputs, pullback = jax.vjp(rule_of_moving, *(values[i] for i in moving))

        def push(pullback, tangents):
            (pushed,) = jax.linear_transpose(pullback, outputs)(tangents)
            return pushed

        pushed = jax.checkpoint(push, prevent_cse=False)(pullback, tuple(tangents[i] for i in moving))
        return outputs, pushed

    lifted.defjvp(jvp, symbolic_zeros=True)
    return lifted
