"""Every way to differentiate a scalar function of a tree of arrays, and what each has to give, by one way alone."""

import jax
import jax.numpy as jnp


def all_modes(f, chosen=None):
    """A function of a point and a direction that differentiates `f` in every way, or in the chosen ones.

    Together they are one compilation. Those named after a matrix are of vectors.
    """
    grad = jax.grad(f)

    def modes(x, v):
        def pushed(x):
            return jax.jvp(f, (x,), (v,))[1]

        def pulled(x):
            return dot(grad(x), v)

        def twice(x):
            return jax.lax.scan(lambda carry, _: (carry + jax.checkpoint(f)(x), None), 0.0, None, length=2)[0]

        ways = {
            "value": lambda: f(x),
            "value of jvp": lambda: jax.jvp(f, (x,), (v,))[0],
            "value of linearize": lambda: jax.linearize(f, x)[0],
            "value of value_and_grad": lambda: jax.value_and_grad(f)(x)[0],
            "grad": lambda: grad(x),
            "value_and_grad": lambda: jax.value_and_grad(f)(x)[1],
            "grad of checkpoint": lambda: jax.grad(jax.checkpoint(f))(x),
            "jvp": lambda: pushed(x),
            "linearize": lambda: jax.linearize(f, x)[1](v),
            "jacfwd": lambda: jax.jacfwd(f)(x),
            "jacrev": lambda: jax.jacrev(f)(x),
            "hessian": lambda: jax.hessian(f)(x),
            "rev over rev": lambda: jax.grad(pulled)(x),
            "rev over fwd": lambda: jax.grad(pushed)(x),
            "fwd over fwd": lambda: jax.jvp(pushed, (x,), (v,))[1],
            "fwd over rev": lambda: jax.jvp(grad, (x,), (v,))[1],
            "third": lambda: jax.jvp(jax.grad(pulled), (x,), (v,))[1],
            "scan of checkpoint": lambda: jax.grad(twice)(x),
        }
        return {name: way() for name, way in ways.items() if chosen is None or name in chosen}

    return modes


def plain_modes(f, chosen=None):
    """What `all_modes` has to give, where `f` is differentiated once, twice and thrice, each in one way."""
    grad = jax.grad(f)

    def modes(x, v):
        def along(x):
            return jax.jvp(grad, (x,), (v,))[1]

        value, gradient = jax.value_and_grad(f)(x)
        results = {
            **dict.fromkeys(("value", "value of jvp", "value of linearize", "value of value_and_grad"), lambda: value),
            **dict.fromkeys(("grad", "value_and_grad", "grad of checkpoint", "jacfwd", "jacrev"), lambda: gradient),
            **dict.fromkeys(("jvp", "linearize"), lambda: dot(gradient, v)),
            "hessian": lambda: jax.jacfwd(grad)(x),
            **dict.fromkeys(("rev over rev", "rev over fwd", "fwd over rev"), lambda: along(x)),
            "fwd over fwd": lambda: dot(along(x), v),
            "third": lambda: jax.jvp(along, (x,), (v,))[1],
            "scan of checkpoint": lambda: jax.tree.map(lambda array: 2 * array, gradient),
        }
        return {name: result() for name, result in results.items() if chosen is None or name in chosen}

    return modes


def dot(tree, other):
    return sum(map(jnp.vdot, jax.tree.leaves(tree), jax.tree.leaves(other)))
