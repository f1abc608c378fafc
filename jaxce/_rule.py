"""The one derivative rule of the library, for one row of logits: softmax minus target.

Every loss over classes differentiates through it, in every mode and to every order. It knows no option: weights,
smoothing, masks of whole losses and reductions live above it and get their gradients from autodiff.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jaxce._autodiff import forward_mode
from jaxce._mesh import Classes
from jaxce._rows import silence
from jaxce._slice import Moment, Slice, merge_devices, times

_Class = Float[Array, " classes"]
_Number = Float[Array, ""]
_Any = Float[Array, "*any"]

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
# and with e = exp(z − m), P = exp(−L), E = expm1(−L):  p = e P,  p − 1 = e E + (e − 1),  T p − t = (T − t) p + t (p −
# 1).


class Row(NamedTuple):
    """The inputs of the rule. They are its residuals too, with a few numbers: no second array over the classes.

    A row may be a slice of `classes`: whatever has classes is of the slice, a label is counted from its start, and
    `real` is how many classes from there on are no padding, None where all are.
    """

    logits: _Class
    target: Integer[Array, ""] | _Class
    target_weights: _Class | None
    class_vector: _Class | None
    counts: Bool[Array, ""] | None
    maximum: Any  # Float[Array, ""], or None while it is unknown
    real: Integer[Array, ""] | int | None
    classes: Classes

    @property
    def has_label(self) -> bool:
        """Whether the target is a class, and not a distribution."""
        return self.target.ndim == 0


ROW_AXES = Row(0, 0, None, None, 0, 0, None, None)  # pyright: ignore[reportArgumentType]  # what vmap maps over


class Numbers(NamedTuple):
    """The outputs of the rule. The maximum is a constant to every derivative, and what log_sum is measured from.

    The last three are for the backward pass. `lead` is how far the maximum leads a label, m − z_y: with it the gradient
    at the label is as exact as the loss, even if z is computed anew, to another last bit, by every fusion that reads
    it. `mass` is the T of a distribution, `vector_mass` is U.
    """

    maximum: _Number
    log_sum: _Number
    nll: _Number
    spread: _Number | None
    lead: _Number | None
    mass: _Number | None
    vector_mass: _Number | None


def numbers_of(part: Slice, *, has_label: bool) -> Numbers:
    """What the sums say of a row, once they are over all of its classes."""
    log_sum = jnp.log1p(part.sum_less_1)
    nll = part.target.distance(log_sum)
    lead, mass = (part.target.excess, None) if has_label else (None, part.target.mass)
    spread, vector_mass = (None, None) if part.vector is None else (part.vector.distance(log_sum), part.vector.mass)
    return Numbers(part.maximum, log_sum, nll, spread, lead, mass, vector_mass)


@jax.custom_vjp
def _rule(row: Row) -> Numbers:
    return numbers_of(merge_devices(slice_row(row), row.classes), has_label=row.has_label)


def _rule_forward(row: Row) -> tuple[Numbers, tuple[Row, Numbers]]:
    numbers = measure(row)  # the lifted rule, so that a second derivative meets the rule again
    return numbers, (row, numbers)


def _rule_backward(residuals: tuple[Row, Numbers], cotangents: Numbers) -> tuple[Row]:
    row, numbers = residuals
    # Without the barriers XLA:CPU would share with the forward pass, and for that write out, the maximum of every logit
    # and, of labels with half-precision logits, a float32 exp.
    logits = row.logits
    numbers = numbers._replace(maximum=lax.optimization_barrier(numbers.maximum))
    if row.has_label and logits.dtype != numbers.log_sum.dtype:
        logits, log_sum = lax.optimization_barrier((logits, numbers.log_sum))
        numbers = numbers._replace(log_sum=log_sum)
    gradient = slice_gradient(row._replace(logits=logits), numbers, cotangents)
    return (gradient._replace(logits=gradient.logits.astype(row.logits.dtype)),)


def slice_gradient(row: Row, numbers: Numbers, cotangents: Any) -> Row:
    """The rule's gradient at the classes at hand, given the numbers of the whole row.

    The gradient is in the row's dtypes, but for the logits': theirs stays in the dtype of the arithmetic.
    """
    dtype = numbers.log_sum.dtype
    silenced: Any = [silence(row.counts, number) for number in numbers]
    maximum, log_sum, _, _, lead, mass, vector_mass = silenced
    row = _real(row)
    z = silence(row.counts, row.logits.astype(dtype))

    e = jnp.exp(z - maximum)
    p, p_minus_1 = _softmax(e, log_sum)
    distance = (maximum - z) + log_sum

    d_target = d_target_weights = d_class_vector = None
    _, d_log_sum, d_nll, d_spread, d_lead, d_mass, d_vector_mass = cotangents  # None where the number is
    if row.has_label:
        d_logits = (d_log_sum + d_nll) * p
    else:
        row = row._replace(target=silence(row.counts, row.target))
        target = _effective_target(row, dtype)
        d_logits = d_log_sum * p + d_nll * ((mass - target) * p + target * p_minus_1)
        d_effective = d_target = d_nll * _zero_at_absent(target, z, distance) + d_mass
        if row.target_weights is not None:
            d_target = d_effective * row.target_weights
            d_target_weights = d_effective * row.target.astype(dtype)
        d_target = without_padding(d_target.astype(row.target.dtype), row.real, 0)
    if row.class_vector is not None:
        u = row.class_vector
        d_logits += d_spread * ((vector_mass - u) * p + u * p_minus_1)
        d_class_vector = d_spread * _zero_at_absent(u, z, distance) + d_vector_mass
    if row.has_label:
        p, p_minus_1 = _softmax(jnp.exp(-lead), log_sum)
        d_on_label = d_log_sum * p + d_nll * p_minus_1 - d_lead
        if row.class_vector is not None:
            u = row.class_vector[jnp.clip(row.target, 0, z.shape[0] - 1)]
            d_on_label += d_spread * ((vector_mass - u) * p + u * p_minus_1)
        d_logits = _with_label(d_logits, row.target, d_on_label, is_final=row.logits.dtype == dtype)
    return row._replace(
        logits=d_logits,
        target=d_target,
        target_weights=d_target_weights,
        class_vector=d_class_vector,
        counts=None,
        maximum=None,
        real=None,
    )


def _with_label(values: _Class, label: Integer[Array, ""], on_label: _Number, *, is_final: bool) -> _Class:
    """`values` with another number at the label's class, if it is one of them; `is_final` if nothing is done to it."""

    def select(values, label, on_label):
        return jnp.where(jnp.arange(values.shape[0], dtype=label.dtype) == label, on_label, values)

    def scatter(values, label, on_label):
        return values.at[jnp.where(label < 0, values.shape[0], label)].set(on_label, mode="drop")

    # Accelerators fuse the comparison into what comes next. XLA:CPU's loop takes twice as long with one in it.
    if not is_final:
        return select(values, label, on_label)
    return lax.platform_dependent(values, label, on_label, cpu=scatter, default=select)


def _softmax(e, log_sum):
    """The softmax p, and p − 1 without taking the difference."""
    return e * jnp.exp(-log_sum), e * jnp.expm1(-log_sum) + (e - 1)


_rule.defvjp(_rule_forward, _rule_backward)
measure = forward_mode(_rule)


def row_maximum(logits: _Class, dtype: Any, real: Any = None) -> _Number:
    """What a slice is measured from: its largest logit, a constant to every derivative, and never −inf."""
    largest = lax.stop_gradient(jnp.max(without_padding(logits, real, -jnp.inf)))
    maximum = jnp.maximum(largest.astype(dtype), jnp.finfo(dtype).min)
    # Without the barrier XLA:CPU writes the maximum out for every logit.
    return lax.optimization_barrier(maximum)


def slice_row(row: Row) -> Slice:
    """The sums over the classes at hand, each measured from `row.maximum`.

    A label may lie outside: then the target has no mass here, and the sum that leaves its class out leaves out nothing.
    """
    row = _real(row)
    dtype = row.maximum.dtype
    num_classes = row.logits.shape[0]
    distance = row.maximum - row.logits.astype(dtype)
    e = jnp.exp(-distance)
    u = row.class_vector
    spread_terms = [] if u is None else [times(u, distance)]
    if row.has_label:
        here = (row.target >= 0) & (row.target < num_classes)
        others, lead, vector_excess = _sums_of_label(row, e, distance, spread_terms)
        sum_less_1 = others + jnp.where(here, jnp.expm1(-lead), -1)
        target_moment = Moment(jnp.where(here, lead, 0), here.astype(dtype))
    else:
        target = _effective_target(row, dtype)
        # Not `== 0` for the maximum: where z is computed anew in every fusion that reads it, its last bit can differ.
        is_below = distance > 0
        below, at_maximum, excess, mass, *vector_excess = _sums(
            jnp.where(is_below, e, 0), jnp.where(is_below, 0, e), times(target, distance), target, *spread_terms
        )
        sum_less_1 = below + (at_maximum - 1)
        target_moment = Moment(excess, mass)
    vector_moment = None if u is None else Moment(vector_excess[0], jnp.sum(u))
    return Slice(row.maximum, sum_less_1, target_moment, vector_moment)


def without_padding(values: Array, real: Any, otherwise: float | int) -> Array:
    """The values along the last axis, with something else in place of padding."""
    if real is None:
        return values
    return jnp.where(jnp.arange(values.shape[-1], dtype=jnp.int32) < real, values, jnp.asarray(otherwise, values.dtype))


def _real(row: Row) -> Row:
    """The row with classes of probability 0 in place of padding, whatever it held."""
    target = row.target if row.has_label else without_padding(row.target, row.real, 0)
    return row._replace(logits=without_padding(row.logits, row.real, -jnp.inf), target=target)


def _effective_target(row: Row, dtype) -> _Class:
    target = row.target.astype(dtype)
    return target if row.target_weights is None else target * row.target_weights


def _zero_at_absent(mass: _Class, z: _Class, distance: _Class) -> _Class:
    """The derivative of `_times` by the mass, with the convention of 0 where there is no mass on a logit of −inf."""
    return jnp.where((mass == 0) & jnp.isneginf(z), 0, distance)


def _sums_of_label(row: Row, e: _Class, distance: _Class, terms: list) -> tuple[_Number, _Number, list]:
    """The sum of `e`, which is at most 1, over all classes but the label's, the label's distance, the sums of `terms`.

    XLA:CPU has a fast reduction that fuses with arithmetic alone: |c − y| stands in it for a comparison with the label,
    whose logit is gathered then. For rows longer than 2^15 it is the slower one, and the loop that takes anything picks
    the label as it goes.
    """
    num_classes, label = e.shape[0], row.target
    if num_classes > 2**15:
        on_label = jnp.arange(num_classes, dtype=label.dtype) == label
        others, lead, *sums = _sums(jnp.where(on_label, 0, e), jnp.where(on_label, distance, 0), *terms)
    else:
        from_label = jnp.abs(jnp.arange(num_classes, dtype=e.dtype) - label.astype(e.dtype))
        others, *sums = _sums(jnp.minimum(e, from_label), *terms)
        # The barrier keeps XLA:CPU from widening all logits for the sake of one.
        logit = lax.optimization_barrier(row.logits)[jnp.clip(label, 0, num_classes - 1)]
        lead = row.maximum - logit.astype(e.dtype)
    return others, jnp.maximum(lead, 0), sums


def _sums(*terms: _Class) -> list[_Number]:
    """The sums of several arrays in one pass. Separate sums over a shared input would make XLA:CPU write it out.

    XLA:CPU adds the terms one by one. In long rows what every addition rounds off is summed too (Knuth's two-sum), and
    beyond 2^20 classes, where that sum would round off as much, each array has a sum of its own after all.
    """
    if len(terms) == 1 or terms[0].shape[0] > 2**20:
        return [jnp.sum(term) for term in terms]
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    if terms[0].shape[0] <= 2**15:
        return list(lax.reduce(terms, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), (0,)))

    count = len(terms)

    def add(left, right):
        sums = [x + y for x, y in zip(left[:count], right[:count], strict=True)]
        errors = []
        for i, total in enumerate(sums):
            added = total - left[i]
            rounded_off = (left[i] - (total - added)) + (right[i] - added)
            errors.append(left[count + i] + right[count + i] + rounded_off)
        return (*sums, *errors)

    zeros_of_terms = tuple(jnp.zeros_like(term) for term in terms)
    results = lax.reduce((*terms, *zeros_of_terms), (*zeros, *zeros), add, (0,))
    return [
        jnp.where(jnp.isfinite(total), total + error, total)
        for total, error in zip(results[:count], results[count:], strict=True)
    ]
