"""The other way to the gradient of a linear head: made in the forward pass, one block of rows after another.

The loss of a row is a function of its own logits alone, so its gradient can be taken while they are at hand: three
matrix multiplications for the loss and its gradients, where recomputing needs four. The price is that the gradients of
all rows are added up before anyone asks for them, which is only right for a sum of the rows: its derivative is one
number, by which the gradients are multiplied afterwards.
"""

import operator
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jaxce._blocks import Along, Order, cut, default_bytes, over_counting_tiles, put, rows_per_tile
from jaxce._conventions import accumulator
from jaxce._head import Product, finish, project, project_back
from jaxce._logits import LinearLogits
from jaxce._mesh import over_axes, vary, varying
from jaxce._rows import Rows
from jaxce._types import PerRow

_Formula = Callable[[Rows], PerRow | tuple[PerRow, object]]  # a pytree of its settings
_Total = tuple[Float[Array, ""], object]  # of the losses, and of what they have beside them


def losses_of(formula: _Formula, rows: Rows) -> tuple[PerRow, object]:
    """The losses of rows, and a pytree of numbers beside them, which have no derivative; None of most formulas."""
    result = formula(rows)
    losses, aux = result if isinstance(result, tuple) else (result, None)
    return losses, lax.stop_gradient(aux)


def total_loss(loss: _Formula, rows: Rows) -> _Total:
    """The sum of the rows' weighed losses, and those of what a formula returns beside them.

    Without a derivative this computes no gradient. First derivatives, in both modes, are made by blocks of rows; all
    others are those of the recomputing backward pass.

    Args:
        loss: a pytree of settings that is called with rows and returns their losses before `weights`, such as
            `CrossEntropy`. It closes over nothing that is traced.
        rows: of which the logits are lazy, or the targets that are a teacher's, or both.
    """
    row_axes = varying(loss, rows) - {*rows.classes.axes}
    # What meets the classes is cast before the derivative is taken, so that its gradient is one device's own.
    own = {*row_axes, *rows.classes.axes}
    rows = rows._replace(**vary(_lazy(rows), own))
    leaves, structure = jax.tree.flatten(vary((loss, rows), row_axes))
    of_rows = [*[False] * len(jax.tree.leaves(loss)), *rows.has_rows()]

    def recomputed(*leaves):
        return _weighed_sum(*structure.unflatten(leaves))

    @jax.custom_jvp
    def total(*leaves):
        return recomputed(*leaves)

    def push_total(primals, tangents):
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

        @jax.custom_jvp
        def value_and_gradients(*leaves):
            return _by_blocks(leaves, structure, of_rows, moving)

        def push_gradients(primals, tangents):
            def of_recomputed(*leaves):
                total, gradients = jax.value_and_grad(recomputed, argnums=moving, has_aux=True)(*leaves)
                return total, [gradient.astype(accumulator(gradient)) for gradient in gradients]

            return jax.jvp(of_recomputed, primals, tangents)

        value_and_gradients.defjvp(push_gradients)
        (value, aux), gradients = value_and_gradients(*primals)
        # Gradients keep the dtype of the arithmetic until they have been multiplied by the derivative of the sum.
        terms = [
            jnp.sum(gradient * tangents[i].astype(gradient.dtype))
            for i, gradient in zip(moving, gradients, strict=True)
        ]
        # A gradient of one device's own is a part of the whole.
        terms = [over_axes(term, tuple(varying(term) - varying(value))) for term in terms]
        d_value = vary(sum(terms[1:], terms[0]), varying(value)).astype(value.dtype)
        return (value, aux), (d_value, jax.tree.map(jnp.zeros_like, aux))

    total.defjvp(push_total, symbolic_zeros=True)
    return total(*leaves)


def _weighed_sum(loss: _Formula, rows: Rows) -> _Total:
    def total(numbers: PerRow) -> Float[Array, ""]:
        return jnp.sum(numbers if rows.weights is None else numbers * rows.weights)

    losses, aux = losses_of(loss, rows)
    return total(losses), jax.tree.map(total, aux)


def _by_blocks(leaves, structure, of_rows, moving) -> tuple[_Total, list[Array]]:
    """The sums, and the first one's gradient by the moving leaves in the dtype of the arithmetic."""
    rows: Rows = structure.unflatten(leaves)[1]
    (num_rows, num_classes), most = rows.logits.shape, _bytes_per_block(rows)
    size = rows_per_tile(num_rows, most // (4 * num_classes), rows.counts)
    order = Order(rows.counts, size, is_cheap=not any(_is_large(part) for part in (rows.logits, rows.targets)))
    along = [Along.ROWS if has_rows else Along.NEITHER for has_rows in of_rows]
    leaves = order.of(list(leaves), along)
    loss, rows = structure.unflatten(leaves)

    def add_block(carry, first, number):
        total, gradients = carry
        block = [
            cut(leaf, first, number, axis=0) if has_rows else leaf
            for leaf, has_rows in zip(leaves, of_rows, strict=True)
        ]
        part, of_block = _value_and_gradients(*structure.unflatten(block))
        terms = jax.tree.leaves(of_block)
        return jax.tree.map(jnp.add, total, part), [
            put(gradient, terms[i], first, axis=0) if of_rows[i] else plus(gradient, terms[i])
            for i, gradient in zip(moving, gradients, strict=True)
        ]

    def plus(total: Array, term: Array | Product) -> Array:
        if not isinstance(term, Product):
            return total + term
        return term.added_to(total, most) if size != num_rows else term()

    nothing = [jnp.zeros_like(leaves[i], accumulator(leaves[i])) for i in moving]
    zero = vary(jnp.zeros((), rows.dtype), varying(leaves) - {*rows.classes.axes})
    aux = jax.eval_shape(_weighed_sum, loss, rows)[1] if getattr(loss, "has_aux", False) else None
    zeros = zero, jax.tree.map(lambda _: zero, aux)
    total, gradients = over_counting_tiles(add_block, (zeros, nothing), num_rows, size, rows.counts, order)
    return total, order.restored(gradients, [along[i] for i in moving])


def _is_large(part: object) -> bool:
    """Whether logits, or distributions, are held over rows and classes."""
    return isinstance(part, Array) and part.ndim > 1


def _value_and_gradients(loss: _Formula, rows: Rows) -> tuple[_Total, tuple[_Formula, Rows]]:
    """The sums over a block of rows whose logits are held, and the first one's gradient by all of loss and rows."""
    lazy = _lazy(rows)
    products = {name: project(head, rows.counts, rows.dtype) for name, head in lazy.items()}

    def of_products(products, loss, rows):
        held = {name: finish(product, getattr(rows, name)) for name, product in products.items()}
        return _weighed_sum(loss, rows._replace(**held))

    total, (d_products, d_loss, d_rows) = jax.value_and_grad(
        of_products, argnums=(0, 1, 2), has_aux=True, allow_int=True
    )(products, *_widen_shared(loss, rows))

    def of_head(name: str, head: LinearLogits) -> LinearLogits:
        d_hidden, d_kernel = project_back(d_products[name], head, rows.counts)
        return replace(getattr(d_rows, name), hidden=d_hidden, kernel=d_kernel)

    return total, (d_loss, d_rows._replace(**{name: of_head(name, head) for name, head in lazy.items()}))


def _lazy(rows: Rows) -> dict[str, LinearLogits]:
    """Which of logits and targets are lazy."""
    pair = {"logits": rows.logits, "targets": rows.targets}
    return {name: part for name, part in pair.items() if isinstance(part, LinearLogits)}


def _widen_shared(loss: _Formula, rows: Rows) -> tuple[_Formula, Rows]:
    """Small floating leaves in the dtype of the arithmetic, so that sums over blocks of their gradients are exact."""

    def widen(array):
        return array.astype(accumulator(array)) if jnp.issubdtype(array.dtype, jnp.floating) else array

    loss = jax.tree.map(widen, loss)
    heads = {name: replace(head, bias=jax.tree.map(widen, head.bias)) for name, head in _lazy(rows).items()}
    return loss, rows._replace(**heads)


def _bytes_per_block(rows: Rows) -> int:
    """What a block of rows takes in all classes, by the first lazy logits' word."""
    num_rows, num_classes = rows.logits.shape
    most = next(iter(_lazy(rows).values())).block_bytes
    if most is not None:
        return operator.index(most)
    # Each block adds to the whole kernel's gradient, which takes as long as some thirty rows.
    return default_bytes(num_rows, num_classes, 2**29, fewest_rows=1024)
