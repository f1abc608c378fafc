"""Rows and classes that are split over a mesh give the loss and the gradients of one device, by every way to say so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce

N, D, E, V = 8, 4, 2, 16
REAL = 13  # of the 16 classes; the last of 8 devices has padding alone
RNG = np.random.default_rng(5)
ARRAYS = {
    "logits": 2 * RNG.normal(size=(N, V)),
    "teacher_logits": 2 * RNG.normal(size=(N, V)),
    "hidden": RNG.normal(size=(N, D)),
    "kernel": RNG.normal(size=(D, V)),
    "bias": RNG.normal(size=V),
    "softcap": np.array(3.0),
    "teacher_hidden": RNG.normal(size=(N, E)),
    "teacher_kernel": RNG.normal(size=(E, V)),
    "labels": RNG.integers(0, REAL, N),
    "distributions": RNG.uniform(0.1, 1, (N, V)),
    "weights": RNG.uniform(0.5, 2, N),
    "class_weights": RNG.uniform(0.5, 2, V),
    "where": np.arange(N) % 4 != 2,
    "label_smoothing": np.array(0.1),
    "z_loss": np.array(0.05),
    "gamma": np.array(1.5),
    "epsilon": np.array(0.7),
    "temperature": np.array(1.5),
}
ROWS, CLASSES = {"weights": 0, "class_weights": 1, "where": 0}, {"bias", "class_weights"}
OPTIONS = ["weights", "class_weights", "where"]
HEAD = ["hidden", "kernel", "bias", "softcap"]


def _linear(loss, recompute, *names):
    call = functools.partial(loss, recompute=recompute, block_bytes=4 * N * 3)
    return call, [*HEAD[:2], *names, *HEAD[2:], "weights", "where"]


# The loss, and the names of its arrays; the first two or three and targets are positional.
CASES = {
    "labels": (jaxce.cross_entropy, ["logits", "labels", *OPTIONS, "label_smoothing", "z_loss"]),
    "distributions": (jaxce.cross_entropy, ["logits", "distributions", *OPTIONS, "label_smoothing", "z_loss"]),
    "focal": (jaxce.focal_loss, ["logits", "labels", *OPTIONS, "gamma"]),
    "poly": (jaxce.poly_loss, ["logits", "labels", *OPTIONS, "epsilon"]),
    "distillation": (jaxce.distillation_loss, ["logits", "teacher_logits", "weights", "where", "temperature"]),
}
for _recompute, _name in ((True, "recomputed"), (False, "forward gradients")):
    for _targets in ("labels", "distributions"):
        _call, _names = _linear(jaxce.linear_cross_entropy, _recompute, _targets)
        CASES[f"linear, {_targets}, {_name}"] = _call, [*_names, "class_weights", "label_smoothing", "z_loss"]
    _call, _names = _linear(jaxce.linear_distillation_loss, _recompute, "teacher_hidden", "teacher_kernel")
    CASES[f"linear distillation, {_name}"] = _call, [*_names, "temperature"]
# Their classes are split by the types of an Explicit mesh alone.
BY_TYPES = {
    "nll": (jaxce.nll_loss, ["logits", "labels", *OPTIONS]),
    "margin": (jaxce.multi_margin_loss, ["logits", "labels", *OPTIONS]),
}
POSITIONAL = {
    "logits",
    "teacher_logits",
    "hidden",
    "kernel",
    "labels",
    "distributions",
    "teacher_hidden",
    "teacher_kernel",
}
MAIN = ["labels", "linear, distributions, recomputed", "linear, labels, forward gradients"]


def _spec(name, rows, classes):
    axes = {N: rows, V: classes}
    return P(*(axes.get(length) for length in ARRAYS[name].shape))


def _is_moving(name):
    return ARRAYS[name].dtype == float


def _value_and_gradients(case, **mesh_options):
    """A function of the arrays of a case, all losses' gradients by all floating ones."""
    loss, names = (CASES | BY_TYPES)[case]
    moving = tuple(i for i, name in enumerate(names) if _is_moving(name))

    def value(*arrays):
        count = sum(name in POSITIONAL for name in names)
        options = dict(zip(names[count:], arrays[count:], strict=True))
        return loss(*arrays[:count], **options, **mesh_options)

    return jax.value_and_grad(value, moving)


def _arrays(case, dtype=None):
    arrays = [ARRAYS[name] for name in (CASES | BY_TYPES)[case][1]]
    return [jnp.asarray(array, dtype if array.dtype == float else None) for array in arrays]


@functools.cache
def _expected(case, num_classes):
    options = {} if num_classes is None else {"num_classes": num_classes}
    return jax.jit(_value_and_gradients(case, **options))(*_arrays(case))


def _by_shard_map(case, mesh, rows, classes, num_classes, arrays):
    function = _value_and_gradients(case, class_axis_name=classes, batch_axis_name=rows, num_classes=num_classes)
    names = CASES[case][1]
    specs = [_spec(name, rows, classes) for name in names]
    out_specs = P(), tuple(spec for name, spec in zip(names, specs, strict=True) if _is_moving(name))
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs))(*arrays)


def _placed(case, mesh, rows, classes, arrays):
    shardings = [NamedSharding(mesh, _spec(name, rows, classes)) for name in (CASES | BY_TYPES)[case][1]]
    return [jax.device_put(array, sharding) for array, sharding in zip(arrays, shardings, strict=True)]


def _by_names(case, mesh, rows, classes, num_classes, arrays):
    """On an Auto mesh, by plain `jit` of whole arrays."""
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    function = _value_and_gradients(case, class_axis_name=classes, batch_axis_name=rows, num_classes=num_classes)
    with jax.set_mesh(mesh):
        return jax.jit(function)(*_placed(case, mesh, rows, classes, arrays))


def _by_types(case, mesh, rows, classes, num_classes, arrays):
    """On an Explicit mesh, by plain `jit` of whole arrays, without a word."""
    options = {} if num_classes is None else {"num_classes": num_classes}
    placed = _placed(case, mesh, rows, classes, arrays)
    return jax.jit(_value_and_gradients(case, **options))(*placed)


WAYS = {"shard_map": _by_shard_map, "names": _by_names, "types": _by_types}
MESHES = {
    "8 of rows": ((8,), ("data",), "data", None),
    "8 of classes": ((8,), ("model",), None, "model"),
    "2 x 4": ((2, 4), ("data", "model"), "data", "model"),
    "4 x 2": ((4, 2), ("data", "model"), "data", "model"),
    "8 of rows by 2 axes": ((2, 4), ("data", "model"), ("data", "model"), None),
    "8 of classes by 2 axes": ((2, 4), ("data", "model"), None, ("data", "model")),
}
ALWAYS = {(way, "2 x 4", case) for way in ("shard_map", "types") for case in CASES}
ALWAYS |= {(way, mesh, MAIN[i % 3]) for way in WAYS for i, mesh in enumerate(MESHES)}


def _combinations():
    for way in WAYS:
        for mesh in MESHES:
            for case in CASES:
                is_kept = (way, mesh, case) in ALWAYS
                yield pytest.param(way, mesh, case, marks=[] if is_kept else pytest.mark.thorough)
    for case in BY_TYPES:
        yield pytest.param("types", "2 x 4", case)


@pytest.mark.parametrize(("way", "mesh", "case"), list(_combinations()))
def test_split_losses_equal_whole_ones(way, mesh, case, x64):
    shape, names, rows, classes = MESHES[mesh]
    num_classes = REAL if classes is not None and case in CASES else None
    result = WAYS[way](case, jax.make_mesh(shape, names), rows, classes, num_classes, _arrays(case))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), result, _expected(case, num_classes)
    )


@pytest.mark.parametrize("case", [*MAIN, pytest.param("distillation", marks=pytest.mark.thorough)])
def test_split_losses_in_float32(case):
    arrays = _arrays(case, jnp.float32)
    expected = jax.jit(_value_and_gradients(case, num_classes=REAL))(*arrays)
    result = _by_shard_map(case, jax.make_mesh((2, 4), ("data", "model")), "data", "model", REAL, arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), result, expected)
