"""The second producer of summaries: blocks of logits, made from hidden · kernel and dropped again.

The logits of a language model are the largest array of its training step. Here they are never held: the forward pass
merges the slices of the rows, one block of classes after another, and the backward pass makes every block once more,
applies the rule of `_rule` to it and multiplies the result into the gradients of hidden and kernel.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import max_dim, min_dim
from jaxtyping import Array, Bool, Float, Integer

from jaxce._autodiff import rule
from jaxce._conventions import accumulator, silence
from jaxce._logits import LinearLogits
from jaxce._mesh import Classes, vary, varying
from jaxce._rule import ROW_AXES, Numbers, Row, numbers_of, row_maximum, slice_gradient, slice_row, sum_rows
from jaxce._slice import Asked, empty, merge, merge_devices
from jaxce._types import HeldArray
from jaxce._xla import keep

_PerRow = Float[Array, " rows"]
_PerClass = Float[Array, " classes"]
_Carry = TypeVar("_Carry")
_Block = TypeVar("_Block")
Start = Array | int


class HeadRows(NamedTuple):
    """The inputs of the rule: a `Row` for all rows of a head."""

    head: LinearLogits
    targets: Integer[Array, " rows"] | Float[Array, "rows classes"] | Integer[Array, "rows listed"]
    target_weights: _PerClass | None
    class_vector: _PerClass | None
    counts: Bool[Array, " rows"] | None
    real: Array | int | None
    classes: Classes
    asked: Asked = Asked()
    masses: Float[Array, "rows listed"] | None = None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the arithmetic."""
        return accumulator(self.head, self.targets, self.target_weights, self.class_vector, self.masses)

    @property
    def has_labels(self) -> bool:
        """Whether the targets are classes, and not distributions."""
        return self.targets.ndim == 1

    def block(self, start: Start, size: int) -> "HeadRows":
        """The same rows over some of the classes."""
        is_number = self.has_labels or self.masses is not None
        return HeadRows(
            block_of(self.head, start, size),
            self.targets - start if is_number else cut(self.targets, start, size),
            cut(self.target_weights, start, size),
            cut(self.class_vector, start, size),
            self.counts,
            None if self.real is None else self.real - start,
            self.classes,
            self.asked,
            self.masses,
        )


def _forward(rows: HeadRows) -> Numbers:
    dtype = rows.dtype
    num_rows, num_classes = rows.head.shape

    def slice_of_block(start, size):
        block = rows.block(start, size)
        logits = finish(project(block.head, rows.counts, dtype), block.head)
        maximum = row_maximum(logits, dtype, block.real)
        return jax.vmap(slice_row, in_axes=(ROW_AXES,))(_row(block, logits, maximum)).numbered_from(start)

    def add(slices, block, start):
        return merge(slices, block)

    listed, has_vector = () if rows.masses is None else rows.masses.shape[1:], rows.class_vector is not None
    nothing = empty(num_rows, dtype, listed=listed, has_vector=has_vector, asked=rows.asked)
    nothing = vary(nothing, varying(rows))
    part = over_blocks(slice_of_block, add, nothing, num_classes, classes_per_block(rows.head))
    part = part.numbered_from(rows.classes.start(num_classes))
    masses = None if rows.masses is None else rows.classes.largest(rows.masses)  # they are the same on all devices
    return numbers_of(merge_devices(part, rows.classes), has_label=rows.has_labels, masses=masses)


def _backward(rows: HeadRows, numbers: Numbers, cotangents: Numbers) -> HeadRows:
    def gradient_of_block(start, size):
        return _gradient_of_block(rows, numbers, cotangents, start, size)

    def add(gradient, block, start):
        not_put = {"head": add_block(gradient.head, block.head, start)}
        not_put["masses"] = jax.tree.map(_add, gradient.masses, block.masses)  # each of one block, and 0 of the others
        nothing = dict.fromkeys(not_put)
        of_classes = jax.tree.map(partial(put, start=start), gradient._replace(**nothing), block._replace(**nothing))
        return of_classes._replace(**not_put)

    targets = None if rows.has_labels or rows.masses is not None else rows.targets
    zeros = jax.tree.map(jnp.zeros_like, rows._replace(counts=None, real=None, targets=targets))
    zeros = zeros._replace(head=no_gradient(rows.head))
    gradient = over_blocks(gradient_of_block, add, zeros, rows.head.shape[-1], classes_per_block(rows.head))
    return gradient._replace(head=rounded(gradient.head, rows.head))


# Under checkpoint: a derivative of the loop must not keep what the blocks are made of.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=4)
def _gradient_of_block(rows: HeadRows, numbers: Numbers, cotangents: Numbers, start: Start, size: int) -> HeadRows:
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
        rows.asked,
        d_row.masses,
    )


measure_head = rule(_forward, _backward)


@overload
def block_of(head: LinearLogits, start: Start, size: int) -> LinearLogits: ...
@overload
def block_of(head: Array, start: Start, size: int) -> Array: ...
def block_of(head: LinearLogits | Array, start: Start, size: int) -> LinearLogits | Array:
    """The logits of some of the classes; an array of them is cut."""
    if not isinstance(head, LinearLogits):
        return cut(head, start, size)
    return replace(head, kernel=cut(head.kernel, start, size), bias=cut(head.bias, start, size))


def classes_per_block(head: LinearLogits | Array) -> int:
    """How many classes of all rows fit into a block. Logits that are held have nothing to say about it."""
    num_rows, num_classes = head.shape
    per_class = 4 * max_dim(1, num_rows)
    if not isinstance(head, LinearLogits) or head.block_bytes is None:
        return block_size(max_dim(512, 2**26 // per_class), num_classes)
    return block_size(operator.index(head.block_bytes) // per_class, num_classes)


def block_size(fitting: int, total: int) -> int:
    """How much of a total goes into a block into which a number fits: at least 1. All of them may be symbolic."""
    return min_dim(max_dim(1, fitting), max_dim(1, total))


def over_blocks(
    make: Callable[[Start, int], _Block],
    add: Callable[[_Carry, _Block, Start], _Carry],
    carry: _Carry,
    total: int,
    size: int,
) -> _Carry:
    """Runs `carry = add(carry, make(start, size), start)` over 0 … total in blocks; the last one may be smaller.

    With symbolic sizes the last block stands alone, as nobody knows whether it is smaller, and a loop, which has one
    step at least, has one more, in which nothing is done.
    """

    def step(carry: _Carry, start: Start, size: int) -> _Carry:
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


def project(head: LinearLogits, counts: Array | None, dtype: np.dtype) -> Float[Array, "rows classes"]:
    """The product of hidden and kernel, accumulated in at least float32; 0 for rows that do not count."""
    hidden, kernel = _operands(head)
    return silence(counts, _dot(hidden, kernel, 1, 0).astype(dtype))


def project_back(
    d_products: Float[Array, "rows classes"], head: LinearLogits, counts: Array | None
) -> tuple[Float[Array, "rows features"], Float[Array, "features classes"]]:
    """The gradients of hidden and kernel, in at least float32, from multiplications in the operands' dtype."""
    hidden, kernel = _operands(head)
    d_products = d_products.astype(hidden.dtype)
    d_hidden = _dot(d_products, kernel, 1, 1)
    # 0 · NaN is NaN: what a row that does not count holds must not meet the kernel's gradient.
    return d_hidden, _dot(silence(counts, hidden), d_products, 0, 0)


@overload
def no_gradient(head: LinearLogits) -> LinearLogits: ...
@overload
def no_gradient(head: Array) -> Array: ...
def no_gradient(head: LinearLogits | Array) -> LinearLogits | Array:
    """Zeros to add the gradients of blocks to: hidden's in the dtype of the arithmetic, as every block adds to it."""
    zeros = jax.tree.map(jnp.zeros_like, head)
    return replace(zeros, hidden=zeros.hidden.astype(accumulator(head))) if isinstance(zeros, LinearLogits) else zeros


def head_gradient(block: LinearLogits, d_finish: tuple[Array, LinearLogits], counts: Array | None) -> LinearLogits:
    """The gradient of a block of a head, given what the pullback of `finish` returned for it."""
    d_products, d_block = d_finish
    d_hidden, d_kernel = project_back(d_products, block, counts)
    return replace(d_block, hidden=d_hidden, kernel=d_kernel)


@overload
def add_block(gradient: LinearLogits, block: LinearLogits, start: Start) -> LinearLogits: ...
@overload
def add_block(gradient: Array, block: Array, start: Start) -> Array: ...
def add_block(gradient: LinearLogits | Array, block: LinearLogits | Array, start: Start) -> LinearLogits | Array:
    """The gradient of logits with that of a block in it."""
    put_in = partial(put, start=start)
    if not (isinstance(gradient, LinearLogits) and isinstance(block, LinearLogits)):
        return jax.tree.map(put_in, gradient, block)
    return replace(
        gradient,
        hidden=_add(gradient.hidden, block.hidden),
        kernel=put_in(gradient.kernel, block.kernel),
        bias=jax.tree.map(put_in, gradient.bias, block.bias),
        softcap=jax.tree.map(_add, gradient.softcap, block.softcap),
        temperature=jax.tree.map(_add, gradient.temperature, block.temperature),
    )


def rounded(gradient: _Block, head: _Block) -> _Block:
    """The gradient in the dtypes of the head."""
    return jax.tree.map(lambda part, array: part.astype(array.dtype), gradient, head)


def _operands(head: LinearLogits) -> tuple[Array, Array]:
    hidden, kernel = jnp.asarray(head.hidden), jnp.asarray(head.kernel)
    is_multiplied = hidden.dtype == kernel.dtype and jnp.finfo(hidden.dtype).bits >= 8  # float4 is by no backend
    dtype = hidden.dtype if is_multiplied else accumulator(hidden, kernel)
    return hidden.astype(dtype), kernel.astype(dtype)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    contracted = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, contracted, preferred_element_type=accumulator(left, right))


def finish(products: Float[Array, "rows classes"], head: LinearLogits) -> Float[Array, "rows classes"]:
    """The logits, from the products of hidden and kernel."""
    logits, dtype = products, products.dtype
    if head.bias is not None:
        logits += head.bias.astype(dtype)[None]
    if head.softcap is not None:
        logits = _soft_cap(logits, jnp.minimum(head.softcap.astype(dtype), jnp.finfo(dtype).max))
    if head.temperature is None:
        return logits
    temperature = head.temperature.astype(dtype)
    return soften(logits, temperature[:, None] if temperature.ndim else temperature)


@jax.custom_jvp
def soften(logits: Array, temperature: Float[Array, "*any"]) -> Array:
    """Logits over the temperature, or that of every row, to which an infinite logit does not answer."""
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


@overload
def cut(array: HeldArray, start: Start, size: int, axis: int = ...) -> Array: ...
@overload
def cut(array: None, start: Start, size: int, axis: int = ...) -> None: ...
def cut(array: HeldArray | None, start: Start, size: int, axis: int = -1) -> Array | None:
    """A block of an array, or None of None."""
    if array is None:
        return None
    array = jnp.asarray(array)
    return array if array.shape[axis] == size else lax.dynamic_slice_in_dim(array, start, size, axis)


def put(array: HeldArray, block: HeldArray, start: Start, axis: int = -1) -> Array:
    """The array with a block replaced, in the array's dtype."""
    block = jnp.asarray(block, array.dtype)
    return block if array.shape == block.shape else lax.dynamic_update_slice_in_dim(array, block, start, axis)


def _add(total: HeldArray, term: HeldArray) -> Array:
    return jnp.asarray(total) + term.astype(total.dtype)


def _row(rows: HeadRows, logits: Float[Array, "rows classes"], maximum: _PerRow) -> Row:
    _, targets, target_weights, class_vector, counts, real, classes, asked, masses = rows
    return Row(logits, targets, target_weights, class_vector, counts, maximum, real, classes, asked, masses)
