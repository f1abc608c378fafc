"""How far the predictions of one linear head are from another's, where neither's logits are held.

The rule of `_rule` wants targets that are given. A teacher's are known only when all of its classes have been seen, so
they enter the sums unnormalized, measured from the largest teacher logit so far, and are scaled when a larger comes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxce._autodiff import forward_mode
from jaxce._head import (
    add_to_gradient,
    block_of,
    classes_per_block,
    finish,
    no_gradient,
    over_blocks,
    project,
    rounded,
)
from jaxce._inputs import Head, accumulator
from jaxce._mesh import Classes, vary, varying
from jaxce._rule import Row, row_maximum, slice_row, without_padding
from jaxce._slice import Moment, Slice, empty, merge, merge_devices

_PerRow = Float[Array, " rows"]

#     z, t   the logits of student and teacher          m, n   their maxima, constants to every derivative
#     p, q   their softmax                              L, M   log Σ exp(z − m), log Σ exp(t − n)
#
#     D = Σ_c q_c (log q_c − log p_c) = Σ_c q_c ((m − z_c) − (n − t_c)) + L − M
#
# With a, b, d the cotangents of L, M, D:
#
#     dz = a p + d (p − q)          dt = b q + d q ((log q − log p) − D)


class Heads(NamedTuple):
    """The inputs of the rule: a student and a teacher over the same rows and classes."""

    student: Head
    teacher: Head
    counts: Bool[Array, " rows"] | None
    real: Any
    classes: Classes

    @property
    def dtype(self) -> Any:
        """The dtype of the arithmetic."""
        return accumulator(self.student, self.teacher)

    def block(self, start: Any, size: int) -> "Heads":
        """The same rows over some of the classes."""
        student, teacher = (block_of(head, start, size) for head in (self.student, self.teacher))
        real = None if self.real is None else self.real - start
        return Heads(student, teacher, self.counts, real, self.classes)

    def logits(self) -> list[tuple[Array, Any]]:
        """The logits of student and teacher, and what takes a gradient of them to `add_to_gradient`."""

        def held(head):
            def of_products(products, head):
                return without_padding(finish(products, head), self.real, -jnp.inf)

            return jax.vjp(of_products, project(head, self.counts, self.dtype), head)

        return [held(self.student), held(self.teacher)]


class Distance(NamedTuple):
    """The outputs of the rule: D, and what it is measured with."""

    divergence: _PerRow
    log_sums: tuple[_PerRow, _PerRow]
    maxima: tuple[_PerRow, _PerRow]


@jax.custom_vjp
def _rule(heads: Heads) -> Distance:
    dtype = heads.dtype
    num_rows, num_classes = heads.student.shape

    def add_block(slices, start, size):
        logits = [array for array, _ in heads.block(start, size).logits()]
        maxima = [jax.vmap(partial(row_maximum, dtype=dtype))(array) for array in logits]
        mass = jnp.exp(logits[1] - maxima[1][:, None])
        block = [
            jax.vmap(lambda z, t, m: slice_row(Row(z, t, None, None, None, m, None, heads.classes)))(array, mass, top)
            for array, top in zip(logits, maxima, strict=True)
        ]
        maximum = jnp.maximum(slices[1].maximum, maxima[1])
        return [
            merge(*parts)
            for parts in zip(
                _scaled(slices, slices[1].maximum - maximum), _scaled(block, maxima[1] - maximum), strict=True
            )
        ]

    nothing = vary(empty(num_rows, dtype), varying(heads))
    parts = over_blocks(add_block, [nothing, nothing], num_classes, classes_per_block(heads.student))
    if heads.classes.axes:
        maximum = lax.pmax(parts[1].maximum, heads.classes.axes)
        parts = [merge_devices(part, heads.classes) for part in _scaled(parts, parts[1].maximum - maximum)]
    student, teacher = parts
    log_sums = (jnp.log1p(student.sum_less_1), jnp.log1p(teacher.sum_less_1))
    cross = (student.target.excess - teacher.target.excess) / teacher.target.mass
    return Distance(cross + (log_sums[0] - log_sums[1]), log_sums, (student.maximum, teacher.maximum))


def _scaled(slices: list[Slice], by: _PerRow) -> list[Slice]:
    """Slices of student and teacher whose targets are measured from another maximum of the teacher."""
    scale = jnp.exp(by)
    return [part._replace(target=Moment(*(scale * number for number in part.target))) for part in slices]


def _rule_forward(heads: Heads) -> tuple[Distance, tuple[Heads, Distance]]:
    distance = measure_divergence(heads)  # the lifted rule, so that a second derivative meets the rule again
    return distance, (heads, distance)


def _rule_backward(residuals: tuple[Heads, Distance], cotangents: Distance) -> tuple[Heads]:
    heads, (divergence, log_sums, maxima) = residuals
    d_divergence, d_log_sums, _ = cotangents

    def add_block(gradients, start, size):
        block = heads.block(start, size)
        (z, student_pullback), (t, teacher_pullback) = block.logits()

        def of_row(z, t, d, d_log_sums, divergence, log_sums, maxima):
            log_p, log_q = (z - maxima[0]) - log_sums[0], (t - maxima[1]) - log_sums[1]
            p, q = jnp.exp(log_p), jnp.exp(log_q)
            ratio = jnp.where(q == 0, 0, log_q - jnp.where(q == 0, 0, log_p))
            return d_log_sums[0] * p + d * (p - q), d_log_sums[1] * q + d * q * (ratio - divergence)

        d_z, d_t = jax.vmap(of_row)(z, t, d_divergence, d_log_sums, divergence, log_sums, maxima)
        return [
            add_to_gradient(gradients[0], block.student, student_pullback(d_z), heads.counts, start),
            add_to_gradient(gradients[1], block.teacher, teacher_pullback(d_t), heads.counts, start),
        ]

    zeros = [no_gradient(heads.student), no_gradient(heads.teacher)]
    student, teacher = over_blocks(add_block, zeros, heads.student.shape[-1], classes_per_block(heads.student))
    return (Heads(rounded(student, heads.student), rounded(teacher, heads.teacher), None, None, heads.classes),)


_rule.defvjp(_rule_forward, _rule_backward)
measure_divergence = forward_mode(_rule)
