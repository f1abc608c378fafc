"""One argument at a time: arrays, numbers, choices, and the weights and masks that have a shape to fit."""

import operator
import reprlib
from typing import SupportsIndex, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxce._conventions import accumulator
from jaxce._logits import LinearLogits
from jaxce._targets import SparseTargets
from jaxce._types import HeldArray, Reduction

_COLDEST, _HOTTEST = 1e-9, 1e9


def check_weights_and_mask(
    weights: object, where: object, shape: tuple[int, ...], like: str = "the losses"
) -> tuple[HeldArray | None, HeldArray | None]:
    """Checks row weights and mask against the shape of the losses, or what else is to be `like`."""
    if weights is not None:
        weights = check_numbers("weights", weights)
        if not jnp.issubdtype(weights.dtype, jnp.floating):
            raise TypeError(
                f"`weights` must have a floating dtype, a factor for each loss; got {weights.dtype}. Cast them if "
                "that is what they are: weights.astype(jnp.float32). Of ids of segments make a mask: where=ids != 0."
            )
        check_shape("weights", weights, like, shape)
    if where is not None:
        dtype = getattr(where, "dtype", np.dtype(bool))
        if dtype != np.bool_:
            raise TypeError(
                f"`where` must be boolean; got {dtype}. Of a mask that is 0 where nothing counts, pass where=mask != 0."
            )
        where = as_array("where", where)
        check_shape("where", where, like, shape)
    return weights, where


def check_broadcast(name: str, value: object, shape: tuple[int, ...]) -> HeldArray | None:
    """Checks factors of the elements: they may be stretched to the elements' shape, but never stretch it."""
    if value is None:
        return None
    if isinstance(value, int | float | np.floating):
        return check_scalar(name, value)
    value = check_numbers(name, value)
    lengths = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.ndim > len(shape) or not all(length in (1, wanted) for length, wanted in lengths):
        raise ValueError(
            f"`{name}` must be a scalar, or broadcast to the shape of `logits`, {shape}; got {value.shape}. One number "
            "for each output is a vector of the last axis' length."
        )
    return value


def check_reduction(reduction: str) -> None:
    """Checks the name of a reduction."""
    check_name("reduction", reduction, Reduction)


def check_name(argument: str, value: object, literal: object) -> None:
    """Checks that a choice is one of a `Literal`."""
    names = get_args(literal)
    if not isinstance(value, str) or value not in names:
        listed = ", ".join(repr(name) for name in names[:-1])
        raise ValueError(f"`{argument}` must be {listed} or {names[-1]!r}; got {shown(value)}.")


def check_scalar(
    name: str,
    value: object,
    *,
    low: float = -np.inf,
    high: float = np.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> HeldArray:
    """Checks a scalar setting: its shape always, its value where it is a Python or NumPy number.

    Such a number comes out as a float64, within the range of JAX's widest float. No interval has an infinite end in it.
    """
    try:
        if isinstance(value, int | float | np.floating) and not isinstance(value, bool):
            array = np.asarray(float(value))
        else:
            array = as_array(name, value)
    except TypeError:
        raise TypeError(f"`{name}` must be a number; got {shown(value)}.") from None
    except OverflowError:  # of an integer
        array = np.asarray(-np.inf if isinstance(value, int) and value < 0 else np.inf)
    if array.shape != ():
        raise ValueError(f"`{name}` must be a scalar; got shape {array.shape}.")
    if not _is_numeric(array.dtype):
        raise TypeError(f"`{name}` must be a number; got {array.dtype}.")
    if not isinstance(array, np.ndarray):
        return array
    number, dtype = array.astype(np.float64), jnp.result_type(float)
    limits = jnp.finfo(dtype)
    above = low < number if open_low or low == -np.inf else low <= number
    below = number < high if open_high or high == np.inf else number <= high
    vanishes = open_low and low < number < low + limits.tiny
    if not (above and below) or vanishes:
        left, right = "(" if open_low or low == -np.inf else "[", ")" if open_high or high == np.inf else "]"
        hint = f", which is {low:g} in {dtype}" if vanishes else ""
        came = shown(value) if isinstance(value, int) else array
        raise ValueError(f"`{name}` must be in {left}{low:g}, {high:g}{right}; got {came}{hint}.")
    return np.asarray(np.clip(number, limits.min, limits.max))


def check_temperature(name: str, temperature: object) -> HeldArray:
    """Checks what divides the logits. Its square has no digits in float32 beyond some 1e±19."""
    return check_scalar(name, temperature, low=_COLDEST, high=_HOTTEST)


def check_temperatures(name: str, temperature: object, rows: tuple[int, ...]) -> HeldArray:
    """Checks what divides the logits of every row: a number for all rows, or an array with one for each."""
    if not getattr(temperature, "shape", ()):
        return check_temperature(name, temperature)
    temperature = check_floating(name, temperature)
    if temperature.shape != rows:
        raise ValueError(
            f"`{name}` must be a scalar, or have the shape of the losses, {rows}; got {temperature.shape}. Nothing is "
            f"broadcast.{squeeze_hint(name, temperature.shape, rows)}"
        )
    return temperature


def row_temperatures(logits: object) -> HeldArray | None:
    """The temperatures of lazy logits whose rows each have their own."""
    if not isinstance(logits, LinearLogits) or logits.temperature is None or jnp.ndim(logits.temperature) == 0:
        return None
    return logits.temperature


def check_temperature_values(name: str, logits: object, counts: np.ndarray | None) -> None:
    """NumPy temperatures are there to be read, of rows of which it is known that they count; None where it is not."""
    temperatures = row_temperatures(logits)
    if counts is None or not isinstance(temperatures, np.ndarray):
        return
    wrong = ~((temperatures >= _COLDEST) & (temperatures <= _HOTTEST)) & counts
    if wrong.any():
        position = _first(wrong)
        raise ValueError(
            f"`{name}` must be in [{_COLDEST:g}, {_HOTTEST:g}]; got {temperatures[position]:g} at position {position}."
        )


def check_mixture(mixture: object) -> HeldArray:
    """Checks the part of one distribution in a mixture of two, of which neither may be alone in it."""
    share = check_scalar("mixture", mixture, low=0, high=1, open_low=True, open_high=True)
    dtype = jnp.result_type(float)
    if isinstance(share, np.ndarray) and share.astype(dtype) == 1:
        raise ValueError(f"`mixture` must be in (0, 1); got {share}, which is 1 in {dtype}.")
    return share


def known_to_count(targets: object, where: HeldArray | None, ignore_index: int | None) -> np.ndarray | None:
    """The mask of the rows that count, or None where a device alone knows it."""
    is_ignored = np.zeros((), bool)
    if ignore_index is not None:
        if not isinstance(targets, np.ndarray):
            return None
        is_ignored = targets == ignore_index
    if where is None:
        return ~is_ignored
    return where & ~is_ignored if isinstance(where, np.ndarray) else None


def check_sparse(targets: SparseTargets, rows: tuple[int, ...], axis: int, name: str) -> SparseTargets:
    """Checks targets that list classes, for logits whose rows have a shape and whose classes are along an axis."""
    classes, masses = as_array("targets.classes", targets.classes), check_floating("targets.masses", targets.masses)
    if not jnp.issubdtype(classes.dtype, jnp.integer):
        raise TypeError(
            f"`targets.classes` must have an integer dtype; got {classes.dtype}. Cast them: "
            "targets.classes.astype(jnp.int32)."
        )
    if classes.shape[:-1] != rows or classes.ndim == 0:
        listed = ", ".join([*map(str, rows), "K"])
        hint = " Add an axis: targets.classes[..., None]." if classes.shape == rows else ""
        if classes.ndim == len(rows) + 1 and axis != len(rows):
            hint = " K is last, whatever the class axis of the logits is."
        raise ValueError(
            f"`targets.classes` must have shape ({listed}), K classes for each row of `{name}`; got "
            f"{classes.shape}.{hint}"
        )
    check_shape("targets.masses", masses, "`targets.classes`", classes.shape)
    return SparseTargets(classes, masses)


def check_sparse_values(targets: SparseTargets, num_classes: int, where: HeldArray | None) -> None:
    """NumPy classes are there to be read: a wrong one that has a mass is an error at once."""
    classes, masses, counts = targets.classes, targets.masses, known_to_count(None, where, None)
    if not isinstance(num_classes, int) or counts is None:  # symbolic, or known when the program runs
        return
    if not (isinstance(classes, np.ndarray) and isinstance(masses, np.ndarray)):
        return
    wrong = ((classes < 0) | (classes >= num_classes)) & (masses != 0) & counts[..., None]
    if wrong.any():
        position = _first(wrong)
        raise ValueError(
            f"`targets.classes` must be class indices in [0, {num_classes}); got {int(classes[position])} at position "
            f"{position}, where the mass is {masses[position]:g}. Padding has a mass of 0."
        )


def _first(wrong: np.ndarray) -> tuple[int, ...]:
    """The position of the first true number."""
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def present(value: HeldArray) -> HeldArray | None:
    """The setting, or None where it is a plain 0 and its term need not be computed."""
    return None if isinstance(value, np.ndarray) and not value else value


def as_array(name: str, value: object) -> HeldArray:
    """A JAX or NumPy array as it is, a NumPy scalar or Python integer as an array; anything else is an error."""
    if isinstance(value, jax.Array):
        return value
    as_jax = getattr(value, "__jax_array__", None)
    if as_jax is not None:  # a Flax variable
        return as_jax()
    if isinstance(value, int | np.generic | np.ndarray):
        return _as_jax_reads_it(name, value)
    if isinstance(value, LinearLogits):
        raise TypeError(
            f"`{name}` must be an array here; got LinearLogits, which are never stored. `cross_entropy`, `focal_loss`, "
            "`poly_loss`, `distillation_loss`, `custom_loss` and `summarize` take them as logits. Elsewhere pass "
            "hidden @ kernel."
        )
    if isinstance(value, SparseTargets):
        raise TypeError(
            f"`{name}` must be an array here; got SparseTargets. `cross_entropy`, `linear_cross_entropy`, "
            "`custom_loss`, `summarize` and `imbalance.expected_cost` take them as targets."
        )
    kind = type(value)
    raise TypeError(
        f"`{name}` must be a jax.Array or a NumPy array; got {kind.__module__}.{kind.__qualname__}. "
        f"Wrap it: jnp.asarray({name})."
    )


def _as_jax_reads_it(name: str, value: int | np.generic | np.ndarray) -> np.ndarray:
    """NumPy's array in the byte order of the machine; an error where JAX has nothing that means the same."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"`{name}` must be an array without a mask of its own, which would be lost. Pass {name}.data, and the rows "
            f"that count as a boolean `where`."
        )
    array = np.asarray(value)
    if array.dtype.kind in "mM" or array.dtype.char == "g":  # times, which NumPy counts among integers; long doubles
        wanted = "np.int64" if array.dtype.kind in "mM" else "np.float64"
        raise TypeError(
            f"`{name}` must have a dtype that JAX has; got {array.dtype}. Cast them: {name}.astype({wanted})."
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _unwrapped(array: HeldArray) -> HeldArray:
    """NumPy integers that JAX would cut to 32 bits as floats instead."""
    is_wide = isinstance(array, np.ndarray) and array.dtype.kind in "iu" and dtype_in_jax(array) != array.dtype
    return array.astype(np.float32) if is_wide else array


def dtype_in_jax(array: np.ndarray) -> np.dtype:
    """What `jit` makes of a NumPy array's dtype: without x64, 32 bits of 64."""
    return np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))


def shown(value: object) -> str:
    """A wrong argument for an error's text, which must stay short."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None and not isinstance(value, np.generic):
        return f"an array of shape {shape} and dtype {dtype}"
    return reprlib.repr(value)


def check_floating(name: str, value: object) -> HeldArray:
    array = as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must have a floating dtype; got {array.dtype}. Cast them: {name}.astype(jnp.float32)."
        )
    return array


def check_numbers(name: str, value: object, *, hint: str = " A mask of rows goes into `where`.") -> HeldArray:
    value = as_array(name, value)
    if not _is_numeric(value.dtype):
        raise TypeError(f"`{name}` must hold real numbers; got {value.dtype}.{hint}")
    return _unwrapped(value)


def _is_numeric(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_integer(name: str, value: SupportsIndex) -> int:
    """Checks a setting that is part of the program."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:  # a traced array is a TypeError too
        raise TypeError(
            f"`{name}` must be a Python int, known when the function is traced; got {shown(value)}."
        ) from None


def check_bool(name: str, value: object) -> bool:
    """Checks a setting that says whether something is part of the program."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, known when the function is traced; got {shown(value)}.")
    return value


def check_power(p: SupportsIndex) -> int:
    """Checks the power of a hinge."""
    p = check_integer("p", p)
    if p not in (1, 2):
        raise ValueError(f"`p` must be 1 or 2; got {shown(p)}.")
    return p


def check_axis(axis: SupportsIndex, name: str, shape: tuple[int, ...]) -> int:
    axis = check_integer("axis", axis)
    if not shape:
        raise ValueError(f"`{name}` must have a class axis; got shape ().")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"`axis` must be in [{-len(shape)}, {len(shape)}) for `{name}` of shape {shape}; got {shown(axis)}."
        )
    return axis % len(shape)


def check_class_counts(counts: object) -> HeldArray:
    """Checks how often the classes occur."""
    counts = check_numbers("counts", counts, hint="")
    if counts.ndim != 1 or not counts.shape[0]:
        raise ValueError(f"`counts` must have shape (C,), one number for each class; got {counts.shape}.")
    if not isinstance(counts, np.ndarray):
        return counts
    is_count = np.isfinite(counts) & (counts >= 0)
    if not is_count.all():
        position = int(np.argmin(is_count))
        raise ValueError(f"`counts` must be finite and ≥ 0; got {counts[position]:g} for class {position}.")
    return counts


def check_log_beta(beta: object) -> HeldArray | np.floating:
    """Checks the β of effective numbers. Its log has the digits of a Python number that float32 near 1 has not."""
    beta = check_scalar("beta", beta, low=0, high=1, open_high=True)
    above_0 = 1e-30  # lost in any other β; of 0 the log would be −inf, and without a derivative
    if isinstance(beta, np.ndarray):
        return np.log(beta + above_0)
    log_beta = jnp.log(beta.astype(accumulator(beta)) + above_0)
    return jnp.where(log_beta < 0, log_beta, jnp.nan)


def check_shape(name: str, value: HeldArray, like: str, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(
            f"`{name}` must have the shape of {like}, {shape}; got {value.shape}. Nothing is broadcast."
            f"{squeeze_hint(name, value.shape, shape)}"
        )


def squeeze_hint(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if shape == (*wanted, 1):
        return f" Drop the last axis: {name}.squeeze(-1)."
    if wanted == (*shape, 1):
        return f" Add an axis: {name}[..., None]."
    return ""


def check_extras(rows: object, rows_shape: tuple[int, ...]) -> object:
    """Checks what a loss of one's own has for every row beside its logits."""

    def check(path: tuple[object, ...], value: object) -> HeldArray:
        name = f"rows{jax.tree_util.keystr(path)}"
        array = as_array(name, value)
        check_shape(name, array, "the losses", rows_shape)
        return array

    return jax.tree.map_with_path(check, rows)


def named_extras(extras: object) -> dict[str, HeldArray]:
    """The arrays that a loss of one's own has for every row, by the names that errors have for them."""
    return {f"rows{jax.tree_util.keystr(path)}": array for path, array in jax.tree.leaves_with_path(extras)}
