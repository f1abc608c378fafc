"""The divergence of two models from their mixture: one row of either, and blocks of two heads.

The sums of `_divergence` merge by a chain rule that this has not: what a class adds depends on the log-sums of the
whole row. So there are two passes, of which the first is that of `_divergence`. Lazy logits are made once more for the
second: five matrix multiplications for the loss and its gradient, where the other divergences need four.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxce._autodiff import rule
from jaxce._divergence import (
    Distance,
    Heads,
    Softened,
    differences,
    distance_of_heads,
    pull_heads,
    soften_pair,
    sum_heads,
    unsoften,
)
from jaxce._mesh import vary, vary_rule, varying
from jaxce._types import PerRow
from jaxce._xla import apart

_Class = Float[Array, " classes"]
_Number = Float[Array, "*any"]
_OfModels = tuple[_Number, _Number]

# With z, t, p, q, L, M, K and r as in `_divergence`, β the teacher's part in the mixture, and of every class
#
#     m_c = β q_c + (1 − β) p_c
#     x_c = log(m_c / p_c) = log((1 − β) + β exp(−r_c))
#     y_c = log(m_c / q_c) = log(β + (1 − β) exp(r_c))
#
# the divergence is J = (1 − β) A + β B, of which A and B are those of the models from the mixture. As Σ_c (m_c − p_c) =
# Σ_c (m_c − q_c) = 0, they are sums of terms that are not negative, and of the size of r² near agreement:
#
#     A = −Σ_c p_c x_c = Σ_c p_c φ(x_c)          B = −Σ_c q_c y_c = Σ_c q_c φ(y_c)
#
# x and y are as exact as r by log1p and expm1, and where these would not be, sums of positive numbers. A class that one
# of the two leaves out adds what m_c is: all is finite.
#
# In the derivative of J that of m cancels. With d, a, b, c the cotangents of J, L, M, K:
#
#     T dz = (a + c) p − d (1 − β) p (x + A)          T dt = (b − c) q − d β q (y + B)          dβ = d (B − A)
#
# and for the temperature, as (1 − β) p x + β q y is −((1 − β) p φ(x) + β q φ(y)) class by class:
#
#     du + dv = a p + b q + c (p − q) + d ((1 − β) p (φ(x) − A) + β q (φ(y) − B))
#
# A and B come from the forward pass. They are no sums that have a derivative by themselves: that of A has a sum in it
# which has one by another sum, and so on. Who asks for a second derivative gets that of the second pass.


class Mixed(NamedTuple):
    """The inputs of the rule: two models, and the teacher's part in their mixture."""

    heads: Heads
    mixture: Float[Array, ""]


class Mixture(NamedTuple):
    """The outputs of the rule: J with K, L, M and the maxima, and A and B, of which nobody may take a derivative."""

    distance: Distance
    of_models: _OfModels


class _Numbers(NamedTuple):
    """What is known of a row in the second pass."""

    distance: Distance
    mixture: _Number


def jensen_shannon(heads: Heads, mixture: Float[Array, ""]) -> PerRow:
    """J of every row."""
    heads = vary_rule(heads)
    mixture = vary(mixture, varying(heads) - {*heads.classes.axes})
    return _measure(Mixed(heads, mixture)).distance.divergence


def _forward(mixed: Mixed) -> Mixture:
    heads, mixture = mixed
    distance = distance_of_heads(heads)
    of_student, of_teacher = of_models = _of_models(mixed, distance)
    return Mixture(distance._replace(divergence=(1 - mixture) * of_student + mixture * of_teacher), of_models)


def _of_models(mixed: Mixed, distance: Distance) -> _OfModels:
    """A and B, by the second pass."""
    zeros = jnp.zeros_like(distance.divergence)
    return mixed.heads.classes.sum(sum_heads(_sums, mixed.heads, _numbers(mixed, distance), (zeros, zeros)))


@jax.custom_jvp
def _known(of_models: _OfModels, mixed: Mixed, distance: Distance) -> _OfModels:
    """A and B as they are known, with the derivative of what they are."""
    return of_models


@_known.defjvp
def _push_known(primals, tangents):
    return _known(*primals), jax.jvp(_of_models, primals[1:], tuple(tangents[1:]))[1]


def _backward(mixed: Mixed, outputs: Mixture, cotangents: Mixture) -> Mixed:
    distance = outputs.distance
    of_student, of_teacher = of_models = _known(outputs.of_models, mixed, distance)
    numbers = _numbers(mixed, distance), of_models
    gradient = pull_heads(_gradient, mixed.heads, numbers, cotangents.distance)
    by_mixture = jnp.sum(cotangents.distance.divergence * (of_teacher - of_student))
    return Mixed(gradient, by_mixture)


_measure = rule(_forward, _backward)


def _numbers(mixed: Mixed, distance: Distance) -> _Numbers:
    return _Numbers(distance, jnp.broadcast_to(mixed.mixture, distance.divergence.shape))


def _sums(logits: tuple[_Class, _Class], temperature: _Number, numbers: _Numbers) -> _OfModels:
    """What the classes at hand add to A and B, each in a loop of its own."""
    # Each by itself: JAX 0.12 cannot transpose a barrier around one that moves and one that does not.
    student, teacher = (apart(of_model, 2) for of_model in logits)
    mixes = [_mix(pair, temperature, numbers) for pair in zip(student, teacher, strict=True)]
    return jnp.sum(_terms(*mixes[0])[0]), jnp.sum(_terms(*mixes[1])[1])


def _mix(
    logits: tuple[_Class, _Class], temperature: _Number, numbers: _Numbers
) -> tuple[Softened, _Number, _Class, _Class]:
    """The classes at hand with β, x and y."""
    mixture, softened = numbers.mixture, soften_pair(logits, temperature, numbers.distance)
    p, q = softened.p, softened.q
    # The first pass has no use for r where the teacher leaves a class out. If it leaves all out, q is NaN, and so is r.
    r = jnp.where(jnp.isneginf(softened.teacher), jnp.inf + q, softened.log_ratio)
    r = jnp.where((p == 0) & (q == 0), 0, r)
    return softened, mixture, _log_mean_exp(-r, mixture, 1 - mixture), _log_mean_exp(r, 1 - mixture, mixture)


def _terms(softened: Softened, mixture: _Number, x: _Class, y: _Class) -> tuple[_Class, _Class]:
    """P φ(x) and q φ(y)."""
    p, q = softened.p, softened.q
    m = mixture * q + (1 - mixture) * p
    return differences(m, p, x)[1], differences(m, q, y)[1]


def _log_mean_exp(r: _Class, share: _Number, rest: _Number) -> _Class:
    """log(rest + share · exp(r)) of two shares that add up to 1, as exact as r is."""
    high = 60  # of which the exponential is finite
    excess = share * jnp.expm1(jnp.minimum(r, high))
    near = (excess > -0.5) & (r < high)
    top = jnp.maximum(r, 0)
    far = top + jnp.log(rest * jnp.exp(-top) + share * jnp.exp(jnp.minimum(r, 0)))
    return jnp.where(near, jnp.log1p(jnp.where(near, excess, 0)), far)


def _gradient(
    logits: tuple[_Class, _Class], temperature: _Number, known: tuple[_Numbers, _OfModels], cotangents: Distance
) -> tuple[_Class, _Class, _Number]:
    """The rule's gradient by the logits of a row at the classes at hand, and what these add to the temperature's."""
    numbers, (of_student, of_teacher) = known
    d, c, (a, b), _ = cotangents
    softened, mixture, x, y = _mix(logits, temperature, numbers)
    p, q = softened.p, softened.q
    to_student, to_teacher = d * (1 - mixture), d * mixture
    d_u = (a + c) * p - to_student * p * (jnp.where(p == 0, 0, x) + of_student)
    d_v = (b - c) * q - to_teacher * q * (jnp.where(q == 0, 0, y) + of_teacher)
    student, teacher = _terms(softened, mixture, x, y)
    of_both = a * p + b * q + c * differences(p, q, softened.log_ratio)[0]
    of_both += to_student * (student - p * of_student) + to_teacher * (teacher - q * of_teacher)
    # Where the models are far apart, the lead is so large that its factor must be what is in the sum as well.
    of_both = jnp.where(jnp.abs(softened.log_ratio) < 0.5, of_both, d_u + d_v)
    return unsoften(softened, d_u, d_v, of_both, temperature)
