"""The second producer of summaries: blocks of logits, made from hidden · kernel and dropped again.

The logits of a language model are the largest array of its training step. Here they are never held: the forward pass
merges the slices of the rows, one block of classes after another, and the backward pass makes every block once more,
applies the rule of `_rule` to it and multiplies the result into the gradients of hidden and kernel.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import max_dim, min_dim
from jaxtyping import Array, Bool, Float, Integer

from jaxce._autodiff import rule
from jaxce._blocks import (
    SHARE,
    Along,
    Order,
    Start,
    add_block,
    block_size,
    cut,
    cut_classes,
    cut_rows,
    default_bytes,
    over_blocks,
    over_tiles,
    put,
    rows_per_tile,
)
from jaxce._conventions import accumulator, silence
from jaxce._logits import LinearLogits
from jaxce._mesh import Classes, vary, varying
from jaxce._rule import ROW_AXES, Numbers, Row, numbers_of, row_maximum, slice_gradient, slice_row, sum_rows
from jaxce._slice import Asked, Slice, empty, merge, merge_devices
from jaxce._xla import on_cpu

# What the user says of products that take bfloat16 and return float32.
_IN_BFLOAT16 = ("bfloat16", "BF16_BF16_F32")
_FEW_CLASSES = 512  # of which a matrix product is as fast, class for class, as of many

_PerRow = Float[Array, " rows"]
_PerClass = Float[Array, " classes"]
_Carry = TypeVar("_Carry")
_Gradient = TypeVar("_Gradient")
_Head = TypeVar("_Head", bound=LinearLogits | Array)


@dataclass(frozen=True)
class Product:
    """leftᵀ · right, what rows add to a kernel's gradient: as large as the kernel, and so made by blocks of classes."""

    left: Float[Array, "rows features"]
    right: Float[Array, "rows classes"]

    def __call__(self) -> Float[Array, "features classes"]:
        """All of it, in at least float32."""
        return _dot(self.left, self.right, 0, 0)

    def added_to(self, total: Float[Array, "features classes"], most: int) -> Float[Array, "features classes"]:
        """The sum. By blocks of so many bytes on a CPU; accelerators add as they multiply, and hold no product."""

        def add(total: Array, left: Array, right: Array) -> Array:
            return total + Product(left, right)().astype(total.dtype)

        def add_by_blocks(total: Array, left: Array, right: Array) -> Array:
            def add_block(total: Array, start: Start, size: int) -> Array:
                return put(total, add(cut(total, start, size), left, cut(right, start, size)), start)

            num_features, num_classes = total.shape
            return over_blocks(
                add_block, total, num_classes, block_size(min(most, 2**24) // (4 * num_features), num_classes)
            )

        return on_cpu(add_by_blocks, add)(total, self.left, self.right)


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
    places: Integer[Array, " rows"] | None = None  # of hidden's rows, where all else has been put in another order

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the arithmetic."""
        return accumulator(self.head, self.targets, self.target_weights, self.class_vector, self.masses)

    @property
    def has_labels(self) -> bool:
        """Whether the targets are classes, and not distributions."""
        return self.targets.ndim == 1

    @property
    def has_distributions(self) -> bool:
        """Whether the targets have all classes, and are not labels or lists of classes."""
        return self.targets.ndim == 2 and self.masses is None

    @property
    def along(self) -> "HeadRows":
        """Which axes the arrays have."""

        def if_any(array: object, along: Along) -> Any:
            return None if array is None else along

        return self._replace(
            head=along_of(self.head),
            targets=if_any(self.targets, Along.BOTH if self.has_distributions else Along.ROWS),
            target_weights=if_any(self.target_weights, Along.CLASSES),
            class_vector=if_any(self.class_vector, Along.CLASSES),
            counts=if_any(self.counts, Along.ROWS),
            real=if_any(self.real, Along.NEITHER),
            masses=if_any(self.masses, Along.ROWS),
            places=if_any(self.places, Along.NEITHER),
        )

    def ordered(self, order: Order) -> "HeadRows":
        """The rows in an order; hidden, the largest of the arrays, stays as it is."""
        return order.of(self, self.along)._replace(places=order.places)

    def tile(self, start: Start, size: int, first: Start, number: int) -> "HeadRows":
        """Some of the rows over some of the classes."""
        block = self.block(start, size)._replace(places=None)
        return cut_rows(block, block.along, first, number, self.places)

    def block(self, start: Start, size: int) -> "HeadRows":
        """The rows over some of the classes."""
        block = cut_classes(self, self.along, start, size)
        if not self.has_distributions:
            block = block._replace(targets=block.targets - start)
        return block._replace(real=None if self.real is None else self.real - start)

    def gathered(self, start: Start, size: int) -> tuple["HeadRows", Start]:
        """Rows that have all features of a block of classes, and where this starts in them."""
        if not self.head.feature_axis_name:
            return self, start
        block = self.block(start, size)
        return block._replace(head=gather_features(block.head)), 0


def _forward(rows: HeadRows) -> Numbers:
    dtype = rows.dtype
    num_rows, num_classes = rows.head.shape
    rows_at_once, classes_at_once = tile_shape([rows.head], rows.counts)
    order = Order(rows.counts, rows_at_once, is_cheap=not rows.has_distributions)
    rows = rows.ordered(order)
    listed, has_vector = () if rows.masses is None else rows.masses.shape[1:], rows.class_vector is not None
    nothing = empty(num_rows, dtype, listed=listed, has_vector=has_vector, asked=rows.asked)
    nothing = vary(nothing, varying(rows))

    def merge_block(slices: Slice, start: Start, size: int) -> Slice:
        block, own_start = rows.gathered(start, size)

        def slice_of_tile(first: Start, number: int) -> Slice:
            tile = block.tile(own_start, size, first, number)
            logits = finish(project(tile.head, tile.counts, dtype), tile.head)
            maximum = row_maximum(logits, dtype, tile.real)
            return jax.vmap(slice_row, in_axes=(ROW_AXES,))(_row(tile, logits, maximum)).numbered_from(start)

        def put_tile(slices: Slice, tile: Slice, first: Start) -> Slice:
            return jax.tree.map(partial(put, start=first, axis=0), slices, tile)

        return merge(slices, over_tiles(slice_of_tile, put_tile, nothing, num_rows, rows_at_once, rows.counts))

    part = order.restored(over_blocks(merge_block, nothing, num_classes, classes_at_once))
    part = part.numbered_from(rows.classes.start(num_classes))
    masses = None if rows.masses is None else rows.classes.largest(order.restored(rows.masses))  # the same on all
    return numbers_of(merge_devices(part, rows.classes), has_label=rows.has_labels, masses=masses)


def _backward(rows: HeadRows, numbers: Numbers, cotangents: Numbers) -> HeadRows:
    num_rows, num_classes = rows.head.shape
    rows_at_once, classes_at_once = tile_shape([rows.head], rows.counts)
    order = Order(rows.counts, rows_at_once, is_cheap=not rows.has_distributions)
    no_derivative = {"counts": None, "real": None} | ({} if rows.has_distributions else {"targets": None})
    along = rows.along._replace(**no_derivative)
    rows, numbers, cotangents = rows.ordered(order), order.of(numbers), order.of(cotangents)
    zeros = jax.tree.map(jnp.zeros_like, rows._replace(**no_derivative, places=None))._replace(
        head=no_gradient(rows.head)
    )

    def add_gradient(gradient: HeadRows, start: Start, size: int) -> HeadRows:
        block, own_start = rows.gathered(start, size)

        def of_tile(first: Start, number: int) -> HeadRows:
            return _gradient_of_tile(block, numbers, cotangents, own_start, size, first, number)

        def scatter(block: HeadRows) -> HeadRows:
            return block._replace(head=scatter_features(block.head))

        return add_block(of_tile, gradient, along, start, num_rows, rows_at_once, rows.counts, scatter)

    add_gradient = keep_no_kernel(add_gradient, rows.head)
    gradient = over_blocks(add_gradient, zeros, num_classes, classes_at_once)
    return order.restored(gradient._replace(head=rounded(gradient.head, rows.head)), along)


# Under checkpoint: a derivative of the loop must not keep what the tiles are made of.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 6))
def _gradient_of_tile(
    rows: HeadRows, numbers: Numbers, cotangents: Numbers, start: Start, size: int, first: Start, number: int
) -> HeadRows:
    tile = rows.tile(start, size, first, number)
    numbers, cotangents = (
        jax.tree.map(partial(cut, start=first, size=number, axis=0), of) for of in (numbers, cotangents)
    )
    logits, pullback = jax.vjp(finish, project(tile.head, tile.counts, rows.dtype), tile.head)
    row = _row(tile, logits, numbers.maximum)
    d_row = jax.vmap(slice_gradient, in_axes=(ROW_AXES, 0, 0))(row, numbers, cotangents)
    return HeadRows(
        head_gradient(tile.head, pullback(d_row.logits), tile.counts),
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
def along_of(head: LinearLogits) -> LinearLogits: ...
@overload
def along_of(head: Array) -> Along: ...
def along_of(head: LinearLogits | Array) -> Any:
    """Which axes the arrays of logits have."""
    if not isinstance(head, LinearLogits):
        return Along.BOTH
    of_rows = head.temperature is not None and head.temperature.ndim > 0
    along: Any = {
        "hidden": Along.ROWS_IN_PLACE,
        "kernel": Along.CLASSES,
        "bias": None if head.bias is None else Along.CLASSES,
        "softcap": None if head.softcap is None else Along.NEITHER,
        "temperature": None if head.temperature is None else Along.ROWS if of_rows else Along.NEITHER,
    }
    return replace(head, **along)


def tile_shape(heads: Sequence[LinearLogits | Array], counts: Array | None) -> tuple[int, int]:
    """How many rows and classes are in a tile, by the word of the first lazy head, if there is one.

    A block has all rows. If then it would have few classes, it has more of them, and its rows come in tiles. Without a
    word it has a share of a kernel that is gathered, however few the rows are.
    """
    num_rows, num_classes = heads[0].shape
    lazy = [head for head in heads if isinstance(head, LinearLogits)]
    word = lazy[0].block_bytes if lazy else None
    most = default_bytes(num_rows, num_classes, 2**25) if word is None else operator.index(word)
    few_classes = min_dim(_FEW_CLASSES, num_rows // 16)
    classes = block_size(max_dim(few_classes, most // (4 * max_dim(1, num_rows))), num_classes)
    if word is None and any(head.feature_axis_name for head in lazy):
        classes = min_dim(classes, max_dim(_FEW_CLASSES, num_classes // SHARE))
    return rows_per_tile(num_rows, most // (4 * classes), counts), classes


def gather_features(head: _Head) -> _Head:
    """Logits whose kernel has all features, of which a device holds a slice; what is held stays as it is."""
    if not isinstance(head, LinearLogits) or not head.feature_axis_name:
        return head
    return replace(head, kernel=lax.all_gather(head.kernel, head.feature_axis_name, axis=0, tiled=True))


def scatter_features(gradient: _Head) -> _Head:
    """The transpose: of the kernel's gradient, what the rows of all devices add to this one's features."""
    if not isinstance(gradient, LinearLogits) or not gradient.feature_axis_name:
        return gradient
    kernel = lax.psum_scatter(gradient.kernel, gradient.feature_axis_name, scatter_dimension=0, tiled=True)
    return replace(gradient, kernel=kernel)


def keep_no_kernel(step: Callable[..., _Carry], *heads: LinearLogits | Array) -> Callable[..., _Carry]:
    """A step of a loop whose derivative does not keep what it has gathered."""
    if any(isinstance(head, LinearLogits) and head.feature_axis_name for head in heads):
        return jax.checkpoint(step, prevent_cse=False, static_argnums=2)
    return step


def project(head: LinearLogits, counts: Array | None, dtype: np.dtype) -> Float[Array, "rows classes"]:
    """The product of hidden and kernel, accumulated in at least float32; 0 for rows that do not count."""
    hidden, kernel = _operands(head)
    return silence(counts, _dot(hidden, kernel, 1, 0).astype(dtype))


def project_back(
    d_products: Float[Array, "rows classes"], head: LinearLogits, counts: Array | None
) -> tuple[Float[Array, "rows features"], Product]:
    """The gradients of hidden and kernel, in at least float32, from multiplications in the operands' dtype."""
    hidden, kernel = _operands(head)
    d_products = d_products.astype(hidden.dtype)
    d_hidden = _dot(d_products, kernel, 1, 1)
    # 0 · NaN is NaN: what a row that does not count holds must not meet the kernel's gradient.
    return d_hidden, Product(silence(counts, hidden), d_products)


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
    return replace(d_block, hidden=d_hidden, kernel=d_kernel())


def rounded(gradient: _Gradient, head: _Gradient) -> _Gradient:
    """The gradient in the dtypes of the head."""
    return jax.tree.map(lambda part, array: part.astype(array.dtype), gradient, head)


def _operands(head: LinearLogits) -> tuple[Array, Array]:
    hidden, kernel = jnp.asarray(head.hidden), jnp.asarray(head.kernel)
    config: Any = jax.config  # whose type knows none of its values
    if hidden.dtype == kernel.dtype and jnp.finfo(hidden.dtype).bits >= 8:  # float4 is by no backend
        return hidden, kernel
    narrow = {hidden.dtype, kernel.dtype} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
    in_bfloat16 = narrow and config.jax_default_matmul_precision in _IN_BFLOAT16
    dtype = jnp.dtype(jnp.bfloat16) if in_bfloat16 else accumulator(hidden, kernel)
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


def _row(rows: HeadRows, logits: Float[Array, "rows classes"], maximum: _PerRow) -> Row:
    _, targets, target_weights, class_vector, counts, real, classes, asked, masses, _ = rows
    return Row(logits, targets, target_weights, class_vector, counts, maximum, real, classes, asked, masses)
