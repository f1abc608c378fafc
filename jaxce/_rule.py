"""The one derivative rule of the library, for one row of logits: softmax minus target.

Every loss over classes differentiates through it, in every mode and to every order. It knows no option: weights,
smoothing, masks of whole losses and reductions live above it and get their gradients from autodiff.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jaxce._autodiff import is_local, rule
from jaxce._blocks import block_size, over_chunks
from jaxce._conventions import silence, times, without_padding
from jaxce._mesh import Classes
from jaxce._slice import Asked, Moment, Slice, argmax_of, merge_devices
from jaxce._xla import add_at, apart, is_long, keep, on_cpu, put_at, sum_alone, writes_out, zero_at

_Class = Float[Array, " classes"]
_Number = Float[Array, ""]
_Result = TypeVar("_Result")
_CHUNK_BYTES = 2**19  # of float32, which stay in a CPU's cache
_DEEP = 1000.0  # exp of minus it is 0 in every dtype, and 0 · ∞ is 0

#     z   the logits                          m   max z, a constant to every derivative
#     t   the target: one-hot of y, or v q    T   Σ_c t_c  (1 for a label)
#     u   the class vector                    U   Σ_c u_c
#     L   log Σ_c exp(z_c − m)                p   softmax(z)
#     D   Σ_c p_c (m − z_c), the mean depth
#
#     log_z   = m + L
#     nll     = Σ_c t_c (m − z_c) + T L
#     spread  = Σ_c u_c (m − z_c) + U L
#     entropy = D + L
#
# log_z is put together outside the rule: in float32, m = 10000.3 would swallow the digits of L that a loss consists of.
#
# With a, b, c, d the derivatives by L, nll, spread, entropy (that by log_z is one by L, m being constant):
#
#     dz = a p + b (T p − t) + c (U p − u)          softmax minus target, nothing else
#          + d p ((m − z) − D)                      and for the entropy softmax times depth minus its mean
#     dt = b (log_z − z)         dq = v dt         dv = q dt         du = c (log_z − z)
#
# A target ahead of all others by more than 17 nats has p = 1 in float32, and log_z − z_y = 0. Both are differences that
# need not be formed. The sum leaves one exp(0) = 1 out and log1p puts it back,
#
#     s = Σ_{c≠y} exp(z_c − m) + expm1(z_y − m)          L = log1p(s)
#
# and with e = exp(z − m):  p = e / (1 + s),  p − 1 = (e − 1) − e s / (1 + s),  T p − t = (T − t) p + t (p − 1). The
# rule returns s, as p is known to more digits by it than by L.
#
# The entropy is a sum of terms that are not negative, log1p(s) + Σ_c e_c (m − z_c) / (1 + s), and of a confident row as
# exact as s. If the label is behind, s as it stands is a difference, and the entropy needs the sum that leaves the
# maximum out in its place. Its gradient is exact by D, which for the backward pass is an output of its own: from the
# entropy and L, the class of the maximum would have it as a difference.
#
# Where targets list their classes, t = Σ_k t_k onehot(c_k), the sum leaves out the listed class that is nearest to the
# maximum, as if it were the label, and the gradient at every listed class is written by its own lead:
#
#     dz = a p + b ((T − t) p + t (p − 1)) + …          T − t is the sum of the others' masses, not a difference


class Row(NamedTuple):
    """The inputs of the rule. They are its residuals too, with a few numbers: no second array over the classes.

    All but the classes' vectors may have axes of rows in front. A row may be a slice of `classes`: whatever has classes
    is of the slice, a label is counted from its start, and `real` is how many classes from there on are no padding,
    None where all are. Where there are `masses`, the target is the list of the classes that have them, counted
    likewise and each listed once, or negative numbers, of no class.
    """

    logits: _Class
    target: Integer[Array, ""] | _Class | Integer[Array, " listed"]
    target_weights: _Class | None
    class_vector: _Class | None
    counts: Bool[Array, ""] | None
    maximum: _Number
    real: Integer[Array, ""] | int | None
    classes: Classes
    asked: Asked = Asked()
    masses: Float[Array, " listed"] | None = None

    @property
    def has_label(self) -> bool:
        """Whether the target is a class, and not several or a distribution."""
        return self.target.ndim < self.logits.ndim


ROW_AXES = Row(0, 0, None, None, 0, 0, None, None, None, 0)  # pyright: ignore[reportArgumentType]  # what vmap maps over


class Numbers(NamedTuple):
    """The outputs of the rule. The maximum is a constant to every derivative, and what the sums are measured from.

    `lead`, the masses and `mean_depth` are for the backward pass. `lead` is how far the maximum leads a label, m − z_y:
    with it the gradient at the label is as exact as the loss, even if z is computed anew, to another last bit, by every
    fusion that reads it. Of listed classes there is one for each. `mass` is the T of a distribution, `vector_mass` is
    U. `argmax` has no derivative.
    """

    maximum: _Number
    sum_less_1: _Number
    nll: _Number
    spread: _Number | None
    lead: Float[Array, "*listed"] | None
    mass: _Number | None
    vector_mass: _Number | None
    entropy: _Number | None = None
    mean_depth: _Number | None = None
    argmax: Integer[Array, ""] | None = None


def numbers_of(part: Slice, *, has_label: bool, masses: Float[Array, "*listed"] | None = None) -> Numbers:
    """What the sums say of a row, once they are over all of its classes. `masses` are those of listed classes."""
    log_sum = jnp.log1p(part.sum_less_1)
    target = part.target
    if masses is not None:
        masses = masses.astype(log_sum.dtype)
        target = Moment(jnp.sum(times(masses, target.excess), axis=-1), jnp.sum(masses * target.mass, axis=-1))
    nll = target.distance(log_sum)
    if has_label:
        nll = jnp.maximum(nll, 0)  # which rounding may miss
    has_leads = has_label or masses is not None
    lead, mass = (part.target.excess, None) if has_leads else (None, part.target.mass)
    spread, vector_mass = (None, None) if part.vector is None else (part.vector.distance(log_sum), part.vector.mass)
    entropy = mean_depth = None
    if part.depth is not None:
        mean_depth = part.depth / (1 + part.sum_less_1)
        entropy = jnp.maximum(mean_depth + log_sum, 0)
    of_softmax = entropy, mean_depth, argmax_of(part)
    return Numbers(part.maximum, part.sum_less_1, nll, spread, lead, mass, vector_mass, *of_softmax)


def _forward(rows: Row, *, beside_gradient: bool = False) -> Numbers:
    shares_exp = beside_gradient and _shares_exp(rows)

    def of_row(row):
        part = slice_row(row, shares_exp=shares_exp).numbered_from(row.classes.start(row.logits.shape[0]))
        masses = None if row.masses is None else row.classes.largest(row.masses)  # they are the same on all devices
        return numbers_of(merge_devices(part, row.classes), has_label=row.has_label, masses=masses)

    # For chunks XLA:CPU copies narrow logits, into the memory of their gradient where there is one.
    may_copy = beside_gradient or rows.logits.dtype == rows.maximum.dtype
    return _over_all(of_row, rows, by_chunks=may_copy and not shares_exp and _is_long(rows))


def _over_all(of_row: Callable[..., _Result], rows: Row, *trees: object, by_chunks: bool = False) -> _Result:
    """The function of every row, and of what arrays of the rows' axes have of it.

    On a CPU the rows lie along one axis, if no device has those of another's: indices of several take XLA:CPU longer.
    A TPU would move the logits for that.
    """
    row_axes = rows.logits.shape[:-1]
    num_axes, in_axes = len(row_axes), (ROW_AXES, *[0] * len(trees))

    def flat(array: Array) -> Array:
        return array.reshape(math.prod(row_axes), *array.shape[num_axes:])

    def along_one_axis() -> _Result:
        flat_rows = rows._replace(**jax.tree.map(flat, _parts_with_rows(rows)))
        of_rows = over_rows(of_row, 1, in_axes)
        results = _by_chunks(of_rows, flat_rows) if by_chunks else of_rows(flat_rows, *jax.tree.map(flat, trees))
        return jax.tree.map(lambda array: array.reshape(*row_axes, *array.shape[1:]), results)

    def along_all_axes() -> _Result:
        return over_rows(of_row, num_axes, in_axes)(rows, *trees)

    are_own = is_local.value and all(isinstance(size, int) for size in row_axes)
    if are_own and num_axes > (0 if by_chunks else 1) and math.prod(row_axes) < 2**31:  # by the last number of an int32
        return on_cpu(along_one_axis, along_all_axes)()
    return along_all_axes()


def _parts_with_rows(rows: Row) -> dict[str, Any]:
    """What has axes of rows, by its name."""
    parts = zip(Row._fields, rows, ROW_AXES, strict=True)
    return {name: part for name, part, axis in parts if axis is not None}


def _by_chunks(of_rows: Callable[[Row], _Result], rows: Row) -> _Result:
    """The numbers of rows along one axis, a few of them at a time, so that all that is summed may be written out."""
    num_rows, num_classes = rows.logits.shape
    with writes_out(True):
        size = block_size(_CHUNK_BYTES // (4 * num_classes), num_rows)
        return over_chunks(lambda chunk: of_rows(rows._replace(**chunk)), _parts_with_rows(rows), size)


def _is_long(rows: Row) -> bool:
    """Whether a CPU sums slowly over the classes, of rows which are a device's own."""
    return is_local.value and is_long(rows.logits.shape[-1])


def _outputs(rows: Row) -> Numbers:
    """Arrays of the types of the outputs."""
    number = rows.classes.largest(rows.maximum)
    lead, mass = (number, None) if rows.has_label else (None, number)
    if rows.masses is not None:
        lead, mass = jnp.broadcast_to(number[..., None], rows.masses.shape), None
    of_vector = None if rows.class_vector is None else number
    of_entropy = number if rows.asked.entropy else None
    argmax = number.astype(jnp.int32) if rows.asked.argmax else None
    return Numbers(number, number, number, of_vector, lead, mass, of_vector, of_entropy, of_entropy, argmax)


def _shares_exp(rows: Row) -> bool:
    """Whether XLA:CPU can keep the exponentials of the forward pass for the gradient, in the gradient's own memory."""
    is_only_sum = not rows.asked.entropy and (rows.class_vector is None or not _is_long(rows))
    return rows.has_label and is_only_sum and rows.logits.dtype == rows.maximum.dtype


def _backward(rows: Row, numbers: Numbers, cotangents: Numbers) -> Row:
    shares_exp = _shares_exp(rows)
    logits = rows.logits
    if not shares_exp:
        # Without the barriers XLA:CPU would share with the forward pass, and for that write out, a float32 exp.
        anew = on_cpu(lambda *arrays: tuple(map(keep, arrays)), lambda *arrays: arrays)  # each of its own type
        logits, sum_less_1, maximum = anew(logits, numbers.sum_less_1, numbers.maximum)
        numbers = numbers._replace(sum_less_1=sum_less_1, maximum=maximum)
    of_row = partial(slice_gradient, shares_exp=shares_exp)
    gradient = _over_all(of_row, rows._replace(logits=logits), numbers, cotangents)
    return gradient._replace(
        logits=gradient.logits.astype(rows.logits.dtype),
        target_weights=sum_rows(gradient.target_weights),
        class_vector=sum_rows(gradient.class_vector),
    )


def over_rows(of_row: Callable[..., _Result], num_axes: int, in_axes: tuple[object, ...]) -> Callable[..., _Result]:
    """A function of one row, of rows along a number of axes."""
    for _ in range(num_axes):
        of_row = jax.vmap(of_row, in_axes=in_axes)
    return of_row


@overload
def sum_rows(of_rows: Array) -> Array: ...
@overload
def sum_rows(of_rows: None) -> None: ...
def sum_rows(of_rows: Array | None) -> Array | None:
    """What the rows add to the gradient of a vector of classes that they share; None of None."""
    return None if of_rows is None else jnp.sum(of_rows, axis=range(of_rows.ndim - 1))


class _Slopes(NamedTuple):
    """What the gradient of a row consists of, at classes of which e = exp(z − maximum) is known."""

    numbers: Any  # Numbers, of which it is known what they are
    by: Any  # their cotangents: None where the number is, and for the argmax

    @property
    def by_log_sum(self) -> _Number:
        """The cotangent of L."""
        return self.by.sum_less_1 * (1 + self.numbers.sum_less_1)

    def softmax(self, e):
        return _softmax(e, self.numbers.sum_less_1)

    def less_target(self, rest, mass, e):
        """T p − t, of a mass t at a class and the rest of it at all others, T − t."""
        return rest * self.softmax(e) + mass * _softmax_minus_1(e, self.numbers.sum_less_1)

    def of_spread(self, u, e):
        return self.by.spread * self.less_target(self.numbers.vector_mass - u, u, e)

    def of_entropy(self, depth, e):
        """Of the entropy p ((m − z) − D), and of the mean depth the same less p."""
        of_both = self.by.entropy + self.by.mean_depth
        slope = of_both * (jnp.minimum(depth, _DEEP) - self.numbers.mean_depth) - self.by.mean_depth
        return slope * self.softmax(e)

    def by_mass(self, mass, depth, is_left_out):
        """The derivative of Σ t (log_z − z) by the mass; by convention 0 where there is none on a logit of −inf."""
        distance = depth + jnp.log1p(self.numbers.sum_less_1)
        return jnp.where((mass == 0) & is_left_out, 0, distance)


def slice_gradient(row: Row, numbers: Numbers, cotangents: Any, *, shares_exp: bool = False) -> Row:
    """The rule's gradient at the classes at hand, given the numbers of the whole row.

    The gradient is in the row's dtypes, but for the logits': theirs may be in the dtype of the arithmetic.
    """
    dtype = numbers.sum_less_1.dtype
    silenced: Any = [silence(row.counts, number) for number in numbers]
    slopes = _Slopes(Numbers(*silenced), cotangents)
    maximum, sum_less_1 = slopes.numbers.maximum, slopes.numbers.sum_less_1
    row = _real(row)
    z = silence(row.counts, row.logits.astype(dtype))

    e = jnp.exp(z - maximum)
    if row.has_label:
        e = zero_at(e, row.target, shares_exp=shares_exp)

    def by_mass(mass):
        return slopes.by_mass(mass, maximum - z, jnp.isneginf(z))

    d_target = d_target_weights = d_class_vector = d_masses = None
    if row.has_label:
        factor = slopes.by_log_sum + cotangents.nll
        if shares_exp and _is_masked_late(row):
            d_logits = _masked_late(row.counts, row.logits, numbers.maximum, row.target, factor, sum_less_1)
        else:
            d_logits = factor * slopes.softmax(e)
    elif row.masses is not None:
        masses = silence(row.counts, row.masses).astype(dtype)
        d_logits = (slopes.by_log_sum + cotangents.nll * jnp.sum(masses)) * slopes.softmax(e)
    else:
        row = row._replace(target=silence(row.counts, row.target))
        target = _effective_target(row, dtype)
        of_target = slopes.less_target(slopes.numbers.mass - target, target, e)
        d_logits = slopes.by_log_sum * slopes.softmax(e) + cotangents.nll * of_target
        d_effective = d_target = cotangents.nll * by_mass(target) + cotangents.mass
        if row.target_weights is not None:
            d_target = d_effective * row.target_weights
            d_target_weights = d_effective * row.target.astype(dtype)
        d_target = without_padding(d_target.astype(row.target.dtype), row.real, 0)
    if row.class_vector is not None:
        d_logits += slopes.of_spread(row.class_vector, e)
        d_class_vector = cotangents.spread * by_mass(row.class_vector) + cotangents.vector_mass
    if row.asked.entropy:
        d_logits += slopes.of_entropy(maximum - z, e)
    if row.has_label:
        d_on_label = _gradient_on_label(row, slopes)
        d_logits = add_at(d_logits, row.target, d_on_label, is_final=row.logits.dtype == dtype)
    elif row.masses is not None:
        d_logits, d_masses = _with_listed(d_logits, row, row.masses, slopes)
    return row._replace(
        logits=d_logits,
        target=d_target,
        target_weights=d_target_weights,
        class_vector=d_class_vector,
        counts=None,
        maximum=None,
        real=None,
        masses=d_masses,
    )


def _is_masked_late(row: Row) -> bool:
    """Whether rows that do not count are left out of a gradient of softmax alone, and not of its exponentials.

    XLA:CPU's loop with an exponential takes twice as long with a comparison in it.
    """
    return row.counts is not None and row.class_vector is None


@jax.custom_jvp
def _masked_late(counts, logits, maximum, label, factor, sum_less_1):
    return silence(counts, _of_softmax(logits, maximum, label, factor, sum_less_1))


@_masked_late.defjvp
def _push_masked_late(primals, tangents):
    """By what is masked early, as 0 · NaN is NaN."""

    def masked_early(counts, logits, maximum, *rest):
        return _of_softmax(silence(counts, logits), silence(counts, maximum), *rest)

    return _masked_late(*primals), jax.jvp(masked_early, primals, tangents)[1]


def _of_softmax(logits, maximum, label, factor, sum_less_1):
    e = zero_at(jnp.exp(logits - maximum), label, shares_exp=True)
    return factor * _softmax(e, sum_less_1)


def _gradient_on_label(row: Row, slopes: _Slopes) -> _Number:
    """The gradient at the label, by its lead; what the sum that leaves the label out has put there is taken back."""
    lead = slopes.numbers.lead
    e = jnp.exp(-lead)
    of_nll = slopes.by.nll * _softmax_minus_1(e, slopes.numbers.sum_less_1)
    d_on_label = slopes.by_log_sum * slopes.softmax(e) + of_nll - slopes.by.lead
    if row.asked.entropy:
        d_on_label += slopes.of_entropy(lead, e)
    if row.class_vector is not None:
        u = _at_label(row.class_vector, row.target)
        d_on_label += slopes.of_spread(u, e) + slopes.by.spread * u
    return d_on_label


def _with_listed(
    d_logits: _Class, row: Row, masses: Float[Array, " listed"], slopes: _Slopes
) -> tuple[_Class, Float[Array, " listed"]]:
    """The gradient with that at listed classes written in, by their leads, and the gradient by their masses."""
    mass_dtype, lead, classes = masses.dtype, slopes.numbers.lead, row.target
    masses, here = silence(row.counts, masses).astype(d_logits.dtype), _is_here(row)
    e, of_target = jnp.exp(-lead), slopes.less_target(_sum_of_others(masses), masses, jnp.exp(-lead))
    d_listed = slopes.by_log_sum * slopes.softmax(e) + slopes.by.nll * of_target - slopes.by.lead
    if row.class_vector is not None:
        d_listed += slopes.of_spread(_at_label(row.class_vector, classes), e)
    if row.asked.entropy:
        d_listed += slopes.of_entropy(lead, e)
    # In its last dtype, or the array that is written to would be a second one.
    d_logits = d_logits.astype(row.logits.dtype)
    nowhere = row.logits.shape[0] + jnp.arange(classes.shape[0], dtype=classes.dtype)
    d_logits = put_at(d_logits, jnp.where(here, classes, nowhere), d_listed.astype(d_logits.dtype))
    is_left_out = jnp.isposinf(lead) & jnp.isfinite(slopes.numbers.maximum)
    d_masses = jnp.where(here, slopes.by.nll * slopes.by_mass(masses, lead, is_left_out), 0)
    return d_logits, d_masses.astype(mass_dtype)


def _sum_of_others(masses: Float[Array, " listed"]) -> Float[Array, " listed"]:
    """For each the sum of those before and after it, and not a difference of sums."""
    before, after = jnp.pad(masses, (1, 0))[:-1], jnp.pad(masses, (0, 1))[1:]
    return jnp.cumsum(before) + jnp.cumsum(after[::-1])[::-1]


def _is_here(row: Row) -> Bool[Array, "*listed"]:
    """Whether a label, or a listed class, is one of the classes at hand."""
    return (row.target >= 0) & (row.target < row.logits.shape[0])


def _at_label(values: Array, label: Integer[Array, "*listed"]) -> Array:
    """The value at the label's class, or at one of them where it is none; and so at listed ones."""
    return values.at[label].get(mode="clip", wrap_negative_indices=False)


def _softmax(e, sum_less_1):
    return e * (1 / (1 + sum_less_1))


def _softmax_minus_1(e, sum_less_1):
    """The softmax, less 1, without taking the difference."""
    return e * (-sum_less_1 / (1 + sum_less_1)) + (e - 1)


measure = rule(_forward, _backward, beside=partial(_forward, beside_gradient=True), outputs=_outputs)


def row_maximum(logits: Array, dtype: np.dtype, real: Array | int | None = None) -> Array:
    """What slices are measured from: their largest logits, constants to every derivative, and never −inf."""
    largest = lax.stop_gradient(jnp.max(without_padding(logits, real, -jnp.inf), axis=-1))
    maximum = jnp.maximum(largest.astype(dtype), jnp.finfo(dtype).min)
    # Without the barrier XLA:CPU writes the maximum out for every logit.
    return keep(maximum)


def slice_row(row: Row, *, shares_exp: bool = False) -> Slice:
    """The sums over the classes at hand, each measured from `row.maximum`.

    A label may lie outside: then the target has no mass here, and the sum that leaves its class out leaves out nothing.
    Every sum is a loop of its own over arithmetic alone, which XLA:CPU runs several times faster than one loop for all,
    or a loop with a selection in it.
    """
    if row.masses is not None:
        return _slice_of_listed(row)
    row = _real(row)
    dtype = row.maximum.dtype
    of_target, of_entropy = (1, 2) if row.has_label else (4, 1)
    count = of_target + of_entropy * row.asked.entropy + (row.class_vector is not None)
    copies, zeros = _copies(row, count)
    here = lead = depth = None
    if row.has_label:
        here = _is_here(row)
        if shares_exp:
            counts = None if _is_masked_late(row) else row.counts
            e = jnp.exp(silence(counts, row.logits) - silence(counts, row.maximum))
            e = zero_at(e, row.target, shares_exp=True)
        else:
            e = _without_label(_exp(copies[0]), copies[0])
        # The barrier keeps XLA:CPU from widening all logits for the sake of one.
        logit = _at_label(keep(row.logits), row.target)
        lead = jnp.maximum(row.maximum - logit.astype(dtype), 0)
        sum_less_1 = sum_alone(e) + jnp.where(here, jnp.expm1(-lead), -1)
        target_moment = Moment(jnp.where(here, lead, 0), here.astype(dtype))
    else:
        sum_less_1 = _without_maximum(sum_alone(_exp(copies[0])), _exp(copies[1]))
        excess = _excess(_effective_target(copies[2], dtype), copies[2], zeros[2])
        target_moment = Moment(excess, sum_alone(_effective_target(copies[3], dtype) + zeros[3]))
    if row.asked.entropy:
        depth = _depth(copies[of_target], zeros[of_target], here, lead)
        if here is not None and lead is not None:
            # Of a label that is behind the sum is a difference.
            others = _without_maximum(sum_less_1 + 1, _exp(copies[of_target + 1]))
            sum_less_1 = jnp.where(here & (lead < 0.5), sum_less_1, others)
    u = copies[-1].class_vector
    vector_moment = None if u is None else Moment(_excess(u, copies[-1], zeros[-1]), sum_alone(u))
    argmax = jnp.argmax(row.logits).astype(jnp.int32) if row.asked.argmax else None
    return Slice(row.maximum, sum_less_1, target_moment, vector_moment, depth, argmax)


def _slice_of_listed(row: Row) -> Slice:
    """The slice of a row whose target lists its classes: for the sums, the nearest to the maximum is the label."""
    classes, here, dtype = row.target, _is_here(row), row.maximum.dtype
    leads = jnp.maximum(row.maximum - _at_label(keep(row.logits), classes).astype(dtype), 0)
    nearest = jnp.full((), -1, classes.dtype)
    if classes.shape[0] != 0:
        nearest = _at_label(classes, jnp.argmin(jnp.where(here, leads, jnp.inf)))
    part = slice_row(row._replace(target=nearest, masses=None))
    return part._replace(target=Moment(jnp.where(here, leads, 0), here.astype(dtype)))


def _without_label(values: _Class, row: Row) -> _Class:
    """Values that are at most 1, and 0 at the label's class, if it is one of them."""
    # |c − y| is 0 at the label alone; in integers where float32 may have no more.
    dtype, num_classes = row.maximum.dtype, row.logits.shape[0]
    number = dtype if isinstance(num_classes, int) and num_classes <= 2**24 else row.target.dtype
    from_label = jnp.abs(jnp.arange(num_classes, dtype=number) - row.target.astype(number))
    return jnp.minimum(values, from_label.astype(dtype))


def _without_maximum(total: _Number, e: _Class) -> _Number:
    """Σ e − 1, of which the total is known: without the difference, where the maximum is the only one.

    x − ⌊x⌋ is x below the maximum and 0 at it: with one maximum, its sum is what is left of the others. There may be
    several, or none where a logit that is computed anew is not the maximum to the last bit.
    """
    below = sum_alone(e - jnp.floor(e))
    return jnp.where((total - 1.5 < below) & (below < total - 0.5), below, total - 1)


def _depth(row: Row, zero: _Number, here: Bool[Array, ""] | None, lead: _Number | None) -> _Number:
    """Σ exp(z − maximum) (maximum − z), where a label is known by its lead."""
    dtype = row.maximum.dtype
    depth, e = jnp.minimum(row.maximum - row.logits.astype(dtype), _DEEP), _exp(row)
    if here is None or lead is None:
        return sum_alone(e * depth + zero)
    of_others = sum_alone(_without_label(e, row) * depth + zero)
    return of_others + jnp.where(here, jnp.exp(-lead) * jnp.minimum(lead, _DEEP), 0)


def _copies(row: Row, count: int) -> tuple[list[Row], list[_Number]]:
    """The row, and a 0, for one sum after another."""
    rows, zeros = zip(*apart((row, jnp.zeros_like(row.maximum)), count), strict=True)
    return list(rows), list(zeros)


def _excess(mass: _Class, row: Row, zero: _Number) -> _Number:
    """Σ mass (maximum − z) with 0 · inf = 0, by arithmetic: where there is mass, the bound of the distance is inf.

    Without the zero, the sum would be a matrix product to XLA:CPU, for which it copies the factors.
    """
    large = keep(jnp.asarray(jnp.finfo(mass.dtype).max, mass.dtype))
    distance = jnp.minimum(row.maximum - row.logits.astype(mass.dtype), jnp.abs(mass) * large * large)
    return sum_alone(mass * distance + zero)


def _exp(row: Row) -> _Class:
    return jnp.exp(row.logits.astype(row.maximum.dtype) - row.maximum)


def _real(row: Row) -> Row:
    """The row with classes of probability 0 in place of padding, whatever it held."""
    if not row.has_label and row.masses is None:
        row = row._replace(target=without_padding(row.target, row.real, 0))
    return row._replace(logits=without_padding(row.logits, row.real, -jnp.inf))


def _effective_target(row: Row, dtype) -> _Class:
    target = row.target.astype(dtype)
    return target if row.target_weights is None else target * row.target_weights
