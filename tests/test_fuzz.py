"""Losses of random batches, and all their gradients, against `reference.py`: what nobody thought of as a case.

A program takes longer to compile than to run, so that a fixed list of configurations (loss, shape, dtypes, options,
mesh) is compiled once each, and hypothesis draws only what the arrays hold: for every row what kind of logits, where
its target lies and whether it counts. A failure shrinks to the most ordinary rows that show it.
"""

import functools
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lazy import linear, linear_distillation, listed
from marks import needs

import jaxce

# Configurations, of which the first are run every day, and the batches of each.
DAILY, ALL, DAILY_BY_PYTORCH, ALL_BY_PYTORCH = 10, 160, 8, 40
EXAMPLES = {"daily": 25, "thorough": 140}
SEED = 63520  # with which the daily ones have a bit of everything

# The axes of the arrays: r rows, c classes, k listed classes, d features. Settings have none.
AXES = {"logits": "rc", "teacher_logits": "rc", "distributions": "rc", "labels": "r", "weights": "r", "where": "r"}
AXES |= {"hidden": "rd", "kernel": "dc", "bias": "c", "class_weights": "c", "temperatures": "r"}
AXES |= {"classes": "rk", "masses": "rk"}
AXES |= {"teacher_hidden": "rd", "teacher_kernel": "dc", "teacher_bias": "c"}
OPTIONS = ("weights", "where", "class_weights")
BY_KEYWORD = {*OPTIONS, "bias", "teacher_bias", "temperatures"}
LISTED = 3
NARROW = {"logits", "hidden", "kernel", "bias"}
NARROW |= {f"teacher_{name}" for name in NARROW}  # what has the dtype of the logits
SETTINGS = {
    "label_smoothing": (0.1, 0.4, 1.0),
    "z_loss": (1e-4, 0.1),
    "gamma": (2.0, 1.0, 0.5),
    "epsilon": (1.0, -0.5, 3.0),
    "temperature": (1.0, 2.0, 0.5),  # by a power of two the logits are divided exactly
    "mixture": (0.5, 0.25, 0.9),
    "margin": (1.0, 0.25),
    "pos_weight": (1.0, 3.0),
    "alpha": (0.25, 0.5),
}


class Loss(NamedTuple):
    function: Callable[..., Any]
    reference: Callable[..., reference.Losses]
    names: tuple[str, ...]  # of what is always given
    optional: tuple[str, ...]
    unlike: tuple[str, ...] = ()  # kinds of rows whose answer is not promised, or beyond the dtype

    @property
    def is_linear(self):
        return "hidden" in self.names


def _entropy(logits, labels, **options):
    return jaxce.custom_loss(lambda summary: summary.entropy, logits, labels, entropy=True, **options)


CROSS_ENTROPY, FOCAL, POLY = (
    functools.partial(reference.over_classes, formula)
    for formula in (reference.cross_entropy, reference.focal, reference.poly)
)
OF_LISTED = functools.partial(reference.listed, reference.cross_entropy)
HEAD, HEADS = ("hidden", "kernel"), ("hidden", "kernel", "teacher_hidden", "teacher_kernel")
DIVERGENCES = ("forward", "reverse", "jensen_shannon")
SMOOTHED, ELEMENTS = (*OPTIONS, "label_smoothing", "z_loss"), ("weights", "where")
ON_MESH = {
    "labels": Loss(jaxce.cross_entropy, CROSS_ENTROPY, ("logits", "labels"), SMOOTHED),
    "distributions": Loss(jaxce.cross_entropy, CROSS_ENTROPY, ("logits", "distributions"), SMOOTHED),
    "listed": Loss(listed(jaxce.cross_entropy), OF_LISTED, ("logits", "classes", "masses"), SMOOTHED),
    "entropy": Loss(_entropy, reference.entropy, ("logits", "labels"), ELEMENTS),
    "focal": Loss(jaxce.focal_loss, FOCAL, ("logits", "labels", "gamma"), OPTIONS),
    "poly": Loss(jaxce.poly_loss, POLY, ("logits", "labels", "epsilon"), OPTIONS),
    "distillation": Loss(
        jaxce.distillation_loss, reference.distillation, ("logits", "teacher_logits"), (*ELEMENTS, "temperature")
    ),
    "linear": Loss(jaxce.linear_cross_entropy, CROSS_ENTROPY, (*HEAD, "labels"), (*SMOOTHED, "bias")),
    "linear, distributions": Loss(
        linear(jaxce.cross_entropy), CROSS_ENTROPY, (*HEAD, "distributions"), (*SMOOTHED, "bias", "temperatures")
    ),
    "linear, listed": Loss(
        listed(linear(jaxce.cross_entropy)),
        OF_LISTED,
        (*HEAD, "classes", "masses"),
        (*SMOOTHED, "bias", "temperatures"),
    ),
    "linear, entropy": Loss(
        linear(_entropy), reference.entropy, (*HEAD, "labels"), (*ELEMENTS, "bias", "temperatures")
    ),
    "linear focal": Loss(
        linear(jaxce.focal_loss), FOCAL, (*HEAD, "labels", "gamma"), (*OPTIONS, "bias", "temperatures")
    ),
    "linear poly": Loss(linear(jaxce.poly_loss), POLY, (*HEAD, "labels", "epsilon"), (*OPTIONS, "bias")),
    "linear distillation": Loss(
        linear_distillation,
        reference.distillation,
        HEADS,
        (*ELEMENTS, "bias", "teacher_bias", "temperature"),
        ("huge",),
    ),
}
WHOLE = {
    "nll": Loss(jaxce.nll_loss, reference.nll, ("logits", "labels"), OPTIONS),
    "margin": Loss(jaxce.multi_margin_loss, reference.multi_margin, ("logits", "labels", "margin"), OPTIONS, ("huge",)),
    "cost": Loss(jaxce.imbalance.expected_cost, reference.expected_cost, ("logits", "labels", "costs"), ELEMENTS),
    "cost, distributions": Loss(
        jaxce.imbalance.expected_cost, reference.expected_cost, ("logits", "distributions", "costs"), ELEMENTS
    ),
}
BY_ELEMENT = {
    "binary": Loss(
        jaxce.binary_cross_entropy,
        reference.binary,
        ("logits", "targets"),
        (*ELEMENTS, "pos_weight", "label_smoothing"),
    ),
    "binary focal": Loss(
        jaxce.binary_focal_loss,
        reference.binary_focal,
        ("logits", "targets", "gamma"),
        (*ELEMENTS, "alpha"),
        ("minus inf", "poisoned", "huge"),
    ),
    "mse": Loss(jaxce.mse_loss, reference.mse, ("logits", "targets"), ELEMENTS, ("huge",)),
    "l1": Loss(jaxce.l1_loss, reference.l1, ("logits", "targets"), ELEMENTS),
}
LOSSES = ON_MESH | WHOLE | BY_ELEMENT


class Config(NamedTuple):
    number: int
    loss: str
    names: list[str]
    rows: tuple[int, ...]
    num_classes: int
    dtype: str
    label_dtype: str
    static: dict[str, Any]
    way: str

    def __str__(self):
        return f"{self.number}, {self.loss}, {self.way}"

    @property
    def num_rows(self):
        return math.prod(self.rows)

    @property
    def real_classes(self):
        return self.static.get("num_classes", self.num_classes)

    @property
    def wide(self):
        return "float64" if self.dtype == "float64" else "float32"

    def dtype_of(self, name):
        if name in ("labels", "classes", "where"):
            return "bool" if name == "where" else self.label_dtype
        return self.dtype if name in NARROW else self.wide

    @property
    def follower(self):
        """Which of two models must think possible what the other does, or the divergence is infinite."""
        return {"forward": "", "reverse": "teacher_"}.get(self.static.get("divergence", ""))

    @property
    def leader(self):
        return {"": "teacher_", "teacher_": ""}.get(self.follower)

    def axes(self, name):
        return "r" if self.loss in BY_ELEMENT and name in ("logits", "targets") else AXES.get(name, "")


def _draw_config(number):
    draw = random.Random(SEED + number)
    name = list(LOSSES)[number % len(LOSSES)]
    loss = LOSSES[name]
    way = draw.choice(["whole", "whole", "shard_map", "types"]) if name in ON_MESH else "whole"
    rows = draw.choice([(4,), (2, 3)] if way != "whole" else [(), (1,), (3,), (4,), (5,), (2, 2), (2, 1, 2)])
    num_classes = draw.choice([8, 16] if way != "whole" else [1, 2, 3, 7, 16])
    names = [*loss.names, *(option for option in loss.optional if draw.random() < 0.5)]
    dtype = draw.choice(["float32", "float32", "float32", "bfloat16", "float16", "float64"])
    label_dtype = draw.choice(["int32", "int32", "int8", "uint8", "int16", "uint32"])
    static: dict[str, Any] = {"reduction": draw.choice(["none", "sum", "mean", "mean"])}
    if name in ON_MESH and num_classes > 3 and draw.random() < 0.3:
        static["num_classes"] = num_classes - 3
    if "labels" in names and name not in ("margin", "cost") and draw.random() < 0.5:
        limits = np.iinfo(label_dtype)
        sentinels = [-100, -1, 0, num_classes - 1, num_classes, 255]
        static["ignore_index"] = draw.choice([i for i in sentinels if limits.min <= i <= limits.max])
    if name == "margin":
        static["p"] = draw.choice([1, 2])
    if "distillation" in name:
        # Every time one by one, of heads and of arrays another one.
        static["divergence"] = DIVERGENCES[(number // len(LOSSES) + 2 * loss.is_linear) % 3]
        names += ["mixture"] * (static["divergence"] == "jensen_shannon")
    if loss.is_linear:
        static["recompute"] = draw.choice([True, False])
        static["block_bytes"] = 4 * draw.choice([1, num_classes, 3 * num_classes, 3 * math.prod(rows), 10**6])
    elif name not in BY_ELEMENT:
        static["axis"] = draw.randrange(-len(rows) - 1, len(rows) + 1)
    return Config(number, name, names, rows, num_classes, dtype, label_dtype, static, way)


# What the arrays hold


def _ordinary(draw, size, top):
    return draw.normal(size=size) * draw.uniform(1, 3)


def _ahead(draw, size, top, least=0, most=70):
    return _ordinary(draw, size, top) + draw.uniform(least, most) * (np.arange(size) == draw.integers(size))


def _poisoned(draw, size, top):
    row = _ordinary(draw, size, top)
    row[draw.integers(size)] = draw.choice([np.nan, np.inf])
    return np.full(size, -np.inf) if draw.random() < 0.3 else row


ROWS = {
    "ordinary": _ordinary,
    "ties": lambda draw, size, top: draw.integers(-1, 2, size) * draw.choice([0.0, 1.0, 50.0]),
    "ahead": _ahead,
    "offset": lambda draw, size, top: _ordinary(draw, size, top) + draw.choice([1e4, -1e4]),
    "far": functools.partial(_ahead, least=-1e4, most=1e4),
    "minus inf": lambda draw, size, top: np.where(draw.random(size) < 0.4, -np.inf, _ordinary(draw, size, top)),
    "denormal": lambda draw, size, top: draw.normal(size=size) * 1e-40,
    "huge": lambda draw, size, top: draw.choice([top, -top]) * (1 - draw.integers(0, 2, size) / 128),
    "poisoned": _poisoned,
}
# The same of a head, as an offset and a factor of small integers: powers of two, so that the products are exact.
SCALES = {"ordinary": (0, 0.25), "ties": (0, 0), "ahead": (0, 4), "offset": (8192, 0.5), "far": (0, 512)}
SCALES |= {"minus inf": (0, 0.5), "denormal": (0, 2.0**-130), "huge": (0, 2.0**100), "poisoned": (0, np.nan)}
FEATURES = {"": 3, "teacher_": 2}  # besides the one of the offset


def _batches(config):
    """A strategy for the kind, the target's place and the state of every row, and a seed for their numbers."""
    row, count = st.tuples(*map(st.sampled_from, _choices(config))), config.num_rows
    rows = st.one_of(row.map(lambda row: [row] * count), st.lists(row, min_size=count, max_size=count))
    return st.tuples(rows, st.integers(0, 2**32 - 1))


def _choices(config):
    """The kinds, places and states that rows may have."""
    given, limits = {*config.names}, np.iinfo(config.label_dtype)
    unlike = {*LOSSES[config.loss].unlike} | ({"huge"} if given & {"z_loss", "temperature"} else set())
    states = ["counts"] * 4 + ["masked"] * ("where" in given) + ["weight 0"] * ("weights" in given)
    if limits.min <= config.static.get("ignore_index", np.inf) <= limits.max:
        states += ["ignored"]
    # What a wrong label's class weight is in the divisor and in the z-loss is not promised: the loss is NaN.
    shares = "class_weights" in given and (config.static["reduction"] == "mean" or "z_loss" in given)
    if ("labels" in given and not shares) or ("classes" in given and "class_weights" not in given):
        states += ["wrong label"]
    return [kind for kind in ROWS if kind not in unlike], ["any", "largest", "smallest"], states


def _draw_arrays(config, rows, seed):
    """The arrays by name as they are stored, rows along one axis; the logits of heads; and the cotangent."""
    draw = np.random.default_rng(seed)
    kinds, places, states = (np.array(column) for column in zip(*rows, strict=True))
    given, count, real = {*config.names}, config.num_rows, config.real_classes
    size = 1 if config.loss in BY_ELEMENT else config.num_classes
    arrays, of_heads = {}, {}
    for prefix in FEATURES:
        if f"{prefix}hidden" in given:
            head, of_heads[f"{prefix}logits"] = _draw_head(config, prefix, kinds, draw)
            arrays |= head
        elif f"{prefix}logits" in given:
            # What is not measured from a maximum adds up.
            top = min(1e38 if config.loss in ON_MESH else 1e35, float(jnp.finfo(config.dtype).max) / 4)
            arrays[f"{prefix}logits"] = np.stack([ROWS[kind](draw, size, top) for kind in kinds])
    if "temperatures" in given:
        arrays["temperatures"] = draw.choice([0.5, 1.0, 2.0], count)
        of_heads["logits"] = of_heads["logits"] / arrays["temperatures"][:, None]
        if config.rows:  # of one row without an axis it is a setting, which is read
            arrays["temperatures"] = np.where(states == "masked", np.nan, arrays["temperatures"])
    if "teacher_logits" in arrays and config.follower is not None:
        logits, others = (arrays[f"{prefix}logits"] for prefix in (config.follower, config.leader))
        arrays[f"{config.follower}logits"] = np.where(~np.isneginf(others) & np.isneginf(logits), 0.0, logits)
    z = (arrays | of_heads)["logits"][:, :real]
    chosen = np.select([places == "largest", places == "smallest"], [z.argmax(-1), z.argmin(-1)], draw.integers(real))
    wrong = real if config.label_dtype.startswith("u") else draw.choice([-1, real], count)
    arrays["labels"] = np.select(
        [(states == "wrong label") | (states == "masked"), states == "ignored"],
        [wrong, config.static.get("ignore_index", 0)],
        chosen,
    )
    some = np.where(np.isneginf(z) | (draw.random(z.shape) < 0.2), 0.0, draw.uniform(0.1, 1, z.shape))
    one = (np.arange(z.shape[1]) == chosen[:, None]) * draw.choice([1.0, 0.7], (count, 1))
    mass = np.where(places[:, None] == "any", some, one)
    arrays["distributions"] = np.pad(mass, ((0, 0), (0, size - z.shape[1])))
    if "classes" in given:
        arrays["classes"], arrays["masses"] = _draw_listed(draw, z, chosen, wrong, places, states)
    some = draw.choice([0.0, 1.0, 0.9, 1e-3], count)
    arrays["targets"] = np.select([places == "largest", places == "smallest"], [1.0, 0.0], some)
    zero = [] if config.static["reduction"] == "mean" else [0.0]  # a divisor of 0 is that of nothing
    arrays["costs"] = draw.choice([0.0, -0.5, 1.0, 30.0], (size, size))
    arrays["class_weights"] = draw.choice([*zero, 0.3, 1.0, 2.0], size)
    weights = np.where(states == "weight 0", 0.0, draw.uniform(0.3, 2, count))
    arrays |= {"weights": np.where(states == "masked", np.nan, weights), "where": states != "masked"}
    arrays |= {name: np.array(draw.choice(values)) for name, values in SETTINGS.items()}
    if config.loss in BY_ELEMENT:
        arrays["logits"] = arrays["logits"][:, 0]
    arrays = {name: arrays[name].astype(jnp.dtype(config.dtype_of(name))) for name in config.names}
    shape = (count,) if config.static["reduction"] == "none" else ()
    cotangent = draw.choice([-1, 1], shape) * draw.uniform(0.3, 2, shape)
    return arrays, of_heads, np.asarray(cotangent, config.wide)


def _draw_listed(draw, z, chosen, wrong, places, states):
    """Listed classes and their masses: at random, or the chosen one beside what has no mass, some of it padding."""
    count, real = z.shape
    classes = draw.integers(0, real, (count, LISTED))
    left_out = np.isneginf(np.take_along_axis(z, classes, -1))
    masses = np.where(left_out | (draw.random(classes.shape) < 0.2), 0.0, draw.uniform(0.1, 1, classes.shape))
    is_one = places != "any"
    first = np.arange(LISTED) == draw.integers(0, LISTED, (count, 1))
    classes = np.where(is_one[:, None] & first, chosen[:, None], classes)
    masses = np.where(is_one[:, None], first * draw.choice([1.0, 0.7], (count, 1)), masses)
    classes = np.where((masses == 0) & (draw.random(classes.shape) < 0.5), real, classes)
    is_wrong = first & ((states == "wrong label") | (states == "masked"))[:, None]
    classes = np.where(is_wrong, np.broadcast_to(wrong, count)[:, None], classes)
    return classes, np.where(is_wrong, 0.5, masses)


def _draw_head(config, prefix, kinds, draw):
    """The arrays of a head, and its logits: exact products, and a bias that is rounded as the sum is."""
    size, shape = config.num_classes, (len(kinds), FEATURES[prefix])
    offsets, scales = np.array([SCALES[kind] for kind in kinds]).T[..., None]
    if config.dtype == "float16":
        offsets, scales = np.minimum(offsets, 128), np.where(scales == 0, 0, np.clip(scales, 2.0**-18, 64))
    hidden = np.hstack([offsets * draw.choice([-1, 1]), scales * draw.integers(-3, 4, shape)])
    kernel = np.vstack([np.ones((1, size)), draw.integers(-3, 4, (shape[1], size))])
    head, logits = {f"{prefix}hidden": hidden, f"{prefix}kernel": kernel}, (hidden @ kernel).astype(config.wide)
    if f"{prefix}bias" in config.names:
        is_left_out = (np.arange(size) % 3 == 1) & (prefix != config.follower)
        is_left_out &= draw.random() < 0.3
        bias = np.where(is_left_out, -np.inf, draw.normal(size=size)).astype(jnp.dtype(config.dtype))
        head[f"{prefix}bias"], logits = bias, logits + bias.astype(config.wide)
    return head, logits.astype(float)


# The two sides


def _shaped(config, name, array):
    """An array in the shape that the loss takes; padding is what is not read, or of a head finite."""
    axes = config.axes(name)
    if axes.endswith("c"):
        array = array.copy()
        array[..., config.real_classes :] = 1 if axes in ("c", "dc") else np.nan
    array = array.reshape(config.rows + array.shape[1:]) if axes.startswith("r") else array
    return np.moveaxis(array, -1, config.static["axis"]) if axes == "rc" and "axis" in config.static else array


def _flat(config, name, gradient):
    """The way back."""
    axes = config.axes(name)
    gradient = np.asarray(gradient)
    gradient = np.moveaxis(gradient, config.static.get("axis", -1), -1) if axes == "rc" else gradient
    return gradient.reshape(config.num_rows, *gradient.shape[len(config.rows) :]) if axes.startswith("r") else gradient


def _evaluate(config, arrays, cotangent, **mesh):
    """The loss, and its gradients by all floating arrays."""
    moving = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}

    def value(moving):
        given = arrays | moving
        positional = [given.pop(name) for name in config.names if name not in BY_KEYWORD | {*SETTINGS}]
        return LOSSES[config.loss].function(*positional, **given, **config.static, **mesh)

    loss, pullback = jax.vjp(value, moving)
    return loss, pullback(cotangent)[0]


def _program(config):
    evaluate = functools.partial(_evaluate, config)
    if config.way == "whole":
        return jax.jit(evaluate)
    kind = AxisType.Explicit if config.way == "types" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    specs = {name: _spec(config, name) for name in config.names}, _spec(config, "loss")
    if config.way == "types":
        shardings, program = jax.tree.map(functools.partial(NamedSharding, mesh), specs), jax.jit(evaluate)
        return lambda *arguments: program(*jax.device_put(arguments, shardings))
    moving = {name: spec for name, spec in specs[0].items() if "float" in config.dtype_of(name)}
    evaluate = functools.partial(evaluate, class_axis_name="model", batch_axis_name="data")
    return jax.jit(jax.shard_map(evaluate, mesh=mesh, in_specs=specs, out_specs=(specs[1], moving)))


def _spec(config, name):
    split = {"r": ["data"] + [None] * (len(config.rows) - 1), "c": ["model"], "d": [None], "k": [None]}
    axes = "r" * (config.static["reduction"] == "none") if name == "loss" else config.axes(name)
    spec = [mesh_axis for axis in axes for mesh_axis in split[axis]]
    if axes == "rc":
        spec.insert(config.static.get("axis", -1) % len(spec), spec.pop())
    return P(*spec)


def _expect(config, stored, of_heads, cotangent):
    """The loss and the gradients as they must be, of real classes."""
    arrays = {name: array.astype(float) for name, array in stored.items()} | of_heads
    arrays |= {name: stored[name].astype(int) for name in ("labels", "classes") if name in arrays}
    counts = stored.get("where", np.ones(config.num_rows, bool))
    counts = counts & (arrays["labels"] != config.static.get("ignore_index")) if "labels" in arrays else counts
    for name, array in arrays.items():
        array = array[..., : config.real_classes] if config.axes(name).endswith("c") else array
        if config.axes(name).startswith("r"):  # what does not count is not read
            array = np.where(counts.reshape(-1, *[1] * (array.ndim - 1)), array, 0)
        arrays[name] = array
    heads = {name: arrays.pop(name) for name in config.names if name in {*HEADS, "bias", "teacher_bias"}}
    weights, _, z = arrays.pop("weights", None), arrays.pop("where", None), arrays.pop("logits")
    temperatures = arrays.pop("temperatures", None)
    if temperatures is not None:
        temperatures = np.where(counts, temperatures, 1.0)
    static = {name: config.static[name] for name in ("p", "divergence") if name in config.static}
    losses = LOSSES[config.loss].reference(z, **arrays, **static)
    value, gradients = reference.reduce(losses, weights, counts, config.static["reduction"], cotangent.astype(float))
    if gradients and temperatures is not None:
        d_logits = gradients["logits"]
        gradients["logits"], gradients["temperatures"] = reference.by_temperatures(d_logits, z, temperatures)
    for prefix in FEATURES:
        if gradients and f"{prefix}hidden" in heads:
            by_head = reference.through_head(
                gradients.pop(f"{prefix}logits"),
                heads[f"{prefix}hidden"],
                heads[f"{prefix}kernel"],
                ROUNDING[config.dtype],
                0.0 if config.way == "whole" else 3 * ROUNDING[config.dtype],  # that of a part, and of two sums
                UNDERFLOW[config.dtype],
            )
            gradients |= {f"{prefix}{name}": by for name, by in zip(("hidden", "kernel", "bias"), by_head, strict=True)}
    return value, {name: gradient for name, gradient in gradients.items() if name in config.names}


ROUNDING = {"float64": 0.0, "float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
UNDERFLOW = {"float64": 1e-300, "float32": 1e-35, "bfloat16": 1e-35, "float16": 2.0**-24}  # times factors


def _assert_near(actual, expected, dtype, place):
    assert actual.dtype == jnp.dtype(dtype), place
    value = np.asarray(expected.value)
    actual = actual.astype(float)
    if value.ndim:
        actual, padding = np.split(actual, value.shape[-1:], -1)
        assert not padding[~np.isnan(value).any(-1)].any(), f"{place}: padding"
    assert actual.shape == value.shape, place
    with np.errstate(all="ignore"):
        error = expected.error * (2.0**-24 if dtype == "float64" else 1.0)  # the reference is float64 itself
        error = error + np.where(np.isfinite(value), ROUNDING[dtype] * abs(value), 0.0) + UNDERFLOW[dtype]
        is_right = (abs(actual - value) <= error) | (actual == value) | (np.isnan(value) & np.isnan(actual))
        is_beyond = abs(value) + error > float(jnp.finfo(dtype).max)
        is_right |= is_beyond & (actual == np.sign(value) * np.inf) | np.isposinf(error) & np.isfinite(value)
    is_somewhere = np.broadcast_to(np.isneginf(error), value.shape)
    assert not is_somewhere.any() or np.isnan(actual[is_somewhere]).any(), f"{place}: a wrong label must be loud"
    wrong = ~(is_right | is_somewhere)
    assert not wrong.any(), f"{place} at {np.argwhere(wrong).tolist()}: {actual[wrong]} must be {value[wrong]}"


def _check(config, program, rows, seed):
    stored, of_heads, cotangent = _draw_arrays(config, rows, seed)
    arrays = {name: jnp.asarray(_shaped(config, name, array)) for name, array in stored.items()}
    shape = config.rows if cotangent.ndim else ()
    loss, gradients = program(arrays, jnp.asarray(cotangent.reshape(shape)))
    with np.errstate(all="ignore"):
        value, expected = _expect(config, stored, of_heads, cotangent)
    assert loss.shape == shape
    _assert_near(np.asarray(loss).reshape(cotangent.shape), value, config.wide, f"{config}")
    assert not expected or expected.keys() == gradients.keys()
    for name, gradient in expected.items():
        actual, dtype = _flat(config, name, gradients[name]), config.dtype_of(name)
        _assert_near(actual, gradient, dtype, f"{config}: gradient by {name}")


def _fuzz(number, check, batches, request, record_property):
    """Runs the check on batches that hypothesis draws, and records how many there were."""
    count = 0
    length = "thorough" if request.config.getoption("--thorough") else "daily"
    phases = set(hypothesis.Phase) - {hypothesis.Phase.explain}
    how = {"deadline": None, "derandomize": True, "database": None, "phases": phases}

    @hypothesis.settings(max_examples=EXAMPLES[length], **how)
    @hypothesis.seed(number)
    @hypothesis.given(batch=batches)
    def run(batch):
        nonlocal count
        count += 1
        check(*batch)

    run()
    record_property("examples", count)


def _numbers(daily, count):
    return [pytest.param(number, marks=[pytest.mark.thorough] * (number >= daily)) for number in range(count)]


@pytest.mark.parametrize("number", _numbers(DAILY, ALL))
def test_random_batches(number, request, record_property):
    config = _draw_config(number)
    with jax.enable_x64(config.wide == "float64"):
        check = functools.partial(_check, config, _program(config))
        _fuzz(number, check, _batches(config), request, record_property)


# PyTorch

BY_PYTORCH = ["cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "multi_margin_loss"]


def _draw_call(number):
    """A loss, the shape of its input, the name of its target, whether it has weights, and its options."""
    draw = random.Random(number)
    loss = BY_PYTORCH[number % len(BY_PYTORCH)]
    is_margin, is_binary = "margin" in loss, "binary" in loss
    shape = draw.choice([(3,), (4, 1), (4, 3), (3, 7)] + [(2, 3, 2), (2, 5, 2, 2)] * (not is_margin))
    target = "probabilities" if is_binary or (loss == "cross_entropy" and draw.random() < 0.5) else "labels"
    options: dict[str, Any] = {"reduction": draw.choice(["none", "mean", "sum"])}
    if target == "labels" and not is_margin:
        options["ignore_index"] = draw.choice([-100, 0, -1])
    if loss == "cross_entropy":
        options["label_smoothing"] = draw.choice([0.0, 0.1, 1.0])
    if is_margin:
        options |= {"p": draw.choice([1, 2]), "margin": draw.choice([1.0, 0.3])}
    return loss, shape, target, draw.random() < 0.6, options


def _draw_for_pytorch(call, spread, offset, ignored, seed):
    loss, shape, target, has_weight, options = call
    draw = np.random.default_rng(seed)
    axis = min(1, len(shape) - 1)
    rows = shape[:axis] + shape[axis + 1 :]
    is_ignored = (draw.random(rows) < ignored) & ("ignore_index" in options)
    labels = np.where(is_ignored, options.get("ignore_index", 0), draw.integers(0, shape[axis], rows))
    probabilities = draw.choice([0.0, 0.3, 1.0], shape) * draw.uniform(0.5, 1)
    of_elements = "binary" in loss
    arrays = {"input": spread * draw.normal(size=shape) + offset}
    arrays["target"] = labels if target == "labels" else probabilities
    if has_weight:
        arrays["weight"] = draw.uniform(0.1, 2, shape if of_elements else shape[axis])
    of_loss = () if options["reduction"] != "none" else shape if of_elements else rows
    return arrays, draw.uniform(0.3, 2, of_loss)


def _by_pytorch(loss, options, arrays, cotangent):
    """Value and gradients; PyTorch has none by weights."""
    import torch

    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    moving = [tensors[name].requires_grad_() for name in _moving(arrays)]
    value = getattr(torch.nn.functional, loss)(**tensors, **options)
    value.backward(torch.tensor(cotangent))
    return value.detach().numpy(), [tensor.grad.numpy() for tensor in moving]


def _moving(arrays):
    return [name for name in ("input", "target") if arrays[name].dtype == float]


@pytest.mark.parametrize("number", _numbers(DAILY_BY_PYTORCH, ALL_BY_PYTORCH))
def test_random_batches_by_pytorch(number, request, record_property, x64):
    needs("torch")
    call = _draw_call(number)
    loss, *_, options = call

    @jax.jit
    def by_jaxce(arrays, cotangent):
        def value(moving):
            return getattr(jaxce.torch, loss)(**(arrays | moving), **options)

        result, pullback = jax.vjp(value, {name: arrays[name] for name in _moving(arrays)})
        return result, list(pullback(cotangent)[0].values())

    def check(spread, offset, ignored, seed):
        arrays, cotangent = _draw_for_pytorch(call, spread, offset, ignored, seed)
        results = by_jaxce({name: jnp.asarray(array) for name, array in arrays.items()}, jnp.asarray(cotangent))
        absolute = 1e-14 * (1 + spread + abs(offset)) * arrays["input"].size  # PyTorch subtracts
        compare = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=absolute)
        jax.tree.map(compare, results, _by_pytorch(loss, options, arrays, cotangent))

    numbers = [st.sampled_from(values) for values in ([1.0, 3.0, 40.0, 0.0], [0.0, 1e4, -1e4], [0.0, 0.3, 1.0])]
    _fuzz(number, check, st.tuples(*numbers, st.integers(0, 2**32 - 1)), request, record_property)
