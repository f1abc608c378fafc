"""The summary of a row: the numbers that every loss over classes is arithmetic on."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxce._arguments import check_bool
from jaxce._conventions import accumulator, loud, silence, without_padding
from jaxce._eager import one_program
from jaxce._head import HeadRows, measure_head
from jaxce._inputs import OnMesh, check_classes
from jaxce._logits import LinearLogits
from jaxce._mesh import vary_rule
from jaxce._rows import Rows, at_classes, on_slices, read_classes
from jaxce._rule import Row, measure, row_maximum
from jaxce._slice import Asked
from jaxce._targets import SparseTargets, Targets
from jaxce._types import AxisName, ClassVector, Logits, PerRow, RowAxisNames, RowMask

_Class = Float[Array, " classes"]


class Summary(NamedTuple):
    """What losses need to know of a row, in float32 (float64 for float64 inputs). Each has the shape of the rows.

    Attributes:
        log_z: log Σ_c exp z_c, the log of the softmax's denominator.
        nll: Σ_c t_c (log_z − z_c), the negative log-likelihood of the target.
        spread: Σ_c u_c (log_z − z_c) for the class vector u; None where none was given.
        entropy: Σ_c p_c (log_z − z_c) of the softmax p, in nats; None where it was not asked for.
        argmax: the smallest class of the largest logit, int32; None where it was not asked for.
    """

    log_z: PerRow
    nll: PerRow
    spread: PerRow | None
    entropy: PerRow | None
    argmax: Integer[Array, "*rows"] | None


@one_program
def summarize(
    logits: Logits | LinearLogits,
    targets: Targets,
    *,
    axis: SupportsIndex = -1,
    class_vector: ClassVector | None = None,
    entropy: bool = False,
    argmax: bool = False,
    where: RowMask | None = None,
    ignore_index: SupportsIndex | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
) -> Summary:
    """Summarizes every row of logits in the numbers that losses are made of.

    For a loss of your own: write it as arithmetic on the summary, and it has the accuracy, the memory and all the
    derivatives of the losses here. For the usual ones call `cross_entropy` and its relatives.

    The numbers of a row are::

        log_z = log Σ_c exp z_c
        nll = Σ_c t_c (log_z − z_c)
        spread = Σ_c u_c (log_z − z_c)
        entropy = Σ_c p_c (log_z − z_c)

    t is the one-hot of the label, or the distribution, u the class vector and p the softmax. All are measured from the
    largest logit of the row, so that a common offset costs no digits, and so that nll and entropy of a row whose target
    leads by up to 70 nats are right to float32's relative precision. Differentiable to any order in `logits`, in
    distributions and in `class_vector`, in forward and reverse mode.

    Args:
        logits: (..., C) or, with `axis`, the classes anywhere. Any floating dtype; the arithmetic is at least float32.
            Or `LinearLogits`: the backward pass makes them again, block by block of classes.
        targets: class indices of the rows' shape in any integer dtype, or distributions of the logits' shape in a
            floating dtype. Distributions need not sum to 1; 0 · log 0 is 0. Or `SparseTargets`, a few classes for each
            row.
        axis: the class axis of `logits`.
        class_vector: (C,), e.g. ones, class weights or a prior, for `spread`.
        entropy: whether the summary has the entropy, for a bonus on it or a look at it. Classes of −inf add nothing.
        argmax: whether the summary has the class that is predicted, for the accuracy. It has no derivative, and costs
            no multiplication where the logits are lazy. Of ties it is the smallest class, of NaN the first.
        where: boolean, the shape of the rows. A row where it is false has a summary of zeros with zero gradient and is
            not read, label included. Mask here and in the reduction: a mask on the finished loss alone comes too late
            for the gradient of a NaN.
        ignore_index: label of rows that do not count, as in `cross_entropy`.
        num_classes: how many classes are no padding, as in `cross_entropy`.
        class_axis_name: mesh axes that split the classes, as in `cross_entropy`.
        batch_axis_name: mesh axes that split the rows, as in `cross_entropy`. Inside `shard_map` it is not
            needed.

    Returns:
        a `Summary`. A label outside [0, C) has a NaN `nll` and gradient, in its own row alone.

    Raises:
        TypeError: a dtype is neither of those, or contradicts the shape of `targets`; `entropy` or `argmax` is no bool.
        ValueError: shapes, `axis` or NumPy labels do not fit, or `ignore_index` comes with distributions.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> summary = jaxce.summarize(jnp.zeros((1, 4)), jnp.array([2]), class_vector=jnp.ones(4))
        >>> print(summary.log_z.round(4), summary.nll.round(4), summary.spread.round(4))
        [1.3863] [1.3863] [5.5452]
        >>> summary = jaxce.summarize(jnp.array([[0.0, 2.0, 2.0]]), jnp.array([2]), entropy=True, argmax=True)
        >>> print(summary.entropy.round(4), summary.argmax)
        [0.8854] [1]
    """
    inputs = check_classes(
        logits,
        targets,
        axis=axis,
        where=where,
        ignore_index=ignore_index,
        class_vector=class_vector,
        on_mesh=OnMesh(num_classes, class_axis_name, batch_axis_name),
        may_be_lazy=True,
    )
    asked = Asked(check_bool("entropy", entropy), check_bool("argmax", argmax))
    return _summarize(inputs, asked)


@partial(jax.jit, static_argnums=1)
def _summarize(inputs, asked):
    def summarize_slice(inputs, _):
        rows = read_classes(inputs)
        summary = summarize_rows(rows, class_vector=rows.class_vector, entropy=asked.entropy, argmax=asked.argmax)
        if not isinstance(inputs.logits, LinearLogits):
            return summary
        return jax.tree.map(lambda number: jnp.reshape(number, inputs.logits.shape[:-1]), summary)

    return on_slices(summarize_slice, inputs, None, per_row=True)


def summarize_rows(
    rows: Rows,
    *,
    class_vector: _Class | None = None,
    target_weights: _Class | None = None,
    entropy: bool = False,
    argmax: bool = False,
) -> Summary:
    """The summary of every row: 0 where a row does not count, a NaN `nll` where its label is wrong.

    Args:
        rows: logits with the class axis last, and their targets.
        class_vector: u of the `spread`.
        target_weights: v, for distributions q: the target is then t_c = v_c q_c.
        entropy: whether it is asked for.
        argmax: whether it is asked for.
    """
    dtype = accumulator(rows.logits, rows.targets, rows.weights, rows.class_weights, class_vector)
    size = rows.logits.shape[-1]
    real = rows.classes.real(size)
    target_weights, class_vector = (
        None if vector is None else without_padding(vector.astype(dtype), real, 0)
        for vector in (target_weights, class_vector)
    )
    targets, masses = rows.targets, None
    if isinstance(targets, SparseTargets):
        targets, masses = jnp.asarray(rows.targets.classes), _effective_masses(rows, target_weights)
        target_weights = None
    if rows.has_labels or masses is not None:
        targets -= rows.classes.start(size)
    shared = {
        "target_weights": target_weights,
        "class_vector": class_vector,
        "counts": rows.counts,
        "real": real,
        "classes": rows.classes,
        "asked": Asked(entropy, argmax),
        "masses": masses,
    }
    if isinstance(rows.logits, LinearLogits):
        measured = measure_head(vary_rule(HeadRows(rows.logits, targets, **shared)))
        widened = jax.tree.map(lambda number: number.astype(dtype), measured._replace(argmax=None))
        numbers = widened._replace(argmax=measured.argmax)
    else:
        maximum = row_maximum(rows.logits, dtype, real)
        numbers = measure(vary_rule(Row(rows.logits, targets, maximum=maximum, **shared)))
    log_z = silence(rows.counts, numbers.maximum) + jnp.log1p(silence(rows.counts, numbers.sum_less_1))
    nll, spread = silence(rows.counts, numbers.nll), silence(rows.counts, numbers.spread)
    of_entropy, of_argmax = silence(rows.counts, numbers.entropy), silence(rows.counts, numbers.argmax)
    return Summary(log_z, loud(rows.valid, nll), spread, of_entropy, of_argmax)


def _effective_masses(rows: Rows, target_weights: _Class | None) -> Array:
    """The masses of listed classes, times the weights of the classes."""
    classes, masses = rows.targets.classes, jnp.asarray(rows.targets.masses)
    if target_weights is None:
        return masses
    weights = silence(rows.counts, at_classes(target_weights, classes, rows.classes))
    return masses.astype(weights.dtype) * weights
