"""The summary of a row, and the one derivative rule of the library.

Every loss over classes is arithmetic on three numbers per row: `log_z`, `nll` and `spread`. This file computes them
from dense logits and differentiates them; what is built on top gets its gradients from autodiff.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jaxce._autodiff import forward_mode
from jaxce._inputs import check_class_vector, check_classes
from jaxce._rows import Rows, accumulator, loud, read_classes, silence
from jaxce._types import ClassVector, Distributions, Labels, Logits, PerRow

_Class = Float[Array, " classes"]
_Number = Float[Array, ""]


class Summary(NamedTuple):
    """What the losses need to know of a row, in float32 (float64 for float64 inputs). Each has the shape of the rows.

    Attributes:
        log_z: log Σ_c exp z_c, the log of the softmax's denominator.
        nll: Σ_c t_c (log_z − z_c), the negative log-likelihood of the target.
        spread: Σ_c u_c (log_z − z_c) for the class vector u; None where none was given.
    """

    log_z: PerRow
    nll: PerRow
    spread: PerRow | None


def summarize(
    logits: Logits,
    targets: Labels | Distributions,
    *,
    axis: int = -1,
    class_vector: ClassVector | None = None,
) -> Summary:
    """Summarizes every row of logits in the numbers that losses are made of.

    For a loss of your own: write it as arithmetic on the summary, and it has the accuracy, the memory and all the
    derivatives of the losses here. For the usual ones call `cross_entropy` and its relatives.

        log_z  = log Σ_c exp z_c
        nll    = Σ_c t_c (log_z − z_c)        t: the one-hot of the label, or the distribution
        spread = Σ_c u_c (log_z − z_c)        u: the class vector

    All three are measured from the largest logit of the row, so that a common offset costs no digits, and so that the
    nll of a row whose target leads by up to 70 nats is right to float32's relative precision. Differentiable to any
    order in `logits`, in distributions and in `class_vector`, in forward and reverse mode.

    Args:
        logits: (..., C) or, with `axis`, the classes anywhere. Any floating dtype; the arithmetic is at least float32.
        targets: class indices of the rows' shape in any integer dtype, or distributions of the logits' shape in a
            floating dtype. Distributions need not sum to 1; 0 · log 0 is 0.
        axis: the class axis of `logits`.
        class_vector: (C,), e.g. ones, class weights or a prior, for `spread`.

    Returns:
        a `Summary`. A label outside [0, C) has a NaN `nll` and gradient, in its own row alone.

    Raises:
        TypeError: a dtype is neither of those, or contradicts the shape of `targets`.
        ValueError: shapes, `axis` or NumPy labels do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> summary = jaxce.summarize(jnp.zeros((1, 4)), jnp.array([2]), class_vector=jnp.ones(4))
        >>> print(summary.log_z.round(4), summary.nll.round(4), summary.spread.round(4))
        [1.3863] [1.3863] [5.5452]
    """
    inputs = check_classes(logits, targets, axis=axis)
    class_vector = check_class_vector("class_vector", class_vector, inputs.logits.shape[inputs.axis])
    return _summarize(inputs, class_vector)


@jax.jit
def _summarize(inputs, class_vector):
    return summarize_rows(read_classes(inputs), class_vector=class_vector)


def summarize_rows(rows: Rows, *, class_vector: _Class | None = None, target_weights: _Class | None = None) -> Summary:
    """The summary of every row: 0 where a row does not count, a NaN `nll` where its label is wrong.

    Args:
        rows: logits with the class axis last, and their targets.
        class_vector: u of the `spread`.
        target_weights: v, for distributions q: the target is then t_c = v_c q_c.
    """
    dtype = accumulator(rows.logits, rows.targets, class_vector, target_weights)
    target_weights = None if target_weights is None else target_weights.astype(dtype)
    class_vector = None if class_vector is None else class_vector.astype(dtype)

    def summarize_row(logits, target, counts):
        return _summarize_row(logits, target, target_weights, class_vector, counts, dtype)

    for _ in rows.logits.shape[:-1]:
        summarize_row = jax.vmap(summarize_row)
    summary = summarize_row(rows.logits, rows.targets, rows.counts)
    return summary._replace(nll=loud(rows.valid, summary.nll))


def _summarize_row(logits, target, target_weights, class_vector, counts, dtype) -> Summary:
    maximum = lax.stop_gradient(jnp.max(logits)).astype(dtype)
    maximum = jnp.where(jnp.isneginf(maximum), jnp.zeros((), dtype), maximum)
    row = _Row(logits, target, target_weights, class_vector, counts, maximum)
    log_sum, nll, spread, _ = _measure(row)
    return Summary(silence(counts, maximum + log_sum), silence(counts, nll), silence(counts, spread))


# ---------------------------------------------------------------------------------------------------------------------
# The rule, for one row
#
#     z   the logits                          m   max z, a constant to every derivative
#     t   the target: one-hot of y, or v q    T   Σ_c t_c  (1 for a label)
#     u   the class vector                    U   Σ_c u_c
#     L   log Σ_c exp(z_c − m)                p   softmax(z)
#
#     log_z  = m + L
#     nll    = Σ_c t_c (m − z_c) + T L
#     spread = Σ_c u_c (m − z_c) + U L
#
# log_z is put together outside the rule: in float32, m = 10000.3 would swallow the digits of L that a loss consists of.
#
# With a, b, c the cotangents of L, nll, spread (log_z hands its own on to L, m being constant):
#
#     dz = a p + b (T p − t) + c (U p − u)          softmax minus target, nothing else
#     dt = b (log_z − z)         dq = v dt         dv = q dt         du = c (log_z − z)
#
# A target ahead of all others by more than 17 nats has p = 1 in float32, and log_z − z_y = 0. Both are differences that
# need not be formed. The sum leaves one exp(0) = 1 out and log1p puts it back,
#
#     L = log1p(Σ_{c≠y} exp(z_c − m) + expm1(z_y − m))
#
# and with e = exp(z − m), P = exp(−L), E = expm1(−L):  p = e P  and  p − 1 = e E + (e − 1), so that T p − t = (T − t) p
# + t (p − 1).


class _Row(NamedTuple):
    """The inputs of the rule. They are its residuals too, together with L: no second array over the classes."""

    logits: _Class
    target: Integer[Array, ""] | _Class
    target_weights: _Class | None
    class_vector: _Class | None
    counts: Bool[Array, ""] | None
    maximum: _Number


class Slice(NamedTuple):
    """Sums over some of a row's classes, and the number they are measured from. Disjoint slices `merge`."""

    maximum: _Number
    log_sum: _Number
    target: "_Moment"
    vector: "_Moment | None"

    def numbers(self) -> "_Numbers":
        """What the sums say of a row, once they are over all of its classes."""
        spread = None if self.vector is None else self.vector.distance(self.log_sum)
        return _Numbers(self.log_sum, self.target.distance(self.log_sum), spread, self.target.mass)


class _Moment(NamedTuple):
    """How far a mass t over the classes is from the maximum, Σ t (m − z), and the mass itself, Σ t."""

    excess: _Number
    mass: _Number

    def distance(self, log_sum: _Number) -> _Number:
        """Σ t (log_z − z)."""
        return self.excess + self.mass * log_sum


class _Numbers(NamedTuple):
    """The outputs of the rule; T is among them to spare the backward pass another sum over the target."""

    log_sum: _Number
    nll: _Number
    spread: _Number | None
    mass: _Number


class _Residuals(NamedTuple):
    row: _Row
    log_sum: _Number
    mass: _Number
    vector_mass: _Number | None


@jax.custom_vjp
def _rule(row: _Row) -> _Numbers:
    return slice_row(row).numbers()


def _rule_forward(row: _Row) -> tuple[_Numbers, _Residuals]:
    numbers = _measure(row)  # the lifted rule, so that a second derivative meets the rule again
    vector_mass = None if row.class_vector is None else jnp.sum(row.class_vector)
    return numbers, _Residuals(row, numbers.log_sum, numbers.mass, vector_mass)


def _rule_backward(residuals: _Residuals, cotangents: _Numbers) -> tuple[_Row]:
    row, log_sum, mass, vector_mass = _recompute_from(residuals)
    dtype = row.maximum.dtype
    maximum, log_sum, mass, vector_mass = (
        silence(row.counts, number) for number in (row.maximum, log_sum, mass, vector_mass)
    )
    z = silence(row.counts, row.logits.astype(dtype))

    e = jnp.exp(z - maximum)
    p = e * jnp.exp(-log_sum)
    p_minus_1 = e * jnp.expm1(-log_sum) + (e - 1)
    distance = (maximum - z) + log_sum

    d_target = d_target_weights = d_class_vector = None
    d_log_sum, d_nll, d_spread, d_mass = cotangents
    if row.target.ndim == 0:
        on_target = jnp.arange(z.shape[0]) == row.target
        d_logits = jnp.where(on_target, d_log_sum * p + d_nll * p_minus_1, (d_log_sum + d_nll) * p)
    else:
        row = row._replace(target=silence(row.counts, row.target))
        target = _effective_target(row, dtype)
        d_logits = d_log_sum * p + d_nll * ((mass - target) * p + target * p_minus_1)
        d_effective = d_nll * _zero_at_absent(target, z, distance) + d_mass
        d_target = d_effective.astype(row.target.dtype)
        if row.target_weights is not None:
            d_target = (d_effective * row.target_weights).astype(row.target.dtype)
            d_target_weights = d_effective * row.target.astype(dtype)
    if row.class_vector is not None:
        u = row.class_vector
        d_logits += d_spread * ((vector_mass - u) * p + u * p_minus_1)
        d_class_vector = d_spread * _zero_at_absent(u, z, distance)
    return (
        row._replace(
            logits=d_logits.astype(row.logits.dtype),
            target=d_target,
            target_weights=d_target_weights,
            class_vector=d_class_vector,
            counts=None,
            maximum=None,
        ),
    )


def _recompute_from(residuals: _Residuals) -> _Residuals:
    """Residuals that XLA:CPU can't trace to the forward pass, whose exp it would keep in float32 for the backward pass.

    Computing it again costs less than the memory. Not so for labels and plain float32 logits, where the exp can wait in
    the buffer of the gradient.
    """
    row = residuals.row
    if row.target.ndim:
        return lax.optimization_barrier(residuals)
    if row.class_vector is None and row.logits.dtype == row.maximum.dtype:
        return residuals
    logits, maximum, log_sum = lax.optimization_barrier((row.logits, row.maximum, residuals.log_sum))
    return residuals._replace(row=row._replace(logits=logits, maximum=maximum), log_sum=log_sum)


_rule.defvjp(_rule_forward, _rule_backward)
_measure = forward_mode(_rule)


def slice_row(row: _Row) -> Slice:
    """The sums over the classes at hand, each measured from `row.maximum`.

    A label may lie outside: then the target has no mass here, and the sum that leaves its class out leaves out nothing.
    """
    dtype = row.maximum.dtype
    num_classes = row.logits.shape[0]
    distance = row.maximum - row.logits.astype(dtype)
    e = jnp.exp(-distance)
    u = row.class_vector
    spread_terms = [] if u is None else [_times(u, distance)]
    if row.target.ndim == 0:
        here = (row.target >= 0) & (row.target < num_classes)
        # The barrier keeps XLA:CPU from widening all logits for the sake of one.
        label = jnp.clip(row.target, 0, num_classes - 1)
        lead = row.maximum - lax.optimization_barrier(row.logits)[label].astype(dtype)
        others, *vector_excess = _sums(e * _is_other_class(num_classes, row.target, dtype), *spread_terms)
        log_sum = jnp.log1p(others + jnp.where(here, jnp.expm1(-lead), -1))
        target_moment = _Moment(jnp.where(here, lead, 0), here.astype(dtype))
    else:
        target = _effective_target(row, dtype)
        below = jnp.where(distance > 0, e, 0)
        at_maximum = jnp.where(distance == 0, e, 0)
        below, at_maximum, excess, mass, *vector_excess = _sums(
            below, at_maximum, _times(target, distance), target, *spread_terms
        )
        log_sum = jnp.log1p(below + (at_maximum - 1))
        target_moment = _Moment(excess, mass)
    vector_moment = None if u is None else _Moment(vector_excess[0], jnp.sum(u))
    return Slice(row.maximum, log_sum, target_moment, vector_moment)


def merge(left: Slice, right: Slice) -> Slice:
    """The slice of two disjoint sets of one row's classes; as exact as the slices, also where one class dominates."""
    # Slices of nothing but −inf have no say in where the sums are measured from.
    left_max, right_max = (jnp.where(jnp.isneginf(part.log_sum), -jnp.inf, part.maximum) for part in (left, right))
    maximum = jnp.maximum(left_max, right_max)
    maximum = jnp.where(jnp.isneginf(maximum), jnp.maximum(left.maximum, right.maximum), maximum)
    is_left = left_max >= right_max
    top = jnp.where(is_left, left.log_sum, right.log_sum)
    rest = jnp.where(is_left, right.log_sum - (maximum - right.maximum), left.log_sum - (maximum - left.maximum))
    log_sum = jnp.log1p(jnp.expm1(top) + jnp.exp(rest))

    def moment(left_moment: _Moment, right_moment: _Moment) -> _Moment:
        shifted = [
            part_moment.excess + part_moment.mass * (maximum - part.maximum)
            for part, part_moment in ((left, left_moment), (right, right_moment))
        ]
        return _Moment(shifted[0] + shifted[1], left_moment.mass + right_moment.mass)

    vector = None if left.vector is None or right.vector is None else moment(left.vector, right.vector)
    return Slice(maximum, log_sum, moment(left.target, right.target), vector)


def _effective_target(row: _Row, dtype) -> _Class:
    target = row.target.astype(dtype)
    return target if row.target_weights is None else target * row.target_weights


def _times(mass: _Class, distance: _Class) -> _Class:
    """The product with 0 · inf = 0: a class without mass adds nothing, however far it is."""
    return jnp.where(mass == 0, 0, mass * distance)


def _zero_at_absent(mass: _Class, z: _Class, distance: _Class) -> _Class:
    """The derivative of `_times` by the mass, with the convention of 0 where there is no mass on a logit of −inf."""
    return jnp.where((mass == 0) & jnp.isneginf(z), 0, distance)


def _is_other_class(num_classes: int, label: Integer[Array, ""], dtype) -> _Class:
    """1 for every class but the label's, 0 for that one.

    min(|c − y|, 1) instead of a comparison: XLA:CPU fuses arithmetic into its fast reductions, and falls back to a slow
    loop at a `select`. Exact while class numbers are exact in `dtype`.
    """
    if num_classes > 2**24:
        return (jnp.arange(num_classes) != label).astype(dtype)
    return jnp.minimum(jnp.abs(jnp.arange(num_classes, dtype=dtype) - label.astype(dtype)), 1)


def _sums(*terms: _Class) -> list[_Number]:
    """The sums of several arrays in one pass. Separate sums over a shared input would make XLA:CPU write it out."""
    if len(terms) == 1:
        return [jnp.sum(terms[0])]
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    return list(lax.reduce(terms, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), (0,)))
