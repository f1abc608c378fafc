"""Rows and classes that are split over a mesh give the loss and the gradients of one device, by every way to say so."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lazy import linear, linear_distillation, listed
from marks import daily
from modes import all_modes, plain_modes

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
    "temperatures": RNG.uniform(0.5, 2, N),
    "teacher_hidden": RNG.normal(size=(N, E)),
    "teacher_kernel": RNG.normal(size=(E, V)),
    "labels": RNG.integers(0, REAL, N),
    "distributions": RNG.uniform(0.1, 1, (N, V)),
    "listed": RNG.integers(0, REAL, (N, 3)),
    "masses": RNG.uniform(0.1, 1, (N, 3)),
    "costs": np.linspace(-1, 3, V * V).reshape(V, V) ** 2,
    "weights": RNG.uniform(0.5, 2, N),
    "class_weights": RNG.uniform(0.5, 2, V),
    "where": np.arange(N) % 4 != 2,
    "element_weights": RNG.uniform(0.5, 2, (N, V)),
    "elements": RNG.uniform(size=(N, V)) < 0.7,
    "label_smoothing": np.array(0.1),
    "z_loss": np.array(0.05),
    "gamma": np.array(1.5),
    "epsilon": np.array(0.7),
    "temperature": np.array(1.5),
    "mixture": np.array(0.3),
}
ROWS, CLASSES = {"weights": 0, "class_weights": 1, "where": 0}, {"bias", "class_weights"}
OPTIONS = ["weights", "class_weights", "where"]
LISTED = ["listed", "masses"]
HEAD = ["hidden", "kernel", "bias", "softcap", "temperatures"]


def _linear(loss, recompute, *names):
    call = functools.partial(loss, recompute=recompute, block_bytes=4 * N * 3)
    return call, [*HEAD[:2], *names, *HEAD[2:], "weights", "where"]


def _of_summary(summary):
    return summary.spread + summary.argmax.astype(summary.entropy.dtype) * summary.entropy


# The loss, and the names of its arrays; the first two or three and targets are positional.
CASES = {
    "labels": (jaxce.cross_entropy, ["logits", "labels", *OPTIONS, "label_smoothing", "z_loss"]),
    "distributions": (jaxce.cross_entropy, ["logits", "distributions", *OPTIONS, "label_smoothing", "z_loss"]),
    "listed": (listed(jaxce.cross_entropy), ["logits", *LISTED, *OPTIONS, "label_smoothing", "z_loss"]),
    "focal": (jaxce.focal_loss, ["logits", "labels", *OPTIONS, "gamma"]),
    "poly": (jaxce.poly_loss, ["logits", "labels", *OPTIONS, "epsilon"]),
    "distillation": (jaxce.distillation_loss, ["logits", "teacher_logits", "weights", "where", "temperature"]),
}
_REVERSE, _JENSEN_SHANNON = {"divergence": "reverse"}, {"divergence": "jensen_shannon"}
CASES["reverse"] = functools.partial(jaxce.distillation_loss, **_REVERSE), CASES["distillation"][1]
CASES["jensen_shannon"] = (
    functools.partial(jaxce.distillation_loss, **_JENSEN_SHANNON),
    [*CASES["distillation"][1], "mixture"],
)
for _recompute, _name in ((True, "recomputed"), (False, "forward gradients")):
    for _targets in ("labels", "distributions"):
        _call, _names = _linear(linear(jaxce.cross_entropy), _recompute, _targets)
        CASES[f"linear, {_targets}, {_name}"] = _call, [*_names, "class_weights", "label_smoothing", "z_loss"]
    _call, _names = _linear(listed(linear(jaxce.cross_entropy)), _recompute, *LISTED)
    CASES[f"linear, listed, {_name}"] = _call, [*_names, "class_weights", "label_smoothing", "z_loss"]
    _call, _names = _linear(linear_distillation, _recompute, "teacher_hidden", "teacher_kernel")
    CASES[f"linear distillation, {_name}"] = _call, [*_names, "temperature"]
    _call = functools.partial(_call, **_JENSEN_SHANNON)
    CASES[f"linear jensen_shannon, {_name}"] = _call, [*_names, "temperature", "mixture"]
# Their classes are split by the types of an Explicit mesh alone.
BY_TYPES = {
    "nll": (jaxce.nll_loss, ["logits", "labels", *OPTIONS]),
    "margin": (jaxce.multi_margin_loss, ["logits", "labels", *OPTIONS]),
    "expected cost": (jaxce.imbalance.expected_cost, ["logits", "labels", "costs", "weights", "where"]),
    "expected cost of distributions": (
        jaxce.imbalance.expected_cost,
        ["logits", "distributions", "costs", "weights", "where"],
    ),
}
# No word of theirs is about a mesh.
BY_TYPES |= {
    "binary": (
        lambda z, q, class_weights, element_weights, elements: jaxce.binary_cross_entropy(
            z, q, pos_weight=class_weights, weights=element_weights, where=elements
        ),
        ["logits", "distributions", "class_weights", "element_weights", "elements"],
    ),
    "squared error": (
        lambda z, q, element_weights, elements: jaxce.mse_loss(z, q, weights=element_weights, where=elements),
        ["logits", "distributions", "element_weights", "elements"],
    ),
    "own losses": (
        lambda losses, element_weights, elements: jaxce.reduce_losses(losses, element_weights, where=elements),
        ["logits", "element_weights", "elements"],
    ),
    "summary": (
        lambda z, y, class_weights, where: jaxce.reduce_losses(
            _of_summary(jaxce.summarize(z, y, class_vector=class_weights, entropy=True, argmax=True, where=where)),
            where=where,
        ),
        ["logits", "labels", "class_weights", "where"],
    ),
    "PyTorch's binary": (
        lambda z, q, class_weights, element_weights: jaxce.torch.binary_cross_entropy_with_logits(
            z, q, element_weights, pos_weight=class_weights
        ),
        ["logits", "distributions", "class_weights", "element_weights"],
    ),
    "counts": (
        lambda y, where, class_weights: jnp.sum(
            class_weights * jaxce.imbalance.class_counts(y, V, where=where).astype(class_weights.dtype)
        ),
        ["labels", "where", "class_weights"],
    ),
    "median frequencies": (
        lambda class_weights: jnp.sum(jaxce.imbalance.class_weights(class_weights, scheme="median_frequency") ** 2),
        ["class_weights"],
    ),
}
POSITIONAL = {
    "logits",
    "teacher_logits",
    "hidden",
    "kernel",
    "labels",
    "listed",
    "masses",
    "distributions",
    "costs",
    "teacher_hidden",
    "teacher_kernel",
}
MAIN = ["labels", "linear, distributions, recomputed", "linear, labels, forward gradients"]


def _spec(name, rows, classes):
    axes = {} if name == "costs" else {N: rows, V: classes}
    return P(*(axes.get(length) for length in ARRAYS[name].shape))


def _is_moving(name):
    return ARRAYS[name].dtype == float


def _value_and_gradients(case, **mesh_options):
    """A function of the arrays of a case, all losses' gradients by all floating ones."""
    moving = tuple(i for i, name in enumerate((CASES | BY_TYPES)[case][1]) if _is_moving(name))
    return jax.value_and_grad(lambda *arrays: _value(case, arrays, **mesh_options), moving)


def _value(case, arrays, **mesh_options):
    loss, names = (CASES | BY_TYPES)[case]
    count = sum(name in POSITIONAL for name in names)
    options = dict(zip(names[count:], arrays[count:], strict=True))
    return loss(*arrays[:count], **options, **mesh_options)


def _arrays(case, dtype=None):
    arrays = [ARRAYS[name] for name in (CASES | BY_TYPES)[case][1]]
    return [jnp.asarray(array, dtype if array.dtype == float else None) for array in arrays]


def _by_shard_map(case, mesh, rows, classes, num_classes, arrays):
    function = _value_and_gradients(case, class_axis_name=classes, batch_axis_name=rows, num_classes=num_classes)
    names = CASES[case][1]
    specs = [_spec(name, rows, classes) for name in names]
    out_specs = P(), tuple(spec for name, spec in zip(names, specs, strict=True) if _is_moving(name))
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return unoptimized.jit(jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs))(*arrays)


def _placed(case, mesh, rows, classes, arrays):
    shardings = [NamedSharding(mesh, _spec(name, rows, classes)) for name in (CASES | BY_TYPES)[case][1]]
    return [jax.device_put(array, sharding) for array, sharding in zip(arrays, shardings, strict=True)]


def _by_names(case, mesh, rows, classes, num_classes, arrays):
    """On an Auto mesh, by plain `jit` of whole arrays."""
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    function = _value_and_gradients(case, class_axis_name=classes, batch_axis_name=rows, num_classes=num_classes)
    with jax.set_mesh(mesh):
        return unoptimized.jit(function)(*_placed(case, mesh, rows, classes, arrays))


def _by_types(case, mesh, rows, classes, num_classes, arrays):
    """On an Explicit mesh, by plain `jit` of whole arrays, without a word."""
    options = {} if num_classes is None else {"num_classes": num_classes}
    placed = _placed(case, mesh, rows, classes, arrays)
    return unoptimized.jit(_value_and_gradients(case, **options))(*placed)


WAYS = {"shard_map": _by_shard_map, "names": _by_names, "types": _by_types}
MESHES = {
    "8 of rows": ((8,), ("data",), "data", None),
    "8 of classes": ((8,), ("model",), None, "model"),
    "2 x 4": ((2, 4), ("data", "model"), "data", "model"),
    "4 x 2": ((4, 2), ("data", "model"), "data", "model"),
    "8 of rows by 2 axes": ((2, 4), ("data", "model"), ("data", "model"), None),
    "8 of classes by 2 axes": ((2, 4), ("data", "model"), None, ("data", "model")),
}
IN_SHARD_MAP = [*MAIN, "distributions", "jensen_shannon"]
DAILY = {("shard_map", "2 x 4", case) for case in IN_SHARD_MAP} | {("types", "2 x 4", case) for case in MAIN}
DAILY |= {("names", mesh, MAIN[i]) for i, mesh in enumerate(["8 of rows", "8 of classes"])}
DAILY |= {("types", "2 x 4", case) for case in [*list(BY_TYPES)[:4], "linear, listed, recomputed"]}
DAILY_IN_FLOAT32 = {("shard_map", "2 x 4", MAIN[0])}


def _combinations(daily):
    combinations = [(way, mesh, case) for way in WAYS for mesh in MESHES for case in CASES]
    combinations += [("types", "2 x 4", case) for case in list(BY_TYPES)[:4]]
    for combination in combinations:
        is_daily = combination in daily
        yield pytest.param(*combination, marks=[] if is_daily else pytest.mark.thorough)


def _split_and_whole(way, mesh, case, dtype):
    shape, names, rows, classes = MESHES[mesh]
    num_classes = REAL if classes is not None and case in CASES else None
    result = WAYS[way](case, jax.make_mesh(shape, names), rows, classes, num_classes, _arrays(case, dtype))
    return result, _whole(case, num_classes, dtype)


@functools.cache
def _whole(case, num_classes, dtype):
    options = {} if num_classes is None else {"num_classes": num_classes}
    return unoptimized.jit(_value_and_gradients(case, **options))(*_arrays(case, dtype))


@pytest.mark.parametrize(("way", "mesh", "case"), list(_combinations(DAILY)))
def test_split_losses_equal_whole_ones(way, mesh, case, x64):
    result, expected = _split_and_whole(way, mesh, case, jnp.float64)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), result, expected)


@pytest.mark.parametrize(("way", "mesh", "case"), list(_combinations(DAILY_IN_FLOAT32)))
def test_split_losses_in_float32(way, mesh, case):
    result, expected = _split_and_whole(way, mesh, case, jnp.float32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), result, expected)


def _on_mesh(function, specs, out_specs, shape=(2, 4)):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return unoptimized.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs))


@pytest.mark.parametrize(
    "case",
    daily([*MAIN, "linear distillation, recomputed", "linear jensen_shannon, recomputed"], ["labels"]),
)
def test_every_mode_works_inside_shard_map(case, x64):
    names, arrays = CASES[case][1], _arrays(case)
    moving = [i for i, name in enumerate(names) if _is_moving(name)]
    direction = [jnp.cos(1 + arrays[i]) for i in moving]
    chosen = {"jvp": False, "linearize": False, "fwd over rev": True, "rev over fwd": True, "grad of checkpoint": True}

    def modes(differentiate, arrays, direction, **mesh_options):
        def value(moved):
            replaced = dict(zip(moving, moved, strict=True))
            full = [replaced.get(i, array) for i, array in enumerate(arrays)]
            return _value(case, full, num_classes=REAL, **mesh_options)

        return differentiate(value, chosen)([arrays[i] for i in moving], direction)

    expected = unoptimized.jit(functools.partial(modes, plain_modes))(arrays, direction)
    specs = [_spec(name, "data", "model") for name in names]
    moving_specs = [specs[i] for i in moving]
    split = functools.partial(modes, all_modes, class_axis_name="model", batch_axis_name="data")
    out_specs = {name: moving_specs if is_vector else P() for name, is_vector in chosen.items()}
    result = _on_mesh(split, (specs, moving_specs), out_specs)(arrays, direction)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), result, expected)


ROW_OF = {
    "a label far ahead": [[40.0, 0, 1, 0, 2, 1, 0, 0], [0, 0, 1, 0, 2, 1, 0, 70.0]],
    "ties on all devices": [[0.0] * 8, [3.0] * 8],
    "an offset": [[1e4, 1e4 - 2, 1e4 + 1, 1e4 - 1, 1e4, 1e4 - 3, 1e4, 1e4], [-1e4] * 8],
    "devices without a class": [[1.0, 0] + [-np.inf] * 6, [-np.inf] * 6 + [1.0, 2.0]],
    "devices far apart": [[1e4, 0, -1e4, -1e4, 0, 0, 0, 0], [-1e4, 0, -1e4, -1e4, 0, 0, 0, 1e4]],
    "a label without mass": [[-np.inf] + [0.0] * 7, [0.0] * 7 + [-np.inf]],
    "nothing": [[-np.inf] * 8, [0.0] * 8],
    "NaN": [[np.nan] + [0.0] * 7, [0.0] * 7 + [1.0]],
    "inf": [[0.0] * 7 + [np.inf], [0.0] * 7 + [1.0]],
}


@functools.cache
def _hostile():
    def all_of_it(logits, labels, **mesh_options):
        def losses(logits):
            return jaxce.cross_entropy(logits, labels, reduction="none", **mesh_options)

        def entropy(logits):
            summary = jaxce.summarize(logits, labels, entropy=True, argmax=True, **mesh_options)
            return jnp.sum(summary.entropy), (summary.entropy, summary.argmax)

        by_entropy, of_softmax = jax.grad(entropy, has_aux=True)(logits)
        return losses(logits), *of_softmax, jax.grad(lambda logits: jnp.sum(losses(logits)))(logits), by_entropy

    split = functools.partial(all_of_it, class_axis_name="model")
    specs, slices = (P(None, "model"), P()), P(None, "model")
    return unoptimized.jit(all_of_it), _on_mesh(split, specs, (P(), P(), P(), slices, slices), (2, 4))


@pytest.mark.parametrize("name", ROW_OF)
def test_hostile_rows_are_as_exact_as_on_one_device(name):
    logits, labels = jnp.asarray(ROW_OF[name], jnp.float32), jnp.array([0, 7])
    whole, split = _hostile()
    results, expected = split(logits, labels), whole(logits, labels)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=2e-6, atol=1e-45)
    np.testing.assert_array_equal(results[2], np.argmax(logits, -1))


def test_wrong_and_ignored_labels_and_padding():
    """A wrong label is loud in its own row alone; padding and rows that do not count may hold anything."""
    logits = jnp.asarray(ARRAYS["logits"], jnp.float32).at[:, REAL:].set(jnp.nan).at[1].set(jnp.nan)
    labels = jnp.array([0, -100, REAL, -1, 12, 4, V, 3])
    options = {"ignore_index": -100, "num_classes": REAL, "label_smoothing": 0.1}

    def losses(logits, labels, **mesh_options):
        def per_row(logits):
            return jaxce.cross_entropy(logits, labels, **options, **mesh_options, reduction="none")

        return per_row(logits), jax.grad(lambda logits: jnp.sum(per_row(logits)))(logits)

    split = functools.partial(losses, class_axis_name="model")
    result = _on_mesh(split, (P("data", "model"), P("data")), (P("data"), P("data", "model")))(logits, labels)
    expected = unoptimized.jit(losses)(logits, labels)
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7)
    assert np.isnan(result[0]).tolist() == [False, False, True, True, False, False, True, False]
    assert not result[1][:, REAL:][np.array([0, 1, 4, 5, 7])].any()
    assert not result[1][1].any()


def _hlo(step, *arrays):
    return jax.jit(step).lower(*arrays).compile().as_text()


@pytest.mark.parametrize("recompute", [True, False])
def test_plain_jit_on_an_explicit_mesh_gathers_nothing(recompute):
    """And its gradients are split as their arrays are."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    hidden, kernel, labels = _placed(
        "linear, labels, recomputed", mesh, "data", "model", _arrays("linear, labels, recomputed", jnp.float32)
    )[:3]

    def loss(hidden, kernel):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, recompute=recompute, block_bytes=4 * N)

    step = jax.value_and_grad(loss, (0, 1))
    assert "all-gather" not in _hlo(step, hidden, kernel)
    gradients = jax.jit(step)(hidden, kernel)[1]
    assert [gradient.sharding.spec for gradient in gradients] == [P("data", None), P(None, "model")]


def test_plain_jit_on_an_auto_mesh_does_not_gather_the_classes_of_logits():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for case in ("labels", "distributions"):
        logits, targets = _placed(case, mesh, "data", "model", _arrays(case, jnp.float32))[:2]
        text = _hlo(jax.value_and_grad(lambda z, t: jaxce.cross_entropy(z, t, label_smoothing=0.1)), logits, targets)
        gathered = [line for line in text.splitlines() if " all-gather(" in line]
        assert all(f",{V}]" not in line and f"[{V}," not in line for line in gathered)


# Rows in scan's steps and on devices: (steps, devices).
LAYOUTS = [(1, 8), (2, 4), (4, 2), (8, 1), (2, 8)]
BATCH = 16


@functools.cache
def _accumulated(steps, devices):
    """Loss and gradient of a batch that comes in steps, over devices, from its sums."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def on_device(kernel, *rows):
        def step(carry, micro_batch):
            def total(kernel):
                hidden, labels, weights, where = micro_batch
                parts = jaxce.linear_cross_entropy(
                    hidden, kernel, labels, weights=weights, where=where, batch_axis_name="data", reduction="parts"
                )
                return parts.total, parts

            gradient, parts = jax.grad(total, has_aux=True)(kernel)
            return (carry[0] + parts, carry[1] + gradient), None

        nothing = jaxce.MeanParts(jnp.zeros(()), jnp.zeros(())), jnp.zeros_like(kernel)
        (parts, gradient), _ = jax.lax.scan(step, nothing, rows)
        return parts.mean(), jaxce.MeanParts(gradient, parts.weight).mean()

    split = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), *[P(None, "data")] * 4), out_specs=P())

    def accumulate(kernel, *rows):
        return split(kernel, *(array.reshape(steps, BATCH // steps, *array.shape[1:]) for array in rows))

    return unoptimized.jit(accumulate)


@functools.cache
def _at_once():
    def loss(kernel, hidden, labels, weights, where):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, weights=weights, where=where)

    return unoptimized.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(("steps", "devices"), daily(LAYOUTS, [(2, 4), (8, 1)]))
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    masked=st.lists(st.tuples(st.integers(0, BATCH), st.integers(0, BATCH)), max_size=3),
    keeps=st.floats(0, 1),
)
def test_any_split_of_a_batch_has_its_loss_and_gradient(steps, devices, seed, masked, keeps):
    """Whole stretches of rows are masked, and with them shards and micro-batches."""
    rng = np.random.default_rng(seed)
    where = rng.uniform(size=BATCH) < keeps
    for start, stop in masked:
        where[start:stop] = False
    weights = rng.uniform(0, 2, BATCH)
    rows = [rng.normal(size=(BATCH, D)), rng.integers(0, V, BATCH), weights, where]
    arrays = [jnp.asarray(array, jnp.float32 if array.dtype == float else None) for array in rows]
    kernel = jnp.asarray(ARRAYS["kernel"], jnp.float32)
    value, gradient = _accumulated(steps, devices)(kernel, *arrays)
    expected, expected_gradient = _at_once()(kernel, *arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-6)
    if not where.any():
        assert value == 0
        assert not gradient.any()


def test_an_own_loss_of_split_rows_and_classes(x64):
    def loss(logits, labels, weights, where, **mesh_options):
        batch_axis_name = mesh_options.get("batch_axis_name")
        vector = jnp.ones(logits.shape[-1])
        asked = {"class_vector": vector, "entropy": True, "argmax": True}
        summary = jaxce.summarize(logits, labels, where=where, **asked, **mesh_options)
        losses = -jnp.expm1(-0.7 * summary.nll) / 0.7 + 1e-3 * _of_summary(summary) + 1e-3 * summary.log_z**2
        return jaxce.reduce_losses(losses, weights, where=where, batch_axis_name=batch_axis_name)

    names = ["logits", "labels", "weights", "where"]
    arrays = [jnp.asarray(ARRAYS[name]) for name in names]
    expected = unoptimized.jit(jax.value_and_grad(loss))(*arrays)
    split = functools.partial(loss, class_axis_name="model", batch_axis_name="data")
    specs = tuple(_spec(name, "data", "model") for name in names)
    result = _on_mesh(jax.value_and_grad(split), specs, (P(), specs[0]))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), result, expected)
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]
    result = unoptimized.jit(jax.value_and_grad(loss))(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), result, expected)


def _any_spec(rng, shape):
    """One of the ways to split an array over the axes of the mesh, whatever its axes mean; what is left must divide."""
    split, left = [()] * len(shape), list(shape)
    for name in rng.permutation(["data", "model"]):
        axis, devices = rng.integers(-1, len(shape)), {"data": 2, "model": 4}[name]
        if axis >= 0 and left[axis] % devices == 0:
            split[axis] += (str(name),)
            left[axis] //= devices
    return P(*split)


ANY_SPLIT = [(case, seed) for case in [*CASES, *BY_TYPES] for seed in range(6)]
ANY_SPLIT_DAILY = [(case, 0) for case in ["labels", MAIN[2], "binary", "own losses"]]


@pytest.mark.parametrize(("case", "seed"), daily(ANY_SPLIT, ANY_SPLIT_DAILY))
def test_arrays_split_in_any_way_on_an_explicit_mesh(case, seed, x64):
    """Seed 0 leaves logits, or hidden and kernel, whole, and splits what follows them."""
    rng, mesh = np.random.default_rng(seed), jax.make_mesh((2, 4), ("data", "model"))
    names = (CASES | BY_TYPES)[case][1]
    is_whole = [seed == 0 and name in {"logits", "hidden", "kernel"} for name in names]
    arrays = _arrays(case)
    specs = [P() if still else _any_spec(rng, array.shape) for still, array in zip(is_whole, arrays, strict=True)]
    expected = _whole(case, None, None)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]
        value, gradients = unoptimized.jit(_value_and_gradients(case))(*placed)
        eager = _value(case, placed)
    np.testing.assert_allclose(eager, expected[0], rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), (value, gradients), expected)
    moving = [array for name, array in zip(names, placed, strict=True) if _is_moving(name)]
    assert [jax.typeof(array) for array in gradients] == [jax.typeof(array) for array in moving]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eager_calls_find_the_mesh_at_their_arrays(kind, x64):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    case = "linear, labels, recomputed"
    hidden, kernel = _placed(case, mesh, "data", "model", _arrays(case))[:2]
    labels = ARRAYS["labels"]
    loss = jaxce.linear_cross_entropy(hidden, kernel, labels, batch_axis_name="data", class_axis_name="model")
    np.testing.assert_allclose(loss, jaxce.cross_entropy(ARRAYS["hidden"] @ ARRAYS["kernel"], labels), rtol=1e-12)


@pytest.mark.parametrize("recompute", [True, False])
def test_parts_of_devices_add_up_by_their_psum(recompute, x64):
    """Rows alone are split, no names are given, and the kernel is the same on all devices."""
    names = ["hidden", "kernel", "labels", "where"]
    arrays = [jnp.asarray(ARRAYS[name]) for name in names]

    def loss(hidden, kernel, labels, where, reduce=jaxce.MeanParts.mean):
        options = {"where": where, "label_smoothing": 0.1, "recompute": recompute, "block_bytes": 64}
        return reduce(jaxce.linear_cross_entropy(hidden, kernel, labels, reduction="parts", **options))

    split = functools.partial(loss, reduce=lambda parts: parts.psum("data").mean())
    specs = P("data"), P(), P("data"), P("data")
    result = _on_mesh(jax.value_and_grad(split, (0, 1)), specs, (P(), specs[:2]))(*arrays)
    expected = unoptimized.jit(jax.value_and_grad(loss, (0, 1)))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), result, expected)


def test_rows_that_were_gathered_are_cast_to_be_the_same(x64):
    """Labels and weights that a sequence-parallel step gathers; hidden may stay as it is."""
    names = ["hidden", "kernel", "labels", "weights"]
    arrays = [jnp.asarray(ARRAYS[name]) for name in names]

    def loss(hidden, kernel, labels, weights):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, weights=weights)

    def on_device(hidden, kernel, labels, weights):
        def split_loss(hidden, kernel, weights):
            hidden, whole, weights = (
                jax.lax.all_gather(array, "model", tiled=True) for array in (hidden, labels, weights)
            )
            whole, weights = jax.lax.pmax(whole, "model"), jax.lax.pmean(weights, "model")
            return jaxce.linear_cross_entropy(
                hidden, kernel, whole, weights=weights, class_axis_name="model", batch_axis_name="data"
            )

        return jax.value_and_grad(split_loss, (0, 1, 2))(hidden, kernel, weights)

    rows, classes = P(("data", "model")), P(None, "model")
    result = _on_mesh(on_device, (rows, classes, rows, rows), (P(), (rows, classes, rows)))(*arrays)
    expected = unoptimized.jit(jax.value_and_grad(loss, (0, 1, 3)))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), result, expected)


@pytest.mark.parametrize("case", ["labels", "distributions", "linear, labels, recomputed"])
def test_vmap_over_an_axis_that_is_split(case, x64):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    count = 3 if "linear" in case else 2
    arrays = _arrays(case)
    placed = _placed(case, mesh, "data", "model", arrays)[:count]
    del arrays[count:]
    in_axes = tuple(None if name == "kernel" else 0 for name in CASES[case][1][:count])

    def per_row(*arrays):
        return jax.vmap(jax.value_and_grad(CASES[case][0]), in_axes=in_axes)(*arrays)

    expected = unoptimized.jit(per_row)(*arrays)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        unoptimized.jit(per_row)(*placed),
        expected,
    )
