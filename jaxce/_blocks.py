"""Loops over blocks of classes and tiles of rows: how large they are, what arrays have in them, which are left out."""

import enum
from collections.abc import Callable
from functools import partial
from typing import TypeVar, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import max_dim, min_dim
from jaxtyping import Array, Bool, Integer

from jaxce._autodiff import is_local
from jaxce._mesh import vary
from jaxce._types import HeldArray
from jaxce._xla import keep, move

_Carry = TypeVar("_Carry")
_Tile = TypeVar("_Tile")
_Tree = TypeVar("_Tree")
Start = Array | int

_FEW_ROWS = 256  # of which a matrix product is as fast, row for row, as of many
SHARE = 8  # of the rows that a tile has where some do not count, and of the logits or the kernel that a block has


class Along(enum.Enum):
    """Which axes an array of a head has: that of the rows comes first, that of the classes last.

    Of rows in place no copy in another order is made, but of a tile.
    """

    NEITHER = enum.auto()
    ROWS = enum.auto()
    ROWS_IN_PLACE = enum.auto()
    CLASSES = enum.auto()
    BOTH = enum.auto()

    @property
    def has_rows(self) -> bool:
        """Whether there is an axis of rows."""
        return self in (Along.ROWS, Along.ROWS_IN_PLACE, Along.BOTH)

    @property
    def has_classes(self) -> bool:
        """Whether there is an axis of classes."""
        return self in (Along.CLASSES, Along.BOTH)

    def add(self, total: HeldArray, term: HeldArray, start: Start, first: Start) -> Array:
        """The total of all tiles and a tile's term, in the total's dtype: what has classes comes from one block."""
        total = jnp.asarray(total)
        if self is Along.NEITHER:
            return total + term.astype(total.dtype)
        if self is Along.CLASSES:
            return put(total, term, start)
        if self is Along.BOTH:
            return put(total, put(cut(total, first, term.shape[0], axis=0), term, start), first, axis=0)
        return put(total, cut(total, first, term.shape[0], axis=0) + term.astype(total.dtype), first, axis=0)


def default_bytes(num_rows: int, num_classes: int, most: int, *, fewest_rows: int = 0) -> int:
    """What a block of logits takes where nobody says so: a share of all, but neither little nor more than `most`.

    All, if there are fewer than a number of rows.
    """
    are_few = isinstance(num_rows, int) and num_rows < fewest_rows
    return min_dim(most, max_dim(2**22, 4 * num_rows * num_classes // (1 if are_few else SHARE)))


def block_size(fitting: int, total: int) -> int:
    """How much of a total goes into a block into which a number fits: at least 1. All of them may be symbolic."""
    return min_dim(max_dim(1, fitting), max_dim(1, total))


def rows_per_tile(num_rows: int, fitting: int, counts: Bool[Array, " rows"] | None) -> int:
    """How many rows go into a tile into which a number fits: fewer than all where some need not be looked at.

    All, if nobody knows how many there are, or where the partitioner has put them.
    """
    if not isinstance(num_rows, int) or not is_local.value or num_rows == 0:
        return num_rows
    size = block_size(fitting, num_rows)
    return size if counts is None else min(size, max(_FEW_ROWS, -(-num_rows // SHARE)))


def over_blocks(step: Callable[[_Carry, Start, int], _Carry], carry: _Carry, total: int, size: int) -> _Carry:
    """Runs `carry = step(carry, start, size)` over 0 … total in blocks; the last one may be smaller.

    With symbolic sizes the last block stands alone, as nobody knows whether it is smaller, and a loop, which has one
    step at least, has one more, in which nothing is done.
    """

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


def over_chunks(function: Callable[[_Tree], _Tile], tree: _Tree, size: int) -> _Tile:
    """A function of arrays along their first axis, some of it at a time: what it makes on the way is not held whole."""

    def put_chunk(results: _Tile, start: Start, number: int) -> _Tile:
        chunk = jax.tree.map(lambda array: cut(array, start, number, 0), tree)
        return jax.tree.map(partial(put, start=start, axis=0), results, function(chunk))

    results = jax.tree.map(zeros_of, jax.eval_shape(function, tree))
    return over_blocks(put_chunk, results, jax.tree.leaves(tree)[0].shape[0], size)


def over_tiles(
    make: Callable[[Start, int], _Tile],
    add: Callable[[_Carry, _Tile, Start], _Carry],
    carry: _Carry,
    num_rows: int,
    size: int,
    counts: Bool[Array, " rows"] | None,
) -> _Carry:
    """Runs `carry = add(carry, make(first, number), first)` over tiles of rows.

    Zeros stand for what `make` would return of a tile in which no row counts.
    """

    def make_if_any(first: Start, number: int) -> _Tile:
        types = jax.eval_shape(lambda first: make(first, number), jnp.zeros((), jnp.int32))
        zeros = jax.tree.map(zeros_of, types)
        is_any = jnp.any(cut(jnp.asarray(counts), first, number))
        return lax.cond(is_any, lambda: make(first, number), lambda: zeros)

    if size == num_rows:
        return add(carry, make(0, num_rows), 0)
    make_tile = make if counts is None else make_if_any

    def step(carry: _Carry, first: Start, number: int) -> _Carry:
        return add(carry, make_tile(first, number), first)

    return over_blocks(step, carry, num_rows, size)


def over_counting_tiles(
    step: Callable[[_Carry, Start, int], _Carry],
    carry: _Carry,
    num_rows: int,
    size: int,
    counts: Bool[Array, " rows"] | None,
    order: "Order",
) -> _Carry:
    """Runs `carry = step(carry, first, number)` over the tiles of rows in which some count. It has no derivative."""

    def step_if_any(carry: _Carry, first: Start, number: int) -> _Carry:
        is_any = jnp.any(cut(jnp.asarray(counts), first, number))
        return lax.cond(is_any, lambda carry: step(carry, first, number), lambda carry: carry, carry)

    if size == num_rows:
        return step(carry, 0, num_rows)
    if counts is None or order.places is None:
        return over_blocks(step if counts is None else step_if_any, carry, num_rows, size)
    # Those that count come first: the loop ends behind them.
    whole, rest = divmod(num_rows, size)
    needed = jnp.sum(counts, dtype=jnp.int32)
    steps = jnp.minimum((needed + size - 1) // size, whole)
    carry = lax.fori_loop(jnp.zeros_like(steps), steps, lambda i, carry: step(carry, i * size, size), carry)
    if rest == 0:
        return carry
    start = keep(jnp.asarray(whole * size, jnp.int32))
    return lax.cond(needed > whole * size, lambda carry: step(carry, start, rest), lambda carry: carry, carry)


def zeros_of(leaf: jax.ShapeDtypeStruct) -> Array:
    """Zeros of a type, which is also one of a device's own numbers or of all devices'."""
    axes = leaf.manual_axis_type.varying if leaf.manual_axis_type is not None else ()
    return vary(jnp.zeros(leaf.shape, leaf.dtype), axes)


def add_block(
    make: Callable[[Start, int], _Tree],
    total: _Tree,
    along: _Tree,
    start: Start,
    num_rows: int,
    size: int,
    counts: Bool[Array, " rows"] | None,
    scatter: Callable[[_Tree], _Tree],
) -> _Tree:
    """The total and the terms of a block of classes, which `make` returns for tiles of its rows.

    `scatter` makes of the sums over all rows what this device is to have of them.
    """
    if size == num_rows:
        terms = scatter(make(0, num_rows))
        return jax.tree.map(lambda along, *pair: along.add(*pair, start, 0), along, total, terms)

    def add(carry: tuple[_Tree, _Tree], tile: _Tree, first: Start) -> tuple[_Tree, _Tree]:
        def add_rows(along: Along, total: Array, term: Array) -> Array:
            return total if along is Along.CLASSES else along.add(total, term, start, first)

        def add_classes(along: Along, sums: Array, term: Array) -> Array:
            return sums + term if along is Along.CLASSES else sums

        return jax.tree.map(add_rows, along, carry[0], tile), jax.tree.map(add_classes, along, carry[1], tile)

    def no_sums(along: Along, leaf: jax.ShapeDtypeStruct) -> Array:
        return zeros_of(leaf) if along is Along.CLASSES else jnp.zeros(())

    types = jax.eval_shape(lambda first: make(first, size), jnp.zeros((), jnp.int32))
    carry = total, jax.tree.map(no_sums, along, types)
    total, sums = over_tiles(make, add, carry, num_rows, size, counts)
    sums = scatter(sums)
    return jax.tree.map(
        lambda along, total, sums: put(total, sums, start) if along is Along.CLASSES else total, along, total, sums
    )


class Order:
    """The rows that count before those that do not, so that few tiles have one; or all where they are."""

    def __init__(self, counts: Bool[Array, " rows"] | None, size: int, *, is_cheap: bool):
        """Of tiles of a size, if it is cheap to move the rows."""
        self.places = None
        if counts is not None and size != counts.shape[0] and is_cheap:
            self.places: Integer[Array, " rows"] | None = jnp.argsort(~counts, stable=True)

    def of(self, tree: _Tree, along: object = None) -> _Tree:
        """Arrays in this order, if they have rows that are not to stay in place; all have, if nothing is said of it."""
        return self._moved(tree, along, self.places, {Along.ROWS, Along.BOTH})

    def restored(self, tree: _Tree, along: object = None) -> _Tree:
        """Arrays of this order as the rows were."""
        places = None if self.places is None else jnp.argsort(self.places)
        return self._moved(tree, along, places, {Along.ROWS, Along.BOTH, Along.ROWS_IN_PLACE})

    def _moved(self, tree: _Tree, along: object, places: Integer[Array, " rows"] | None, which: set[Along]) -> _Tree:
        if places is None:
            return tree

        def moved(array: Array, along: Along = Along.ROWS) -> Array:
            return rows_at(array, places) if along in which else array

        return jax.tree.map(moved, tree) if along is None else jax.tree.map(moved, tree, along)


def rows_at(array: HeldArray, places: Integer[Array, " some"]) -> Array:
    """Some rows of an array, each at most once."""
    return jnp.asarray(array).at[places].get(mode="promise_in_bounds", unique_indices=True)


@overload
def cut(array: HeldArray, start: Start, size: int, axis: int = ...) -> Array: ...
@overload
def cut(array: None, start: Start, size: int, axis: int = ...) -> None: ...
def cut(array: HeldArray | None, start: Start, size: int, axis: int = -1) -> Array | None:
    """A block of an array, or None of None."""
    if array is None:
        return None
    array = jnp.asarray(array)
    if array.shape[axis] == size:
        return array
    return move(partial(lax.dynamic_slice_in_dim, slice_size=size, axis=axis), array, to=start)


def cut_classes(tree: _Tree, along: object, start: Start, size: int) -> _Tree:
    """A block of the arrays that have classes."""
    return jax.tree.map(lambda array, along: cut(array, start, size) if along.has_classes else array, tree, along)


def cut_rows(
    tree: _Tree, along: object, first: Start, number: int, places: Integer[Array, " rows"] | None = None
) -> _Tree:
    """A tile of the arrays that have rows; of rows in place, those at the tile's places if there are any."""
    of_tile = cut(places, first, number, 0)

    def cut_tile(array: Array, along: Along) -> Array:
        if along is Along.ROWS_IN_PLACE and of_tile is not None:
            return rows_at(array, of_tile)
        return cut(array, first, number, 0) if along.has_rows else array

    return jax.tree.map(cut_tile, tree, along)


def put(array: HeldArray, block: HeldArray, start: Start, axis: int = -1) -> Array:
    """The array with a block replaced, in the array's dtype."""
    block = jnp.asarray(block, array.dtype)
    if array.shape == block.shape:
        return block
    return move(partial(lax.dynamic_update_slice_in_dim, axis=axis), jnp.asarray(array), block, to=start)
