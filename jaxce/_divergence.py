"""How far the predictions of two models are from each other, for logits that are held and for linear heads.

The rule of `_rule` wants targets that are given. A teacher's are known only when all of its classes have been seen, and
a difference of two of its losses has no digits left where student and teacher agree. So this is a rule of its own, for
a row of a student's and a teacher's logits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxce._autodiff import rule
from jaxce._blocks import (
    Along,
    Order,
    Start,
    add_block,
    cut,
    cut_classes,
    cut_rows,
    over_blocks,
    over_tiles,
    put,
)
from jaxce._conventions import accumulator, silence, without_padding
from jaxce._head import (
    along_of,
    finish,
    gather_features,
    head_gradient,
    keep_no_kernel,
    no_gradient,
    project,
    rounded,
    scatter_features,
    soften,
    tile_shape,
)
from jaxce._logits import LinearLogits
from jaxce._mesh import Classes, vary, varying
from jaxce._rule import over_rows, row_maximum
from jaxce._xla import apart

_Class = Float[Array, " classes"]
_Number = Float[Array, "*any"]
_Result = TypeVar("_Result")
_OfLogits = tuple[_Class, _Class, _Number]  # by the logits of student and teacher and by the temperature
Gradient = Callable[..., _OfLogits]  # (logits, temperature, numbers of the row, cotangents) → what these have

#     z, t   the logits of student and teacher          m, n   their maxima, constants to every derivative
#     p, q   softmax(z / T), softmax(t / T)             L, M   log Σ exp((z − m) / T), log Σ exp((t − n) / T)
#
#     δ_c = ((z_c − t_c) − (m − n)) / T                 K      log Σ_c q_c exp(δ_c) = L − M
#     r_c = δ_c − K = log p_c − log q_c
#
# The divergence is D = −Σ_c q_c r_c, a sum of numbers of both signs. Near agreement they are of the size of r, and what
# is left of them is of the size of r². But Σ_c (p_c − q_c) = 0 may be added to it, and then no term is negative:
#
#     D = Σ_c (p_c − q_c − q_c r_c) = Σ_c q_c φ(r_c)          φ(r) = exp(r) − 1 − r ≥ 0
#
# Where |r| < 1/2, φ is summed as r²/2 (1 + r/3 (1 + r/4 (1 + …))), and p − q is q (r + φ(r)); elsewhere p, q and q r
# are too far apart to cancel. Likewise K = log1p(Σ_c q_c (exp(δ_c) − 1)) unless it is large. δ is as exact as r has to
# be if z − t and m − n are taken first: near agreement both are small.
#
# A row may come in parts, blocks of classes or the slices of devices. Let part i hold the shares α_i and β_i of the
# teacher's mass and of the student's, and let D_i be the divergence of what the two say of the classes inside it, and
# K_i its K, both measured from its own maxima m_i and n_i. Then a part is to the row what a class is to it:
#
#     δ_i = ((m_i − n_i) − (m − n)) / T + K_i           D = Σ_i (β_i − α_i − α_i r_i) + Σ_i α_i D_i
#
# which is the chain rule of the divergence. A class is a part of mass 1, with K_c = D_c = 0.
#
# With a, b, c, d the cotangents of L, M, K, D:
#
#     T dz = (a + c) p + d (p − q)          T dt = (b − c) q − d q (r + D)
#
# With u = (z − m) / T, du = T dz, and v and dv of the teacher, the derivative by T is −Σ_c (u du + v dv) / T. Near
# agreement it is of the size of r² too, and its terms are so if they are put together as
#
#     u du + v dv = δ du + v (du + dv)          du + dv = a p + b q + c (p − q) + d ((p − q − q r) − q D)


class Pair(NamedTuple):
    """The inputs of the rule: the logits of student and teacher of one row, or of rows along axes in front.

    A row may be a slice of `classes`: `real` is how many classes from its start on are no padding, None where all are.
    The arithmetic is in the dtype of the temperature.
    """

    student: _Class
    teacher: _Class
    temperature: Float[Array, ""]
    counts: Bool[Array, ""] | None
    real: Array | int | None
    classes: Classes


PAIR_AXES = Pair(0, 0, None, 0, None, None)  # pyright: ignore[reportArgumentType]  # what vmap maps over


class Distance(NamedTuple):
    """The outputs of the rule: D, or another divergence, and K, and L and M with the maxima they are measured from."""

    divergence: _Number
    log_ratio: _Number
    log_sums: tuple[_Number, _Number]
    maxima: tuple[_Number, _Number]


class Part(NamedTuple):
    """What student and teacher say of some of a row's classes. Disjoint parts merge; a class is one too.

    Attributes:
        maxima: the largest logit of either.
        masses: Σ exp((z − maximum) / T) of either.
        log_ratio: the log of how many times the teacher's mass the student's is.
        divergence: of the distributions that the two have over these classes alone; None of a single class.
    """

    maxima: tuple[_Number, _Number]
    masses: tuple[_Number, _Number]
    log_ratio: Any  # a _Number; of a single class 0
    divergence: Any  # a _Number; of a single class None


_Copy = tuple[Part, tuple[_Number, _Number], _Number]


def _merge(copies: Sequence[_Copy], total: Callable[[Any], Any]) -> Part:
    """The part that parts make up.

    Where one of the two has no mass at all, the divergence is of no meaning, and no part larger than this reads it.

    Args:
        copies: for each of four sums the parts, the maxima of what they make up, and the temperature.
        total: the sum over the parts.
    """

    def mass(copy, i):
        part, maxima, temperature = copy
        return part.masses[i] * jnp.exp((part.maxima[i] - maxima[i]) / temperature)

    def lead(copy):
        part, maxima, temperature = copy
        return _lead(*part.maxima, *maxima) / temperature + part.log_ratio

    def difference(copy):
        return differences(mass(copy, 0), mass(copy, 1), lead(copy))[0]

    def divergence(copy, masses, log_ratio):
        part, q = copy[0], mass(copy, 1) / masses[1]
        between = differences(mass(copy, 0) / masses[0], q, lead(copy) - log_ratio)[1]
        if part.divergence is None:
            return between
        return between + q * jnp.where((q == 0) | jnp.isneginf(part.log_ratio), 0, part.divergence)

    student, teacher, ratio_less_1 = total((mass(copies[0], 0), mass(copies[1], 1), difference(copies[2])))
    ratio_less_1 /= teacher
    log_ratio = jnp.where(jnp.abs(ratio_less_1) < 0.5, jnp.log1p(ratio_less_1), jnp.log(student) - jnp.log(teacher))
    masses = student, teacher
    return Part(copies[0][1], masses, log_ratio, total(divergence(copies[3], masses, log_ratio)))


def _lead(z: _Number, t: _Number, m: _Number, n: _Number) -> _Number:
    """(z − t) − (m − n), to the last digits of the logits, whatever the offset between student and teacher is."""
    (near, rest), (offset, offset_rest) = _subtract(z, jnp.where(jnp.isneginf(t), 0, t)), _subtract(m, n)
    lead = (near - offset) + lax.stop_gradient(rest - offset_rest)
    return jnp.where(jnp.isfinite(lead), lead, (z - m) - (t - n))


@jax.custom_jvp
def _soften_lead(lead: _Number, temperature: _Number) -> _Number:
    """The lead over the temperature, to which that of a class that is left out does not answer."""
    return lead / temperature


@_soften_lead.defjvp
def _push_soften_lead(primals, tangents):
    lead, temperature = primals
    d_lead, d_temperature = tangents
    softened = _soften_lead(lead, temperature)
    return softened, (d_lead - jnp.where(jnp.isfinite(softened), softened, 0) * d_temperature) / temperature


def _subtract(a: _Number, b: _Number) -> tuple[_Number, _Number]:
    """The difference, and what its rounding left out (Knuth's two-sum)."""
    difference = a - b
    taken = difference - a
    return difference, (a - (difference - taken)) - (b + taken)


def differences(p: _Number, q: _Number, r: _Number) -> tuple[_Number, _Number]:
    """The differences p − q and p − q − q r, the second never negative: for p = q exp(r), and any r where q is 0."""
    near = (jnp.abs(r) < 0.5) & (q != 0)
    small = jnp.where(near, r, 0)
    series = jnp.ones_like(small)
    for order in range(8 if small.dtype == jnp.float32 else 14, 2, -1):
        series = 1 + small * series * (1 / order)
    phi = small * small * series / 2
    far = q * jnp.where(near | (q == 0), 0, r)
    return jnp.where(near, q * (small + phi), p - q), jnp.where(near, q * phi, p - q - far)


def _part(pair: Pair) -> Part:
    """The classes of a row, or of a slice of it, as one part."""
    dtype = pair.temperature.dtype
    student, teacher = _logits(pair)
    maxima = row_maximum(student, dtype), row_maximum(teacher, dtype)
    one = jnp.ones((), dtype)
    copies = [
        (Part(_logits(pair), (one, one), 0, None), maxima, pair.temperature)
        for pair, maxima in apart((pair, maxima), 4)
    ]
    return _merge(copies, lambda terms: jax.tree.map(jnp.sum, terms))


def _join(left: Part, right: Part, temperature: _Number) -> Part:
    """The part that two parts of a row make up."""
    maxima = jax.tree.map(jnp.maximum, left.maxima, right.maxima)
    both = jax.tree.map(lambda *numbers: jnp.stack(numbers), left, right)
    return _merge([(both, maxima, temperature)] * 4, lambda terms: jax.tree.map(lambda term: term[0] + term[1], terms))


def _distance(part: Part, temperature: _Number, classes: Classes) -> Distance:
    """What a row's part says, once it has been merged over the devices."""
    if classes.axes:
        part = _merge([(part, lax.pmax(part.maxima, classes.axes), temperature)] * 4, classes.sum)
    student, teacher = part.masses
    return Distance(part.divergence, part.log_ratio, (jnp.log(student), jnp.log(teacher)), part.maxima)


class Softened(NamedTuple):
    """The classes at hand of a row: u, v, δ, p, q and r."""

    student: _Class
    teacher: _Class
    lead: _Class
    p: _Class
    q: _Class
    log_ratio: _Class


def soften_pair(logits: tuple[_Class, _Class], temperature: _Number, distance: Distance) -> Softened:
    """What the logits of student and teacher are once the numbers of the whole row are known."""
    (_, log_ratio, log_sums, maxima), (z, t) = distance, logits
    u, v = soften(z - maxima[0], temperature), soften(t - maxima[1], temperature)
    p, q = jnp.exp(u - log_sums[0]), jnp.exp(v - log_sums[1])
    lead = _soften_lead(_lead(z, t, *maxima), temperature)
    return Softened(u, v, lead, p, q, lead - log_ratio)


def unsoften(softened: Softened, d_u: _Class, d_v: _Class, of_both: _Class, temperature: _Number) -> _OfLogits:
    """The gradients by z, t and T of what has those by u and v, `of_both` being their sum to all its digits."""
    u, v = _finite(softened.student), _finite(softened.teacher)
    is_finite = jnp.isfinite(softened.student) & jnp.isfinite(softened.teacher)
    d_temperature = -jnp.sum(d_u * jnp.where(is_finite, softened.lead, u - v) + of_both * v)
    return d_u / temperature, d_v / temperature, d_temperature / temperature


def _gradient(
    logits: tuple[_Class, _Class], temperature: _Number, distance: Distance, cotangents: Distance
) -> _OfLogits:
    """The rule's gradient by the logits of a row at the classes at hand, and what these add to the temperature's."""
    d, c, (a, b), _ = cotangents
    softened, divergence = soften_pair(logits, temperature, distance), distance.divergence
    p, q, r = softened.p, softened.q, softened.log_ratio
    difference, term = differences(p, q, r)
    d_u = (a + c) * p + d * difference
    d_v = (b - c) * q - d * q * jnp.where(q == 0, 0, r + divergence)
    of_both = a * p + b * q + c * difference + d * (term - q * divergence)
    return unsoften(softened, d_u, d_v, of_both, temperature)


def _finite(logits: _Class) -> _Class:
    return jnp.where(jnp.isinf(logits), 0, logits)


def _logits(pair: Pair) -> tuple[_Class, _Class]:
    """Zeros where the row does not count, and classes of probability 0 in place of padding."""
    student, teacher = (
        silence(pair.counts, without_padding(logits.astype(pair.temperature.dtype), pair.real, -jnp.inf))
        for logits in (pair.student, pair.teacher)
    )
    return student, teacher


def _forward(pairs: Pair) -> Distance:
    def of_row(pair):
        return _distance(_part(pair), pair.temperature, pair.classes)

    return over_rows(of_row, pairs.student.ndim - 1, (PAIR_AXES,))(pairs)


def _backward(pairs: Pair, distance: Distance, cotangents: Distance) -> Pair:
    def of_row(pair, distance, cotangents):
        return _gradient(_logits(pair), pair.temperature, distance, cotangents)

    of_rows = over_rows(of_row, pairs.student.ndim - 1, (PAIR_AXES, 0, 0))
    student, teacher, temperature = of_rows(pairs, distance, cotangents)
    student, teacher = student.astype(pairs.student.dtype), teacher.astype(pairs.teacher.dtype)
    return Pair(student, teacher, jnp.sum(temperature), None, None, pairs.classes)


measure_pairs = rule(_forward, _backward)


# Logits, and what makes of a gradient by them that by what they consist of.
_Held = tuple[Array, Callable[[Array], LinearLogits | Array]]


class Heads(NamedTuple):
    """The inputs of the rule where the classes come in blocks, as those of lazy logits do: a `Pair` for all rows."""

    student: LinearLogits | Float[Array, "rows classes"]
    teacher: LinearLogits | Float[Array, "rows classes"]
    temperature: Float[Array, ""]
    counts: Bool[Array, " rows"] | None
    real: Array | int | None
    classes: Classes
    places: Array | None = None  # of hidden's rows, where all else has been put in another order

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the arithmetic."""
        return accumulator(self.student, self.teacher)

    @property
    def tile_shape(self) -> tuple[int, int]:
        """How many rows and classes are in a tile."""
        return tile_shape([self.student, self.teacher], self.counts)

    @property
    def along(self) -> "Heads":
        """Which axes the arrays have."""
        along: Any = {
            "student": along_of(self.student),
            "teacher": along_of(self.teacher),
            "temperature": Along.NEITHER,
            "counts": None if self.counts is None else Along.ROWS,
            "real": None if self.real is None else Along.NEITHER,
            "places": None if self.places is None else Along.NEITHER,
        }
        return self._replace(**along)

    def order(self) -> Order:
        """Where the rows that count stand first, if both models are lazy."""
        is_lazy = isinstance(self.student, LinearLogits) and isinstance(self.teacher, LinearLogits)
        return Order(self.counts, self.tile_shape[0], is_cheap=is_lazy)

    def ordered(self, order: Order) -> "Heads":
        """The rows in an order; hidden, the largest of the arrays, stays as it is."""
        return order.of(self, self.along)._replace(places=order.places)

    def tile(self, start: Start, size: int, first: Start, number: int) -> "Heads":
        """Some of the rows over some of the classes."""
        block = self.block(start, size)._replace(places=None)
        return cut_rows(block, block.along, first, number, self.places)

    def block(self, start: Start, size: int) -> "Heads":
        """The rows over some of the classes."""
        block = cut_classes(self, self.along, start, size)
        return block._replace(real=None if self.real is None else self.real - start)

    def gathered(self, start: Start, size: int) -> tuple["Heads", Start]:
        """Heads that have all features of a block of classes, and where this starts in them."""
        if not any(isinstance(head, LinearLogits) and head.feature_axis_name for head in (self.student, self.teacher)):
            return self, start
        return self.block(start, size).with_models(gather_features), 0

    def with_models(self, function: Callable[[Any], Any]) -> "Heads":
        """The same with a function of either model's logits in their place."""
        return self._replace(student=function(self.student), teacher=function(self.teacher))

    def logits(self) -> tuple[_Held, _Held]:
        """The logits of student and teacher, and what makes of a gradient by them that by what they consist of."""
        return self._held(self.student), self._held(self.teacher)

    def _held(self, block: LinearLogits | Array) -> "_Held":
        if not isinstance(block, LinearLogits):
            logits = without_padding(silence(self.counts, block.astype(self.dtype)), self.real, -jnp.inf)
            return logits, lambda d_logits: d_logits

        def of_products(products, block):
            return without_padding(finish(products, block), self.real, -jnp.inf)

        logits, pullback = jax.vjp(of_products, project(block, self.counts, self.dtype), block)
        return logits, lambda d_logits: head_gradient(block, pullback(d_logits), self.counts)


def distance_of_heads(heads: Heads) -> Distance:
    """The outputs of the rule, by one pass over the blocks."""
    temperature = heads.temperature.astype(heads.dtype)
    (num_rows, num_classes), (rows_at_once, classes_at_once), order = (
        heads.student.shape,
        heads.tile_shape,
        heads.order(),
    )
    heads = heads.ordered(order)
    zeros = jnp.zeros(num_rows, heads.dtype)
    least = zeros + jnp.finfo(heads.dtype).min
    nothing = vary(Part((least, least), (zeros, zeros), zeros - jnp.inf, zeros), varying(heads))

    def join_block(part: Part, start: Start, size: int) -> Part:
        gathered, own_start = heads.gathered(start, size)

        def part_of_tile(first: Start, number: int) -> Part:
            (z, _), (t, _) = gathered.tile(own_start, size, first, number).logits()
            pairs = Pair(z, t, temperature, None, None, heads.classes)
            return jax.vmap(_part, in_axes=(PAIR_AXES,))(pairs)

        block = over_tiles(part_of_tile, _put_rows, nothing, num_rows, rows_at_once, heads.counts)
        return jax.vmap(_join, in_axes=(0, 0, None))(part, block, temperature)

    part = order.restored(over_blocks(join_block, nothing, num_classes, classes_at_once))
    return _distance(part, temperature, heads.classes)


def _put_rows(total: _Result, tile: _Result, first: Start) -> _Result:
    return jax.tree.map(partial(put, start=first, axis=0), total, tile)


def sum_heads(of_row: Callable[..., _Result], heads: Heads, numbers: object, nothing: _Result) -> _Result:
    """The sums over the classes at hand, of which of_row(logits, temperature, numbers) makes those of a block."""
    (num_rows, num_classes), (rows_at_once, classes_at_once), order = (
        heads.student.shape,
        heads.tile_shape,
        heads.order(),
    )
    heads, numbers = heads.ordered(order), order.of(numbers)
    nothing = vary(nothing, varying(heads))

    def add_block_of_sums(sums: _Result, start: Start, size: int) -> _Result:
        gathered, own_start = heads.gathered(start, size)

        def sums_of_tile(first: Start, number: int) -> _Result:
            return _sums_of_tile(of_row, gathered, numbers, own_start, size, first, number)

        block = over_tiles(sums_of_tile, _put_rows, nothing, num_rows, rows_at_once, heads.counts)
        return jax.tree.map(jnp.add, sums, block)

    add_block_of_sums = keep_no_kernel(add_block_of_sums, heads.student, heads.teacher)
    return order.restored(over_blocks(add_block_of_sums, nothing, num_classes, classes_at_once))


def pull_heads(gradient: Gradient, heads: Heads, numbers: object, cotangents: object) -> Heads:
    """The gradient by all inputs, given that of a row."""
    (num_rows, num_classes), (rows_at_once, classes_at_once), order = (
        heads.student.shape,
        heads.tile_shape,
        heads.order(),
    )
    along = heads.along._replace(counts=None, real=None)
    heads, numbers, cotangents = heads.ordered(order), order.of(numbers), order.of(cotangents)
    zeros = heads._replace(
        student=no_gradient(heads.student),
        teacher=no_gradient(heads.teacher),
        temperature=jnp.zeros_like(heads.temperature.astype(heads.dtype)),
        counts=None,
        real=None,
        places=None,
    )

    def add_gradient(total: Heads, start: Start, size: int) -> Heads:
        gathered, own_start = heads.gathered(start, size)

        def of_tile(first: Start, number: int) -> Heads:
            return _gradient_of_tile(gradient, gathered, numbers, cotangents, own_start, size, first, number)

        def scatter(block: Heads) -> Heads:
            return block.with_models(scatter_features)

        return add_block(of_tile, total, along, start, num_rows, rows_at_once, heads.counts, scatter)

    add_gradient = keep_no_kernel(add_gradient, heads.student, heads.teacher)
    total = over_blocks(add_gradient, zeros, num_classes, classes_at_once)
    total = total._replace(
        student=rounded(total.student, heads.student),
        teacher=rounded(total.teacher, heads.teacher),
        temperature=total.temperature.astype(heads.temperature.dtype),
    )
    return order.restored(total, along)


# Under checkpoint: a derivative of a loop must not keep what the tiles are made of.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=(0, 4, 6))
def _sums_of_tile(
    of_row: Callable[..., _Result], heads: Heads, numbers: object, start: Start, size: int, first: Start, number: int
) -> _Result:
    (z, _), (t, _) = heads.tile(start, size, first, number).logits()
    numbers = jax.tree.map(partial(cut, start=first, size=number, axis=0), numbers)
    return jax.vmap(of_row, in_axes=(0, None, 0))((z, t), heads.temperature.astype(heads.dtype), numbers)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(0, 5, 7))
def _gradient_of_tile(
    gradient: Gradient,
    heads: Heads,
    numbers: object,
    cotangents: object,
    start: Start,
    size: int,
    first: Start,
    number: int,
) -> Heads:
    tile, temperature = heads.tile(start, size, first, number), heads.temperature.astype(heads.dtype)
    numbers, cotangents = jax.tree.map(partial(cut, start=first, size=number, axis=0), (numbers, cotangents))
    (z, by_student), (t, by_teacher) = tile.logits()
    d_z, d_t, d_temperature = jax.vmap(gradient, in_axes=(0, None, 0, 0))((z, t), temperature, numbers, cotangents)
    return tile._replace(
        student=by_student(d_z), teacher=by_teacher(d_t), temperature=jnp.sum(d_temperature), counts=None, real=None
    )


def _backward_of_heads(heads: Heads, distance: Distance, cotangents: Distance) -> Heads:
    return pull_heads(_gradient, heads, distance, cotangents)


measure_heads = rule(distance_of_heads, _backward_of_heads)
