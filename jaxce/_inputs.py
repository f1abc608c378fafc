"""The door: every error for a bad argument is raised here.

It is passed outside `jit`, with shapes, dtypes and NumPy values at hand, and tells the caller what to change. What
comes out is a pytree that the jitted half of a loss takes.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxce._arguments import (
    as_array,
    check_axis,
    check_extras,
    check_floating,
    check_integer,
    check_numbers,
    check_scalar,
    check_shape,
    check_sparse,
    check_sparse_values,
    check_temperature_values,
    check_temperatures,
    check_weights_and_mask,
    dtype_in_jax,
    known_to_count,
    named_extras,
    row_temperatures,
    shown,
    squeeze_hint,
)
from jaxce._conventions import accumulator
from jaxce._logits import LinearLogits
from jaxce._mesh import Classes
from jaxce._split import (
    UNSPLIT,
    Holder,
    Split,
    check_classes_vary,
    check_rows_vary,
    check_same,
    find_features,
    find_label_split,
    find_split,
    slice_hint,
    slices_of,
)
from jaxce._targets import SparseTargets, Targets
from jaxce._types import (
    AxisName,
    ClassVector,
    Costs,
    ElementMask,
    Elements,
    HeldArray,
    Labels,
    Logits,
    RowAxisNames,
    RowMask,
    RowWeights,
)

_Logits = TypeVar("_Logits")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "targets", "weights", "class_weights", "class_vector", "where", "extras"],
    meta_fields=["axis", "ignore_index", "num_classes", "split", "name", "targets_name"],
)
@dataclass(frozen=True)
class ClassInputs:
    """Checked arguments of a loss over classes, on their way into `jit`; `axis` is not negative.

    The logits, and a teacher's that stand in `targets`, are an array or `LinearLogits`. `num_classes` is None where no
    class is padding, `extras` are a pytree of arrays of the rows' shape that a loss has beside them, `name` and
    `targets_name` are the caller's words.
    """

    logits: HeldArray | LinearLogits
    targets: HeldArray | LinearLogits | SparseTargets
    weights: HeldArray | None
    class_weights: HeldArray | None
    where: HeldArray | None
    axis: int
    class_vector: HeldArray | None = None
    ignore_index: int | None = None
    num_classes: int | None = None
    split: Split = UNSPLIT
    extras: object = None
    name: str = "logits"
    targets_name: str = "targets"

    @property
    def classes(self) -> Classes:
        """All the classes, of which the arrays may have a slice."""
        axes = self.split.class_axes
        slices = math.prod(jax.lax.axis_size(name) for name in axes)
        number = slices * self.logits.shape[self.axis] if self.num_classes is None else self.num_classes
        return Classes(number, axes, slices)

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """The shape of the losses."""
        return self.logits.shape[: self.axis] + self.logits.shape[self.axis + 1 :]

    def specs(self) -> "ClassInputs":
        """How the arrays are split over a mesh."""
        rows, classes = self.split.rows_spec(), self.split.classes_spec()
        has_classes = isinstance(self.targets, LinearLogits) or jnp.issubdtype(self.targets.dtype, jnp.floating)

        def over_classes(logits: HeldArray | LinearLogits | SparseTargets) -> PartitionSpec | LinearLogits:
            if isinstance(logits, SparseTargets):
                return rows
            if not isinstance(logits, LinearLogits):
                return self.split.spec(logits.ndim, self.axis)
            kernel = PartitionSpec(logits.feature_axis_name, *classes)
            whole = PartitionSpec()
            temperature = whole if row_temperatures(logits) is None else rows
            return replace(logits, hidden=rows, kernel=kernel, bias=classes, softcap=whole, temperature=temperature)

        return replace(
            self,
            logits=over_classes(self.logits),
            targets=over_classes(self.targets) if has_classes else rows,
            weights=rows,
            class_weights=classes,
            class_vector=classes,
            where=rows,
            extras=jax.tree.map(lambda _: rows, self.extras),
        )


class OnMesh(NamedTuple):
    """What a caller says of rows and classes that are split over a mesh, or filled up for one."""

    num_classes: SupportsIndex | None = None
    class_axis_name: AxisName | None = None
    batch_axis_name: RowAxisNames | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "targets", "weights", "where"],
    meta_fields=["name"],
)
@dataclass(frozen=True)
class ElementInputs:
    """Arguments of an elementwise loss, all of one shape."""

    values: HeldArray
    targets: HeldArray
    weights: HeldArray | None
    where: HeldArray | None
    name: str


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["targets", "where"],
    meta_fields=["num_classes", "split"],
)
@dataclass(frozen=True)
class LabelInputs:
    """Labels to be counted, and the mask of those that count."""

    targets: HeldArray
    where: HeldArray | None
    num_classes: int
    split: Split = UNSPLIT


def check_classes(
    logits: Logits | LinearLogits,
    targets: Targets,
    *,
    axis: SupportsIndex = -1,
    weights: RowWeights | None = None,
    class_weights: ClassVector | None = None,
    where: RowMask | None = None,
    class_vector: ClassVector | None = None,
    ignore_index: SupportsIndex | None = None,
    extras: object = None,
    on_mesh: OnMesh | None = None,
    labels_only: str | None = None,
    may_be_lazy: bool = False,
    name: str = "logits",
) -> ClassInputs:
    """Checks the arguments that losses over classes share.

    `labels_only` is the name of a loss that is defined for class indices alone, `may_be_lazy` whether it takes
    `LinearLogits`, `name` what the caller calls the logits.
    """
    if may_be_lazy and isinstance(logits, LinearLogits):
        name = "hidden · kernel"
        logits, axis = _check_logits(name, logits, axis)
    else:
        logits = check_floating(name, logits)
        axis = check_axis(axis, name, logits.shape)
    size = logits.shape[axis]
    if size == 0:
        raise ValueError(f"`{name}` must have at least one class; got shape {logits.shape} with class axis {axis}.")
    rows_shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    if labels_only is None and isinstance(targets, SparseTargets):
        targets = check_sparse(targets, rows_shape, axis, name)
    else:
        targets = as_array("targets", targets)
        _check_target_dtype(targets, logits.shape, rows_shape, axis, name, labels_only)
        _check_target_shape(targets, logits.shape, rows_shape, axis, name)
    if ignore_index is not None:
        ignore_index = _check_ignore_index(ignore_index, targets, rows_shape)
    if class_weights is not None:
        class_weights = check_numbers("class_weights", class_weights)
        if class_weights.shape != (size,):
            raise ValueError(
                f"`class_weights` must have shape ({size},), one weight for each class along axis {axis} of "
                f"`{name}`; got {class_weights.shape}. Weights of rows go into `weights`"
                f"{_class_counts_hint(class_weights, rows_shape)}.{slice_hint(class_weights.shape, size)}"
            )
    weights, where = check_weights_and_mask(weights, where, rows_shape)
    class_vector = _check_class_vector(class_vector, size)
    extras = check_extras(extras, rows_shape)
    inputs = ClassInputs(logits, targets, weights, class_weights, where, axis, class_vector, ignore_index)
    inputs = replace(inputs, extras=extras, name=name)
    inputs = _check_mesh(inputs, name, on_mesh or OnMesh())
    check_temperature_values("temperature", logits, known_to_count(targets, where, ignore_index))
    if isinstance(targets, SparseTargets):
        check_sparse_values(targets, inputs.classes.number, where)
        classes, _ = _narrowed(targets.classes, None)
        return replace(inputs, targets=SparseTargets(classes, targets.masses))
    _check_label_values(targets, inputs.classes.number, where, ignore_index)
    targets, ignore_index = _narrowed(targets, ignore_index)
    return replace(inputs, targets=targets, ignore_index=ignore_index)


def _check_mesh(inputs: ClassInputs, name: str, on_mesh: OnMesh) -> ClassInputs:
    """Checks how the classes and the rows are split, and how many classes are real."""
    targets, num_classes = inputs.targets, on_mesh.num_classes
    of_rows = {"weights": inputs.weights, "where": inputs.where} | named_extras(inputs.extras)
    of_rows |= {"temperature": row_temperatures(inputs.logits)}
    of_rows |= {f"{inputs.targets_name}.temperature": row_temperatures(targets)}
    of_classes = {"class_weights": inputs.class_weights, "class_vector": inputs.class_vector}
    of_logits, of_targets = _holders(name, inputs.logits, inputs.axis), []
    rows_at = tuple(range(inputs.logits.ndim - 1))
    if isinstance(targets, SparseTargets):
        of_rows |= {"targets.classes": targets.classes, "targets.masses": targets.masses}
    elif not isinstance(targets, LinearLogits) and jnp.issubdtype(targets.dtype, jnp.integer):
        of_rows["targets"] = targets
    else:
        of_targets = _holders(inputs.targets_name, targets, inputs.axis)
    holders = [
        *of_logits,
        *of_targets,
        *(Holder(name, array, rows_at=rows_at) for name, array in of_rows.items() if array is not None),
        *(Holder(name, array, classes_at=0) for name, array in of_classes.items() if array is not None),
    ]
    split = find_split(holders, on_mesh.class_axis_name, on_mesh.batch_axis_name)
    check_same(split, of_rows)
    check_rows_vary(split, of_logits[0].array, *of_rows.values())
    if isinstance(targets, LinearLogits):
        kernel = next(holder for holder in of_targets if holder.classes_at is not None)
        check_classes_vary(split.class_axes, f"{inputs.targets_name}.kernel", kernel.array)
    logits = _with_features(inputs.logits, split, "")
    inputs = replace(
        inputs, logits=logits, targets=_with_features(targets, split, f"{inputs.targets_name}."), split=split
    )
    if num_classes is not None:
        num_classes = check_integer("num_classes", num_classes)
        most = inputs.classes.number
        is_known = isinstance(most, int)  # and not symbolic
        if num_classes <= 0 or (is_known and num_classes > most):
            raise ValueError(
                f"`num_classes` must be in [1, {most}], the number of classes that `{name}` has in all; got "
                f"{shown(num_classes)}."
            )
    return replace(inputs, num_classes=num_classes)


def _with_features(logits: _Logits, split: Split, prefix: str) -> _Logits:
    """Logits, which know the mesh axes of their kernel's features if they are lazy."""
    if not isinstance(logits, LinearLogits):
        return logits
    names = find_features(split, f"{prefix}kernel", logits.kernel, logits.feature_axis_name)
    return replace(logits, feature_axis_name=names)


def _holders(name: str, logits: HeldArray | LinearLogits, axis: int) -> list[Holder]:
    """Logits, or what a head consists of, as `find_split` takes them."""
    if not isinstance(logits, LinearLogits):
        return [Holder(name, logits, rows_at=tuple(i for i in range(logits.ndim) if i != axis), classes_at=axis)]
    hidden = Holder("hidden", logits.hidden, rows_at=tuple(range(logits.ndim - 1)))
    of_bias = [] if logits.bias is None else [Holder("bias", logits.bias, classes_at=0)]
    return [hidden, Holder("kernel", logits.kernel, classes_at=1), *of_bias]


def check_teacher(
    logits: Logits | LinearLogits,
    teacher_logits: Logits | LinearLogits,
    axis: SupportsIndex,
    weights: RowWeights | None,
    where: RowMask | None,
    on_mesh: OnMesh,
) -> ClassInputs:
    """Checks the arguments of a loss whose targets are logits themselves; either may be lazy."""
    name = "hidden · kernel" if isinstance(logits, LinearLogits) else "logits"
    logits, axis = _check_logits(name, logits, axis)
    teacher_logits, _ = _check_logits("teacher_logits", teacher_logits, axis, prefix="teacher_logits.")
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"`teacher_logits` must have the shape of `{name}`, {logits.shape}; got {teacher_logits.shape}. "
            "Do both models share the rows and the classes?"
        )
    weights, where = check_weights_and_mask(weights, where, logits.shape[:axis] + logits.shape[axis + 1 :])
    counts = known_to_count(None, where, None)
    check_temperature_values("temperature", logits, counts)
    check_temperature_values("teacher_logits.temperature", teacher_logits, counts)
    inputs = ClassInputs(logits, teacher_logits, weights, None, where, axis, targets_name="teacher_logits")
    return _check_mesh(inputs, name, on_mesh)


def _check_linear(logits: LinearLogits, prefix: str = "") -> LinearLogits:
    """Checks what lazy logits consist of. `prefix` is what the names of its parts begin with."""
    hidden_name, kernel_name, bias_name = f"{prefix}hidden", f"{prefix}kernel", f"{prefix}bias"
    hidden, kernel = check_floating(hidden_name, logits.hidden), check_floating(kernel_name, logits.kernel)
    bias, softcap, temperature, block_bytes = logits.bias, logits.softcap, logits.temperature, logits.block_bytes
    if hidden.ndim == 0:
        raise ValueError(f"`{hidden_name}` must have shape (..., D), features last; got shape ().")
    width, count = hidden.shape[-1], slices_of(logits.feature_axis_name)
    if kernel.ndim != 2 or kernel.shape[0] * count != width:
        hint = f" Is it (V, D)? Pass {kernel_name}.T." if kernel.ndim == 2 and kernel.shape[1] == width else ""
        hint = hint if count == 1 else f" Its features are one of {count} slices, and hidden has all of them."
        width = width if count == 1 else f"{width} / {count}"
        raise ValueError(
            f"`{kernel_name}` must have shape ({width}, V), features of `{hidden_name}` first and classes last; got "
            f"{kernel.shape} with `{hidden_name}` of shape {hidden.shape}.{hint}"
        )
    if bias is not None:
        bias = check_floating(bias_name, bias)
        if bias.shape != kernel.shape[1:]:
            raise ValueError(
                f"`{bias_name}` must have shape {kernel.shape[1:]}, one number for each class; got {bias.shape}."
                f"{slice_hint(bias.shape, kernel.shape[1])}"
            )
    if softcap is not None:
        softcap = check_scalar(f"{prefix}softcap", softcap, low=0, open_low=True)
    if temperature is not None:
        temperature = check_temperatures(f"{prefix}temperature", temperature, hidden.shape[:-1])
    if block_bytes is not None:
        block_bytes = check_integer(f"{prefix}block_bytes", block_bytes)
        if block_bytes <= 0:
            raise ValueError(f"`{prefix}block_bytes` must be positive; got {shown(block_bytes)}.")
    if not (logits.recompute is None or isinstance(logits.recompute, bool)):
        raise TypeError(
            f"`{prefix}recompute` must be True, False or None, known when the function is traced; got "
            f"{shown(logits.recompute)}."
        )
    return LinearLogits(
        hidden,
        kernel,
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        feature_axis_name=logits.feature_axis_name,
        block_bytes=block_bytes,
        recompute=logits.recompute,
    )


def _check_logits(
    name: str, logits: Logits | LinearLogits, axis: SupportsIndex, prefix: str = ""
) -> tuple[HeldArray | LinearLogits, int]:
    """Checks an array of logits, or lazy ones, and the axis of their classes."""
    if not isinstance(logits, LinearLogits):
        logits = check_floating(name, logits)
        return logits, check_axis(axis, name, logits.shape)
    logits = _check_linear(logits, prefix)
    axis = check_axis(axis, name, logits.shape)
    if axis != logits.ndim - 1:
        raise ValueError(
            f"`axis` must be -1 for LinearLogits, whose classes are last; got {axis} of {logits.ndim} axes."
        )
    return logits, axis


def _check_class_vector(vector: ClassVector | None, num_classes: int) -> HeldArray | None:
    if vector is None:
        return None
    vector = check_numbers("class_vector", vector)
    if vector.shape != (num_classes,):
        raise ValueError(
            f"`class_vector` must have shape ({num_classes},), one number for each class; got {vector.shape}."
            f"{slice_hint(vector.shape, num_classes)}"
        )
    return vector


def with_dtype_of(inputs: ClassInputs, array: HeldArray) -> ClassInputs:
    """The same arguments, their logits in the dtype of the arithmetic, which another array may make float64."""
    return replace(inputs, logits=jnp.asarray(inputs.logits, accumulator(inputs.logits, array)))


def check_costs(costs: Costs, num_classes: int) -> HeldArray:
    """Checks the price of every mistake."""
    costs = check_numbers("costs", costs, hint=" Cast them: costs.astype(jnp.float32).")
    if costs.shape != (num_classes, num_classes):
        raise ValueError(
            f"`costs` must have shape ({num_classes}, {num_classes}), a row for each true class and a column for each "
            f"predicted one; got {costs.shape}."
        )
    return costs


def check_labels(targets: Labels, num_classes: SupportsIndex, where: RowMask | None) -> LabelInputs:
    """Checks labels that are to be counted."""
    targets = as_array("targets", targets)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        hint = ""
        if jnp.issubdtype(targets.dtype, jnp.floating):
            hint = " The mass that distributions give to the classes is targets.sum(axis=0)."
        raise TypeError(f"`targets` must be class indices of an integer dtype; got {targets.dtype}.{hint}")
    num_classes = check_integer("num_classes", num_classes)
    most = np.iinfo(np.int32).max
    if not 0 < num_classes <= most:
        raise ValueError(f"`num_classes` must be in [1, {most}]; got {shown(num_classes)}.")
    _, where = check_weights_and_mask(None, where, targets.shape, "`targets`")
    _check_label_values(targets, num_classes, where, None)
    targets, _ = _narrowed(targets, None)
    return LabelInputs(targets, where, num_classes, find_label_split(targets, where))


def check_elements(
    name: str, values: Elements, targets: Elements, weights: Elements | None, where: ElementMask | None
) -> ElementInputs:
    """Checks the arguments of an elementwise loss: everything has the shape of `values`."""
    values = check_floating(name, values)
    targets = as_array("targets", targets)
    check_shape("targets", targets, f"`{name}`", values.shape)
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise TypeError(
            f"`targets` must have a floating dtype; got {targets.dtype}. Cast them: targets.astype(jnp.float32)."
        )
    weights, where = check_weights_and_mask(weights, where, values.shape)
    return ElementInputs(values, targets, weights, where, name)


def holds(labels: HeldArray, ignore_index: int) -> bool:
    """Whether labels of their dtype can be equal to `ignore_index` at all."""
    limits = jnp.iinfo(labels.dtype)
    return limits.min <= ignore_index <= limits.max


def _check_ignore_index(
    ignore_index: SupportsIndex, targets: HeldArray | SparseTargets, rows_shape: tuple[int, ...]
) -> int:
    ignore_index = check_integer("ignore_index", ignore_index)
    if isinstance(targets, SparseTargets):
        raise ValueError(
            "`ignore_index` needs class indices, and `targets` are SparseTargets. Pass `where`, a boolean mask of "
            f"shape {rows_shape}, to leave rows out."
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"`ignore_index` needs class indices, and `targets` are probabilities of shape {targets.shape}. "
            f"Pass `where`, a boolean mask of shape {rows_shape}, to leave rows out."
        )
    if not holds(targets, ignore_index):
        limits = jnp.iinfo(targets.dtype)
        wrapped = (ignore_index - int(limits.min)) % 2**limits.bits + int(limits.min)
        raise ValueError(
            f"`ignore_index` must be a number that `targets` of dtype {targets.dtype} can hold, in [{limits.min}, "
            f"{limits.max}]; got {shown(ignore_index)}, which no row has. Were the labels cast? A cast to "
            f"{targets.dtype} makes {wrapped} of it."
        )
    return ignore_index


def _narrowed(targets: HeldArray, ignore_index: int | None) -> tuple[HeldArray, int | None]:
    """NumPy labels in the dtype that JAX has for them, and `ignore_index` as it is found there.

    Without x64 that has 32 bits, of 64. What they cannot hold must not turn into a class: it becomes a number that is
    none, and another one where it is ignored.
    """
    if not isinstance(targets, np.ndarray) or targets.dtype.kind not in "iu":
        return targets, ignore_index
    dtype = dtype_in_jax(targets)
    limits = np.iinfo(dtype)
    if dtype == targets.dtype:
        return targets, ignore_index
    fits = (targets >= limits.min) & (targets <= limits.max)
    if fits.all() and (ignore_index is None or limits.min <= ignore_index <= limits.max):
        return targets.astype(dtype), ignore_index
    ignored, wrong = np.int32(-1), np.int32(-2)
    may_be_class = (targets >= 0) & (targets <= np.iinfo(np.int32).max)
    narrowed = np.where(may_be_class, np.where(may_be_class, targets, 0).astype(np.int32), wrong)
    if ignore_index is None:
        return narrowed, None
    return np.where(targets == ignore_index, ignored, narrowed), int(ignored)


def _class_counts_hint(class_weights: HeldArray, rows_shape: tuple[int, ...]) -> str:
    """What may be wrong with class weights of which there are as many as rows."""
    if class_weights.shape != rows_shape or not rows_shape:
        return ""
    return ", and class weights are made of counts: class_weights(class_counts(targets, num_classes))"


def _check_target_dtype(
    targets: HeldArray,
    logits_shape: tuple[int, ...],
    rows_shape: tuple[int, ...],
    axis: int,
    name: str,
    labels_only: str | None,
) -> None:
    dtype, shape = targets.dtype, targets.shape
    if labels_only is not None and (shape == logits_shape or not jnp.issubdtype(dtype, jnp.integer)):
        hint = f" Of one-hot vectors it takes the class: targets.argmax({axis})." if shape == logits_shape else ""
        raise TypeError(
            f"`{labels_only}` is defined for class indices: `targets` must be integers of shape {rows_shape}; "
            f"got {dtype} of shape {shape}.{hint}"
        )
    if jnp.issubdtype(dtype, jnp.floating):
        if shape == rows_shape:
            raise TypeError(
                f"`targets` of dtype {dtype} are probabilities and must have the shape of `{name}`, {logits_shape}; "
                f"got {shape}, the shape of class indices. Class indices are integers: targets.astype(jnp.int32)."
            )
    elif jnp.issubdtype(dtype, jnp.integer):
        if shape == logits_shape:
            raise TypeError(
                f"`targets` of dtype {dtype} are class indices and must have shape {rows_shape}; got {shape}, the "
                f"shape of `{name}`. Probabilities and one-hot vectors are floating: targets.astype(jnp.float32)."
            )
    else:
        wanted = "jnp.float32" if shape == logits_shape else "jnp.int32"
        raise TypeError(
            f"`targets` must be class indices of an integer dtype, or probabilities of a floating dtype; got {dtype}. "
            f"Cast them: targets.astype({wanted})."
        )


def _check_target_shape(
    targets: HeldArray, logits_shape: tuple[int, ...], rows_shape: tuple[int, ...], axis: int, name: str
) -> None:
    shape = targets.shape
    if shape == (rows_shape if jnp.issubdtype(targets.dtype, jnp.integer) else logits_shape):
        return
    hint = squeeze_hint("targets", shape, rows_shape)
    if not hint:
        without = [logits_shape[:i] + logits_shape[i + 1 :] for i in range(len(logits_shape))]
        if shape in without:
            hint = f" Is the class axis another one? Pass axis={without.index(shape)}."
        elif len(shape) == len(rows_shape) and rows_shape:
            shifted = "hidden" if "hidden" in name else name
            hint = f" Were the targets shifted and the {shifted} not?"
    raise ValueError(
        f"`targets` must have shape {rows_shape} for class indices or {logits_shape} for probabilities, with `{name}` "
        f"of shape {logits_shape} and class axis {axis}; got {shape}.{hint}"
    )


def _check_label_values(
    targets: HeldArray, num_classes: int, where: HeldArray | None, ignore_index: int | None
) -> None:
    """NumPy labels are there to be read: a wrong one is an error at once."""
    if not isinstance(targets, np.ndarray) or not jnp.issubdtype(targets.dtype, jnp.integer):
        return
    if not isinstance(num_classes, int):  # symbolic, and known when the program runs
        return
    if not (where is None or isinstance(where, np.ndarray)):
        return
    wrong = (targets < 0) | (targets >= num_classes)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    if where is not None:
        wrong &= where
    if wrong.any():
        position = tuple(int(i) for i in np.argwhere(wrong)[0])
        label = int(targets[position])
        hint = f" If {label} marks rows to leave out, pass where=targets != {label}." if ignore_index is None else ""
        raise ValueError(
            f"`targets` must be class indices in [0, {num_classes}); got {label} at position {position}.{hint}"
        )
