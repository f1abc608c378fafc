"""Checked arguments in the form that the losses compute on.

Inside `jit`: the class axis goes last, labels become safe to index with, masks and `ignore_index` become one mask of
the rows that count, weights take the dtype of the arithmetic.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxce._checks import read_labels, read_listed, report_classes
from jaxce._conventions import accumulator, loud, silence
from jaxce._inputs import ClassInputs
from jaxce._logits import LinearLogits
from jaxce._mesh import Classes
from jaxce._split import check_same, enter, over_devices
from jaxce._targets import SparseTargets
from jaxce._types import MaskPerRow, PerRow
from jaxce._xla import each

_Settings = TypeVar("_Settings")
_Result = TypeVar("_Result")


class Rows(NamedTuple):
    """What a loss over classes computes on. Rows that do not count have label 0 and weight 0.

    `counts` and `valid` are None where every row counts and no label can be wrong. With `LinearLogits` there is one
    axis of rows. Whatever has classes may be a slice of `classes`; labels are numbers of all of them. `extras` are a
    pytree of arrays of the rows, for a loss of one's own.
    """

    logits: Any  # Float[Array, "*rows classes"] or LinearLogits
    targets: Any  # Integer[Array, "*rows"], Float[Array, "*rows classes"], SparseTargets or LinearLogits
    counts: MaskPerRow | None
    valid: MaskPerRow | None
    weights: PerRow | None
    class_weights: Float[Array, " classes"] | None
    classes: Classes
    class_vector: Float[Array, " classes"] | None = None
    extras: object = None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the arithmetic."""
        return accumulator(self.logits, self.targets, self.weights, self.class_weights)

    @property
    def has_labels(self) -> bool:
        """Whether the targets are class indices, and not distributions."""
        return not isinstance(self.targets, LinearLogits) and jnp.issubdtype(self.targets.dtype, jnp.integer)

    @property
    def label_weights(self) -> PerRow | None:
        """The class weight of every row's label; None without class weights or labels."""
        if self.class_weights is None or not self.has_labels:
            return None
        return silence(self.counts, at_label(self.class_weights, self))

    def has_rows(self) -> list[bool]:
        """Of every leaf, whether it has an axis of rows; all others are shared. With `LinearLogits` there is one."""
        own, mixed = {"counts", "valid", "weights", "extras"}, {"logits", "targets"}
        shared = {"kernel", "bias", "softcap"}
        paths = [([getattr(key, "name", "") for key in path], leaf) for path, leaf in jax.tree.leaves_with_path(self)]
        return [
            field in own or (field in mixed and not shared.intersection(rest) and leaf.ndim > 0)
            for (field, *rest), leaf in paths
        ]


def at_label(values: Array, rows: Rows) -> PerRow:
    """What every row's label has among values of the classes: (*rows, classes), or (classes,) for all rows."""
    return at_classes(values, rows.targets, rows.classes)


def at_classes(values: Array, labels: Array, classes: Classes) -> Array:
    """What labels have among values of the classes: (*rows, classes), or (classes,) for labels of any shape."""
    size = values.shape[-1]
    labels = labels - classes.start(size)
    clipped = jnp.clip(labels, 0, size - 1) if classes.axes else labels
    of_rows = values.ndim > 1 or labels.ndim == 0
    chosen = jnp.take_along_axis(values, clipped[..., None], axis=-1)[..., 0] if of_rows else values[clipped]
    if not classes.axes:
        return chosen
    return classes.sum(jnp.where(labels == clipped, chosen, jnp.zeros((), chosen.dtype)))


def on_slices(
    function: Callable[[ClassInputs, _Settings], _Result],
    inputs: ClassInputs,
    settings: _Settings,
    *,
    per_row: bool,
) -> _Result:
    """function(inputs, settings), by every device on its slice where the inputs are whole and split over a mesh.

    Args:
        function: returns arrays of the rows' shape, or scalars over all rows.
        inputs: checked arguments.
        settings: a pytree of arrays that are not in them and that no mesh splits.
        per_row: whether the result has the rows' shape.
    """
    split = inputs.split
    report_classes(inputs)
    if not split.is_whole:
        check_same(split, getattr(settings, "_asdict", dict)())
        return function(inputs, settings)
    entered = replace(inputs, split=enter(split))
    specs = replace(inputs.specs(), split=entered.split), PartitionSpec()
    result = split.rows_spec() if per_row else PartitionSpec()
    return over_devices(function, split, (entered, settings), specs, result)


def read_classes(inputs: ClassInputs) -> Rows:
    """Puts the arguments of a loss over classes into the form that the losses compute on."""
    logits, targets = inputs.logits, inputs.targets
    if not isinstance(logits, LinearLogits):
        logits = jnp.moveaxis(_widened(jnp.asarray(logits)), inputs.axis, -1)
    if not isinstance(targets, LinearLogits | SparseTargets):
        targets = _widened(jnp.asarray(targets))
    counts = None if inputs.where is None else jnp.asarray(inputs.where)
    valid = None
    if isinstance(targets, SparseTargets):
        targets, valid = _read_sparse(targets, counts, inputs)
    elif isinstance(targets, LinearLogits):
        pass
    elif jnp.issubdtype(targets.dtype, jnp.integer):
        targets, counts, in_range = read_labels(targets, counts, inputs)
        valid = in_range if counts is None else in_range | ~counts
        targets = jnp.where(in_range if counts is None else in_range & counts, targets, 0).astype(jnp.int32)
    else:
        targets = jnp.moveaxis(targets, inputs.axis, -1)
    dtype = accumulator(logits, targets, inputs.weights, inputs.class_weights)
    weights, class_weights = (
        None if array is None else jnp.asarray(array, dtype) for array in (inputs.weights, inputs.class_weights)
    )
    class_vector = None if inputs.class_vector is None else jnp.asarray(inputs.class_vector)
    rows = Rows(logits, targets, counts, valid, silence(counts, weights), class_weights, inputs.classes, class_vector)
    rows = rows._replace(extras=jax.tree.map(jnp.asarray, inputs.extras))
    is_lazy = isinstance(logits, LinearLogits) or isinstance(targets, LinearLogits)
    return _one_axis_of_rows(rows) if is_lazy else rows


def _read_sparse(targets: SparseTargets, counts: Array | None, inputs: ClassInputs) -> tuple[SparseTargets, Array]:
    """Classes that are listed once each, −1 in place of what is none, and which rows have no wrong one."""
    classes, in_range = read_listed(targets, inputs)
    masses = silence(counts, _widened(jnp.asarray(targets.masses)))
    is_padding = ~in_range & (masses == 0)
    classes = silence(counts, jnp.where(in_range, classes, -1).astype(jnp.int32))
    masses = jnp.where(is_padding, 0, masses)  # of which there is no derivative
    is_right = in_range | is_padding
    # A wrong class has no place in the rule. By the factor its mass has a gradient too, of NaN.
    return _listed_once(classes, loud(is_right, masses)), jnp.all(is_right, axis=-1)


def _listed_once(classes: Array, masses: Array) -> SparseTargets:
    """All masses of a class where it stands first, and −1 where it stands again."""
    number = classes.shape[-1]
    if isinstance(number, int) and number < 2:
        return SparseTargets(classes, masses)

    position = lax.broadcasted_iota(jnp.int32, classes.shape, classes.ndim - 1)

    def of_one(k):
        is_same = classes == lax.dynamic_slice_in_dim(classes, k, 1, axis=-1)
        is_again = jnp.any(is_same & (position < k), axis=-1)
        return jnp.sum(jnp.where(is_same, masses, 0), axis=-1), is_again

    totals, is_again = each(of_one, jnp.arange(number, dtype=jnp.int32))
    totals, is_again = jnp.moveaxis(totals, 0, -1), jnp.moveaxis(is_again, 0, -1)
    return SparseTargets(jnp.where(is_again, -1, classes), jnp.where(is_again, 0, totals))


def _widened(array: Array) -> Array:
    """Floats of less than 16 bits as float32: some of them have no infinity, no NaN, or no 0."""
    is_narrow = jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits < 16
    return array.astype(jnp.float32) if is_narrow else array


def _one_axis_of_rows(rows: Rows) -> Rows:
    """Blocks of rows, and blocks of classes of all rows, want the rows along one axis."""
    num_axes = len(rows.logits.shape) - 1
    num_rows = math.prod(rows.logits.shape[:-1])

    def flatten(array):
        return None if array is None else flat(array)

    def flat(array: Array) -> Array:
        return jnp.reshape(array, (num_rows, *array.shape[num_axes:]))

    counts = flatten(rows.counts)

    def flatten_logits(head):
        if isinstance(head, SparseTargets):
            return SparseTargets(flat(jnp.asarray(head.classes)), flat(jnp.asarray(head.masses)))
        if not isinstance(head, LinearLogits):
            return flatten(head)
        hidden = flatten(jnp.asarray(head.hidden))
        softcap, temperature = (
            None if number is None else jnp.asarray(number, head.dtype) for number in (head.softcap, head.temperature)
        )
        if temperature is not None and temperature.ndim > 0:
            temperature = flat(temperature)
            # What a row that does not count has is not read.
            temperature = temperature if counts is None else jnp.where(counts, temperature, 1)
        return replace(head, hidden=hidden, kernel=jnp.asarray(head.kernel), softcap=softcap, temperature=temperature)

    return rows._replace(
        logits=flatten_logits(rows.logits),
        targets=flatten_logits(rows.targets),
        counts=counts,
        valid=flatten(rows.valid),
        weights=flatten(rows.weights),
        extras=jax.tree.map(flatten, rows.extras),
    )
