"""The second producer of summaries: blocks of logits, made from hidden · kernel and dropped again.

The logits of a language model are the largest array of its training step. Here they are never held: the forward pass
merges the slices of the rows, one block of classes after another, and the backward pass makes every block once more,
applies the rule of `_rule` to it and multiplies the result into the gradients of hidden and kernel.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import max_dim, min_dim
from jaxtyping import Array, Bool, Float, Integer

from jaxce._autodiff import rule
from jaxce._conventions import accumulator, silence
from jaxce._logits import LinearLogits
from jaxce._mesh import Classes, vary, varying
from jaxce._rule import ROW_AXES, Numbers, Row, numbers_of, row_maximum, slice_gradient, slice_row, sum_rows
from jaxce._slice import empty, merge, merge_devices
from jaxce._xla import keep

_PerRow = Float[Array, " rows"]
_PerClass = Float[Array, " classes"]
_Carry = TypeVar("_Carry")


class HeadRows(NamedTuple):
    """The inputs of the rule: a `Row` for all rows of a head."""

    head: Any  # LinearLogits
    targets: Integer[Array, " rows"] | Float[Array, "rows classes"]
    target_weights: _PerClass | None
    class_vector: _PerClass | None
    counts: Bool[Array, " rows"] | None
    real: Any
    classes: Classes

    @property
    def dtype(self) -> Any:
        """The dtype of the arithmetic."""
        return accumulator(self.head, self.targets, self.target_weights, self.class_vector)

    @property
    def has_labels(self) -> bool:
        """Whether the targets are classes, and not distributions."""
        return self.targets.ndim == 1

    def block(self, start: Any, size: int) -> "HeadRows":
        """The same rows over some of the classes."""
        return HeadRows(
            block_of(self.head, start, size),
            self.targets - start if self.has_labels else cut(self.targets, start, size),
            cut(self.target_weights, start, size),
            cut(self.class_vector, start, size),
            self.counts,
            None if self.real is None else self.real - start,
            self.classes,
        )


def _forward(rows: HeadRows) -> Numbers:
    dtype = rows.dtype
    num_rows, num_classes = rows.head.shape

    def slice_of_block(start, size):
        block = rows.block(start, size)
        logits = finish(project(block.head, rows.counts, dtype), block.head)
        maximum = row_maximum(logits, dtype, block.real)
        return jax.vmap(slice_row, in_axes=(ROW_AXES,))(_row(block, logits, maximum))

    def add(slices, block, start):
        return merge(slices, block)

    nothing = vary(empty(num_rows, dtype, has_vector=rows.class_vector is not None), varying(rows))
    part = over_blocks(slice_of_block, add, nothing, num_classes, classes_per_block(rows.head))
    return numbers_of(merge_devices(part, rows.classes), has_label=rows.has_labels)


def _backward(rows: HeadRows, numbers: Numbers, cotangents: Numbers) -> HeadRows:
    def gradient_of_block(start, size):
        return _gradient_of_block(rows, numbers, cotangents, start, size)

    def add(gradient, block, start):
        return HeadRows(
            add_block(gradient.head, block.head, start),
            put(gradient.targets, block.targets, start),
            put(gradient.target_weights, block.target_weights, start),
            put(gradient.class_vector, block.class_vector, start),
            None,
            None,
            rows.classes,
        )

    zeros = jax.tree.map(
        jnp.zeros_like, rows._replace(counts=None, real=None, targets=None if rows.has_labels else rows.targets)
    )
    zeros = zeros._replace(head=no_gradient(rows.head))
    gradient = over_blocks(gradient_of_block, add, zeros, rows.head.shape[-1], classes_per_block(rows.head))
    return gradient._replace(head=rounded(gradient.head, rows.head))


# Under checkpoint: a derivative of the loop must not keep what the blocks are made of.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=4)
def _gradient_of_block(rows: HeadRows, numbers: Numbers, cotangents: Numbers, start: Any, size: int) -> HeadRows:
    block = rows.block(start, size)
    logits, pullback = jax.vjp(finish, project(block.head, rows.counts, rows.dtype), block.head)
    row = _row(block, logits, numbers.maximum)
    d_row = jax.vmap(slice_gradient, in_axes=(ROW_AXES, 0, 0))(row, numbers, cotangents)
    return HeadRows(
        head_gradient(block.head, pullback(d_row.logits), rows.counts),
        d_row.target,
        sum_rows(d_row.target_weights),
        sum_rows(d_row.class_vector),
        None,
        None,
        rows.classes,
    )


measure_head = rule(_forward, _backward)


def block_of(head: Any, start: Any, size: int) -> Any:
    """The logits of some of the classes; an array of them is cut."""
    if not isinstance(head, LinearLogits):
        return cut(head, start, size)
    return replace(head, kernel=cut(head.kernel, start, size), bias=cut(head.bias, start, size))


def classes_per_block(head: Any) -> int:
    """How many classes of all rows fit into a block."""
    num_rows, num_classes = head.shape
    per_class = 4 * max_dim(1, num_rows)
    fitting = max_dim(512, 2**26 // per_class) if head.block_bytes is None else head.block_bytes // per_class
    return block_size(fitting, num_classes)


def block_size(fitting: int, total: int) -> int:
    """How much of a total goes into a block into which a number fits: at least 1. All of them may be symbolic."""
    return min_dim(max_dim(1, fitting), max_dim(1, total))


def over_blocks(
    make: Callable[[Any, int], Any], add: Callable[[_Carry, Any, Any], _Carry], carry: _Carry, total: int, size: int
) -> _Carry:
    """Runs `carry = add(carry, make(start, size), start)` over 0 … total in blocks; the last one may be smaller.

    With symbolic sizes the last block stands alone, as nobody knows whether it is smaller, and a loop, which has one
    step at least, has one more, in which nothing is done.
    """

    def step(carry, start, size):
        return add(carry, make(start, size), start)

    def step_of(carry, i):
        return step(carry, i * size, size)

    def step_if_any(carry, i):
        return lax.cond(i < jnp.asarray(whole), step_of, lambda carry, _: carry, carry, i)

    rest, whole = (total - 1) % size + 1, (total - 1) // size
    if rest == size:  # and known
        rest, whole = 0, whole + 1
    if whole == 1:
        carry = step(carry, 0, size)
    elif whole != 0:
        is_known = isinstance(whole, int)
        steps = jnp.arange(whole if is_known else whole + 1, dtype=jnp.int32)
        take = step_of if is_known else step_if_any
        carry, _ = lax.scan(lambda carry, i: (take(carry, i), None), carry, steps)
    if rest != 0:
        # The barrier keeps XLA from turning the last slice into a padded array, a copy of the whole.
        carry = step(carry, keep(jnp.asarray(whole * size, jnp.int32)), rest)
    return carry


def project(head: Any, counts: Any, dtype: Any) -> Float[Array, "rows classes"]:
    """The product of hidden and kernel, accumulated in at least float32; 0 for rows that do not count."""
    hidden, kernel = _operands(head)
    return silence(counts, _dot(hidden, kernel, 1, 0).astype(dtype))


def project_back(
    d_products: Float[Array, "rows classes"], head: Any, counts: Any
) -> tuple[Float[Array, "rows features"], Float[Array, "features classes"]]:
    """The gradients of hidden and kernel, in at least float32, from multiplications in the operands' dtype."""
    hidden, kernel = _operands(head)
    d_products = d_products.astype(hidden.dtype)
    d_hidden = _dot(d_products, kernel, 1, 1)
    # 0 · NaN is NaN: what a row that does not count holds must not meet the kernel's gradient.
    return d_hidden, _dot(silence(counts, hidden), d_products, 0, 0)


def no_gradient(head: Any) -> Any:
    """Zeros to add the gradients of blocks to: hidden's in the dtype of the arithmetic, as every block adds to it."""
    zeros = jax.tree.map(jnp.zeros_like, head)
    if not isinstance(head, LinearLogits):
        return zeros
    hidden: Any = zeros.hidden
    return replace(zeros, hidden=hidden.astype(accumulator(head)))


def head_gradient(block: Any, d_finish: tuple[Array, Any], counts: Any) -> Any:
    """The gradient of a block of a head, given what the pullback of `finish` returned for it."""
    d_products, d_block = d_finish
    d_hidden, d_kernel = project_back(d_products, block, counts)
    return replace(d_block, hidden=d_hidden, kernel=d_kernel)


def add_block(gradient: Any, block: Any, start: Any) -> Any:
    """The gradient of logits with that of a block in it."""
    if not isinstance(gradient, LinearLogits):
        return put(gradient, block, start)
    return replace(
        gradient,
        hidden=_add(gradient.hidden, block.hidden),
        kernel=put(gradient.kernel, block.kernel, start),
        bias=put(gradient.bias, block.bias, start),
        softcap=_add(gradient.softcap, block.softcap),
        temperature=_add(gradient.temperature, block.temperature),
    )


def rounded(gradient: Any, head: Any) -> Any:
    """The gradient in the dtypes of the head."""
    return jax.tree.map(lambda part, array: part.astype(array.dtype), gradient, head)


def _operands(head: Any) -> tuple[Array, Array]:
    hidden, kernel = head.hidden, head.kernel
    is_multiplied = hidden.dtype == kernel.dtype and jnp.finfo(hidden.dtype).bits >= 8  # float4 is by no backend
    dtype = hidden.dtype if is_multiplied else accumulator(hidden, kernel)
    return hidden.astype(dtype), kernel.astype(dtype)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    contracted = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, contracted, preferred_element_type=accumulator(left, right))


def finish(products: Float[Array, "rows classes"], head: Any) -> Float[Array, "rows classes"]:
    """The logits, from the products of hidden and kernel."""
    logits, dtype = products, products.dtype
    if head.bias is not None:
        logits += head.bias.astype(dtype)[None]
    if head.softcap is not None:
        logits = _soft_cap(logits, jnp.minimum(head.softcap.astype(dtype), jnp.finfo(dtype).max))
    return logits if head.temperature is None else soften(logits, head.temperature.astype(dtype))


@jax.custom_jvp
def soften(logits: Array, temperature: Float[Array, ""]) -> Array:
    """Logits over the temperature, to which an infinite logit does not answer."""
    return logits / temperature


@soften.defjvp
def _push_soften(primals, tangents):
    logits, temperature = primals
    d_logits, d_temperature = tangents
    softened = soften(logits, temperature)
    return softened, (d_logits - _finite(softened) * d_temperature) / temperature


@jax.custom_jvp
def _soft_cap(logits: Float[Array, "rows classes"], softcap: Float[Array, ""]) -> Float[Array, "rows classes"]:
    """The capped logits. Where the tanh rounds to its argument they are the logits: the argument may underflow."""
    ratio = logits / softcap
    is_small = jnp.abs(ratio) < jnp.finfo(ratio.dtype).eps ** 0.5 / 2
    return jnp.where(is_small, logits, softcap * jnp.tanh(ratio))


@_soft_cap.defjvp
def _push_soft_cap(primals, tangents):
    """With t = capped / softcap: (1 − t²) d logits + (t − (logits / softcap) (1 − t²)) d softcap.

    By the capped logits, which the rule keeps anyway: autodiff would keep the tanh too.
    """
    logits, softcap = primals
    d_logits, d_softcap = tangents
    capped = _soft_cap(logits, softcap)
    t, ratio = capped / softcap, _finite(logits) / softcap
    slope = (1 - t) * (1 + t)
    # The difference has no digits where it is small: there by its series.
    series = ratio**3 * (2 / 3 - 8 / 15 * ratio**2)
    by_softcap = jnp.where(jnp.abs(ratio) < jnp.finfo(t.dtype).eps ** (1 / 6), series, t - ratio * slope)
    return capped, slope * d_logits + by_softcap * d_softcap


def _finite(logits: Array) -> Array:
    """Logits with 0 in place of inf, whose product with 0 is NaN."""
    return jnp.where(jnp.isinf(logits), 0, logits)


def cut(array: Any, start: Any, size: int, axis: int = -1) -> Any:
    """A block of an array, or None of None."""
    if array is None or array.shape[axis] == size:
        return array
    return lax.dynamic_slice_in_dim(array, start, size, axis)


def put(array: Any, block: Any, start: Any, axis: int = -1) -> Any:
    """The array with a block replaced, in the array's dtype."""
    if array is None:
        return None
    if array.shape == block.shape:
        return block.astype(array.dtype)
    return lax.dynamic_update_slice_in_dim(array, block.astype(array.dtype), start, axis)


def _add(total: Any, term: Any) -> Any:
    return None if total is None else total + term.astype(total.dtype)


def _row(rows: HeadRows, logits: Float[Array, "rows classes"], maximum: _PerRow) -> Row:
    _, targets, target_weights, class_vector, counts, real, classes = rows
    return Row(logits, targets, target_weights, class_vector, counts, maximum, real, classes)
