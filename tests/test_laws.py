"""What holds of cross entropy whatever the numbers are, asked of every way to compute it.

The other tests compare with formulas, with peers or with each other; these laws need no second implementation. Every
producer is one function of the same data: a linear head has the logits as hidden and the identity as kernel, so that
its products are exact, and a split one has the same arrays over 2 x 4 devices. A law changes the data and says what
happens to the results.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxce

N, V = 8, 16
REAL = 13  # of the 16 classes, where some are padding; the last of 4 devices then has one
EXACT = 1e-12
RNG = np.random.default_rng(11)
LABELS = RNG.integers(0, REAL, N)
CONFIDENT, TIES = 3, 5  # rows
LOGITS = RNG.normal(0, 2, (N, V))
LOGITS[CONFIDENT, LABELS[CONFIDENT]] = 30
LOGITS[TIES] = 0
COTANGENT = RNG.normal(size=N)
DATA = {
    "logits": LOGITS,
    "weights": RNG.uniform(0.5, 2, N),
    "class_weights": RNG.uniform(0.5, 2, V),
    "where": np.arange(N) != 6,
    "label_smoothing": np.array(0.1),
    "z_loss": np.array(0.05),
}
TARGETS = {"labels": LABELS, "distributions": RNG.uniform(0.1, 1, (N, V))}  # they do not sum to 1
OF_ROWS = {"logits", "weights", "targets"}
NO_OPTIONS = {
    "weights": np.ones(N),
    "class_weights": np.ones(V),
    "where": np.ones(N, bool),
    "label_smoothing": np.zeros(()),
    "z_loss": np.zeros(()),
}


# --- producers: functions of data and a reduction


def _dense(data, **how):
    return jaxce.cross_entropy(**data, **how)


def _linear(recompute, block, data, **how):
    """By blocks of so many classes, or rows; a device has half of the rows and a quarter of the classes."""
    others = {name: array for name, array in data.items() if name not in ("logits", "kernel")}
    hidden, kernel = data["logits"], data["kernel"]
    block_bytes = 4 * block * (len(hidden) if recompute else kernel.shape[1])
    return jaxce.linear_cross_entropy(hidden, kernel, recompute=recompute, block_bytes=block_bytes, **others, **how)


def _split(loss, data, reduction, **how):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def on_device(data):
        names = {"class_axis_name": "model", "batch_axis_name": "data"}
        return loss(data, reduction=reduction, **names, **how)

    specs = {name: _spec(name, array.ndim, "kernel" in data) for name, array in data.items()}
    out_specs = P("data") if reduction == "none" else P()
    return jax.shard_map(on_device, mesh=mesh, in_specs=(specs,), out_specs=out_specs)(data)


def _spec(name, ndim, is_linear):
    shared_rows = P("data", None if name == "logits" and is_linear else "model")
    by_name = {"kernel": P(None, "model"), "class_weights": P("model")}
    return by_name.get(name, {0: P(), 1: P("data"), 2: shared_rows}[ndim])


def _blocks(recompute, block):
    return functools.partial(_linear, recompute, block)


PRODUCERS = {
    "dense": _dense,
    "blocks of classes": _blocks(True, 3),
    "blocks of rows": _blocks(False, 3),
    "split": functools.partial(_split, _dense),
    "split, blocks of classes": functools.partial(_split, _blocks(True, 3)),
    "split, blocks of rows": functools.partial(_split, _blocks(False, 3)),
}
# Blocks of every other size; the producers' blocks are of 3.
BLOCKS = {
    f"blocks of {size} {what}": _blocks(recompute, size)
    for what, recompute, length in (("classes", True, V), ("rows", False, N))
    for size in (1, length - 1, length, length + 1, 2 * length)
}
WAYS = PRODUCERS | BLOCKS


# --- results: one compiled function per producer and kind of target


class Results(NamedTuple):
    losses: jax.Array
    parts: jaxce.MeanParts
    mean: jax.Array
    by_losses: dict  # gradients, by name: of Σ cotangent · losses
    by_total: dict  # of the total of the parts
    by_mean: dict


@functools.cache
def _compiled(producer, num_classes=None):
    def results(moving, fixed, cotangent, scale):
        scalars = {
            "none": lambda losses: jnp.vdot(cotangent, losses),
            "parts": lambda parts: scale * parts.total,
            "mean": lambda mean: scale * mean,
        }

        def reduced(moving, reduction):
            result = WAYS[producer](moving | fixed, reduction=reduction, num_classes=num_classes)
            return scalars[reduction](result), result

        pairs = [jax.grad(reduced, has_aux=True)(moving, reduction) for reduction in scalars]
        return Results(*(result for _, result in pairs), *(gradient for gradient, _ in pairs))

    return unoptimized.jit(results)


def _run(producer, data, *, cotangent=COTANGENT, scale=1.0, num_classes=None):
    """Results of NumPy arrays, with the gradients of all floating ones."""
    arrays = {name: jnp.asarray(array) for name, array in data.items()}
    if "blocks" in producer:
        arrays["kernel"] = jnp.eye(data["logits"].shape[1])
    moving = {name: array for name, array in arrays.items() if array.dtype == float}
    fixed = {name: array for name, array in arrays.items() if name not in moving}
    return _compiled(producer, num_classes)(moving, fixed, jnp.asarray(cotangent), scale)


def _data(kind, **changes):
    return DATA | {"targets": TARGETS[kind]} | {name: np.asarray(array) for name, array in changes.items()}


# --- comparisons


def _gradients(results):
    return {name: getattr(results, name) for name in ("by_losses", "by_total", "by_mean")}


def _assert_close(result, expected, tolerance=EXACT):
    """Of trees, by the names in `expected`."""
    if isinstance(expected, dict):
        for name in expected:
            _assert_close(result[name], expected[name], tolerance)
    else:
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def _comparable(results, *left_out):
    """Everything by name, but for the gradients that a law says nothing of; a dense loss has none of a kernel."""
    gradients = {
        kind: {name: array for name, array in by_name.items() if name not in ("kernel", *left_out)}
        for kind, by_name in _gradients(results).items()
    }
    values = {"losses": results.losses, "total": results.parts.total, "weight": results.parts.weight}
    return values | {"mean": results.mean} | gradients


def _one_hot(labels):
    return np.eye(V)[labels]


def _as_distributions(kind):
    return _one_hot(LABELS) if kind == "labels" else TARGETS[kind]


DAILY_IN_BLOCKS = "split, blocks of classes", "labels"


def _cases(is_daily):
    """Every producer with every kind of target, of which the chosen ones run every day."""
    for producer in PRODUCERS:
        for kind in TARGETS:
            yield pytest.param(producer, kind, marks=[] if is_daily(producer, kind) else pytest.mark.thorough)


# What is split as well as in blocks has labels every day, in blocks of classes.
EVERY_CASE = list(
    _cases(lambda producer, kind: not producer.startswith("split, ") or (producer, kind) == DAILY_IN_BLOCKS)
)
every_case = pytest.mark.parametrize(("producer", "kind"), EVERY_CASE)
every_producer = pytest.mark.parametrize("producer", PRODUCERS)
pytestmark = pytest.mark.usefixtures("x64")


# --- laws of softmax minus target


@every_case
def test_a_common_offset_changes_nothing(producer, kind):
    offsets = np.array([-40, 0.5, 3, -7, 100, 1, 8, -2])[:, None]
    results = _run(producer, _data(kind, logits=LOGITS + offsets, z_loss=0.0))
    expected = _run(producer, _data(kind, z_loss=0.0))
    _assert_close(_comparable(results), _comparable(expected, "z_loss"))


@every_case
def test_classes_have_no_order(producer, kind):
    order = np.random.default_rng(1).permutation(V)
    targets = np.argsort(order)[LABELS] if kind == "labels" else TARGETS[kind][:, order]
    permuted = {"logits": LOGITS[:, order], "targets": targets, "class_weights": DATA["class_weights"][order]}
    results, expected = _run(producer, _data(kind, **permuted)), _comparable(_run(producer, _data(kind)))
    for gradients in (expected["by_losses"], expected["by_total"], expected["by_mean"]):
        for name in gradients.keys() & permuted:
            gradients[name] = gradients[name][..., order]
    _assert_close(_comparable(results), expected)


@every_case
def test_gradient_rows_sum_to_zero(producer, kind):
    """And so do those of a kernel's gradient, a sum of such rows."""
    for gradients in _gradients(_run(producer, _data(kind, z_loss=0.0))).values():
        for name in gradients.keys() & {"logits", "kernel"}:
            assert np.all(np.abs(gradients[name]).sum(-1)[:CONFIDENT] > 1e-3)
            np.testing.assert_allclose(gradients[name].sum(-1), 0, atol=EXACT)


@every_case
def test_gradient_is_linear_in_the_cotangent(producer, kind):
    results, of_ones = _run(producer, _data(kind)), _run(producer, _data(kind), cotangent=np.ones(N))
    np.testing.assert_allclose(
        results.by_losses["logits"], COTANGENT[:, None] * of_ones.by_losses["logits"], rtol=EXACT, atol=EXACT
    )
    doubled = _run(producer, _data(kind), cotangent=2 * COTANGENT, scale=2.0)
    for once, twice in zip(results[3:], doubled[3:], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(2 * a, b), once, twice)


# --- laws of targets


@every_case
def test_smoothing_is_a_mixture_with_the_uniform_distribution(producer, kind):
    """Under class weights too, but for the divisor of the mean: labels divide by the weights of their classes."""
    epsilon = DATA["label_smoothing"]
    mixture = (1 - epsilon) * _as_distributions(kind) + epsilon / V
    results = _run(producer, _data(kind, z_loss=0.0))
    expected = _run("dense", _data("distributions", targets=mixture, z_loss=0.0, label_smoothing=0.0))
    _assert_same_sums(results, expected, "label_smoothing", "targets")


@every_producer
def test_one_hot_distribution_is_the_label(producer):
    """The sums are the same. The mean of labels divides by Σ v w_y and that of distributions by Σ v, as in PyTorch."""
    results = _run(producer, _data("labels", z_loss=0.0))
    expected = _run("dense", _data("distributions", targets=_one_hot(LABELS), z_loss=0.0))
    _assert_same_sums(results, expected)
    weights = np.where(DATA["where"], DATA["weights"], 0)
    _assert_close(results.parts.weight, np.sum(weights * DATA["class_weights"][LABELS]))
    _assert_close(expected.parts.weight, np.sum(weights))
    labels = _run(producer, _data("labels", class_weights=np.ones(V)))
    one_hot = _run("dense", _data("distributions", targets=_one_hot(LABELS), class_weights=np.ones(V)))
    _assert_close(_comparable(one_hot), _comparable(labels, "class_weights"))


def _assert_same_sums(results, expected, *left_out):
    expected = _comparable(expected, "targets", "z_loss", *left_out)
    _assert_close(_comparable(results), {name: expected[name] for name in ("losses", "total", "by_losses", "by_total")})


@every_case
def test_two_classes_are_the_binary_loss(producer, kind):
    """The other classes have a probability of exactly 0."""
    z = np.concatenate([LOGITS[:5, 0], [0, 30, -30]])
    t = (LABELS % 2).astype(float) if kind == "labels" else np.linspace(0, 1, N)
    logits = np.full((N, V), -1e4)
    logits[:, 0], logits[:, 1] = 0, z
    targets = t.astype(int) if kind == "labels" else np.pad(np.stack([1 - t, t], 1), ((0, 0), (0, V - 2)))
    results = _run(producer, _data(kind, **NO_OPTIONS, logits=logits) | {"targets": targets})
    losses, pullback = jax.vjp(
        lambda z: jaxce.binary_cross_entropy(z, jnp.asarray(t), reduction="none"), jnp.asarray(z)
    )
    (gradient,) = pullback(jnp.asarray(COTANGENT))
    np.testing.assert_allclose(results.losses, losses, rtol=EXACT)
    np.testing.assert_allclose(results.mean, losses.mean(), rtol=EXACT)
    np.testing.assert_allclose(results.by_losses["logits"][:, 1], gradient, rtol=EXACT, atol=1e-15)
    np.testing.assert_allclose(results.by_losses["logits"][:, 0], -gradient, rtol=EXACT, atol=1e-15)
    assert not results.by_losses["logits"][:, 2:].any()


# --- laws of weights and settings


@every_case
def test_sums_grow_with_their_weights_and_means_do_not(producer, kind):
    """Euler's law of homogeneous functions, of the derivatives. The z-loss of distributions has no class weights."""
    results = _run(producer, _data(kind, z_loss=0.05 if kind == "labels" else 0.0))
    for name in ("weights", "class_weights"):
        _assert_close(jnp.vdot(DATA[name], results.by_total[name]), results.parts.total)
        divides = name == "weights" or kind == "labels"
        _assert_close(jnp.vdot(DATA[name], results.by_mean[name]), 0 if divides else results.mean)


@every_case
@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_the_loss_is_affine_in_its_settings(producer, kind, name):
    results = _run(producer, _data(kind))
    zero, one = (_run(producer, _data(kind, **{name: setting})) for setting in (0.0, 1.0))
    setting = DATA[name]
    for at, at_0, at_1 in zip(
        (results.losses, results.mean), (zero.losses, zero.mean), (one.losses, one.mean), strict=True
    ):
        _assert_close(at, (1 - setting) * at_0 + setting * at_1)
    assert abs(one.mean - zero.mean) > 1
    _assert_close(results.by_mean[name], one.mean - zero.mean)
    _assert_close(results.by_total[name], one.parts.total - zero.parts.total)


@every_case
def test_weight_two_is_the_row_twice(producer, kind):
    """Row 1 is row 0 again, or it does not count and row 0 has twice its weight."""
    rows = np.array([0, 0, *range(2, N)])
    logits, targets = LOGITS[rows], TARGETS[kind][rows]
    twice = _run(producer, _data(kind, logits=logits, targets=targets, weights=np.ones(N)))
    weights, where = np.ones(N), DATA["where"].copy()
    weights[0], where[1] = 2, False
    double = _run(producer, _data(kind, logits=logits, targets=targets, weights=weights, where=where))
    _assert_close(double.parts.total, twice.parts.total)
    _assert_close(double.parts.weight, twice.parts.weight)
    _assert_close(double.mean, twice.mean)
    assert twice.by_mean["logits"][1].any()
    folded = twice.by_mean["logits"].at[0].add(twice.by_mean["logits"][1]).at[1].set(0)
    _assert_close(double.by_mean["logits"], folded)
    _assert_close(double.by_mean, {name: twice.by_mean[name] for name in twice.by_mean.keys() - OF_ROWS})


# --- laws of batches


@every_case
def test_where_is_the_subset(producer, kind):
    """Of the same rows twice, so that there are as many. What does not count holds garbage in all of its arrays."""
    kept = np.array([0, CONFIDENT, TIES, 6])
    twice = np.repeat(kept, 2)
    rows = {"logits": LOGITS, "weights": DATA["weights"], "targets": TARGETS[kind]}
    where = np.isin(np.arange(N), kept)
    spoilt = {name: array.copy() for name, array in rows.items()}
    for array in spoilt.values():
        array[~where] = np.nan if array.dtype == float else 99
    results = _run(producer, _data(kind, **spoilt, where=where))
    subset = {name: array[twice] for name, array in rows.items()}
    expected = _run(producer, _data(kind, **subset, where=np.ones(N, bool)), cotangent=COTANGENT[twice] / 2)
    assert not results.losses[~where].any()
    _assert_close(results.losses[kept], expected.losses[::2])
    _assert_close(results.mean, expected.mean)
    _assert_close(2 * results.parts.weight, expected.parts.weight)
    for ours, theirs in ((results.by_losses, expected.by_losses), (results.by_mean, expected.by_mean)):
        _assert_close(ours, {name: theirs[name] for name in theirs.keys() - OF_ROWS})
        for name in ours.keys() & OF_ROWS:
            assert not ours[name][~where].any()
            _assert_close(ours[name][kept], theirs[name][::2] + theirs[name][1::2])


@every_case
def test_parts_of_a_batch_add_up(producer, kind):
    """In three parts, one of which has nothing that counts, across the edges of blocks and devices."""
    part_of = np.array([0, 0, 1, 0, 1, 1, 2, 1])
    parts = [_run(producer, _data(kind, where=DATA["where"] & (part_of == i))) for i in range(3)]
    whole = _run(producer, _data(kind))
    total = sum(part.parts for part in parts)
    assert parts[2].parts.weight == 0
    assert parts[2].mean == 0
    assert not any(gradient.any() for gradient in parts[2].by_mean.values())
    _assert_close(total.mean(), whole.mean)
    _assert_close(total.total, jnp.sum(whole.losses))
    for name in whole.by_total:
        summed = sum(part.by_total[name] for part in parts)
        _assert_close(summed, whole.by_total[name])
        if name not in ("weights", "class_weights"):  # which are in the divisor too
            _assert_close(summed / total.weight, whole.by_mean[name])


# --- laws of slices of the classes


BLOCK_CASES = [pytest.param(name, kind, marks=pytest.mark.thorough) for name in BLOCKS for kind in TARGETS]


@pytest.mark.parametrize(("producer", "kind"), EVERY_CASE[2:] + BLOCK_CASES)
def test_slices_merge_into_the_whole(producer, kind):
    """Of classes or rows, in blocks or on devices. A kernel's gradient is hiddenᵀ times that of the logits."""
    results, dense = _run(producer, _data(kind)), _run("dense", _data(kind))
    _assert_close(_comparable(results), _comparable(dense))
    for gradients, expected in zip(_gradients(results).values(), _gradients(dense).values(), strict=True):
        if "kernel" in gradients:
            _assert_close(gradients["kernel"], LOGITS.T @ expected["logits"])


PADDING_CASES = list(_cases(lambda producer, kind: producer == "dense"))


@pytest.mark.parametrize(("producer", "kind"), PADDING_CASES)
def test_padding_is_not_there(producer, kind):
    """Whatever it holds; a kernel's must be finite."""
    garbage = 50.0 if "blocks" in producer else np.nan
    padded = {"logits": LOGITS.copy(), "class_weights": DATA["class_weights"].copy(), "targets": TARGETS[kind].copy()}
    padded["logits"][:, REAL:] = garbage
    padded["class_weights"][REAL:] = np.nan
    cut = {"logits": LOGITS[:, :REAL], "class_weights": DATA["class_weights"][:REAL], "targets": TARGETS[kind]}
    if kind == "distributions":
        padded["targets"][:, REAL:] = np.nan
        cut["targets"] = cut["targets"][:, :REAL]
    results = _run(producer, _data(kind, **padded), num_classes=REAL)
    expected = _comparable(_run("dense", _data(kind, **cut)))
    for gradients in _gradients(results).values():
        for name in gradients.keys() & {"logits", "kernel", "class_weights", "targets"}:
            assert not gradients[name][..., REAL:].any()
            gradients[name] = gradients[name][..., :REAL]
    _assert_close(_comparable(results), expected)


# --- laws of transformations


TRANSFORMATIONS = {
    "value_and_grad": lambda f: lambda x: jax.value_and_grad(f)(x)[0],
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[0],
    "linearize": lambda f: lambda x: jax.linearize(f, x)[0],
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, -x]))[0],
    "scan": lambda f: lambda x: jax.lax.scan(lambda carry, x: (carry, f(x)), 0.0, x[None])[1][0],
    "checkpoint": lambda f: lambda x: jax.value_and_grad(jax.checkpoint(f))(x)[0],
}
ANOTHER_ORDER = 1e-15  # gradients made in the forward pass add up the losses of a block at a time
TRANSFORMATION_CASES = [
    pytest.param(name, *case.values, marks=[] if case.values == ("dense", "labels") else pytest.mark.thorough)
    for name in TRANSFORMATIONS
    for case in EVERY_CASE
]


@pytest.mark.parametrize(("name", "producer", "kind"), TRANSFORMATION_CASES)
def test_a_transformation_leaves_the_value_alone(name, producer, kind):
    value = unoptimized.jit(TRANSFORMATIONS[name](_mean_of_logits(producer, kind)))(jnp.asarray(LOGITS))
    tolerance = ANOTHER_ORDER if "of rows" in producer else 0
    np.testing.assert_allclose(value, _value(producer, kind), rtol=tolerance)


@every_producer
def test_gradients_beside_it_leave_the_value_alone(producer):
    """Three reductions and their gradients, compiled as one program."""
    results = _run(producer, _data("labels"))
    np.testing.assert_allclose(results.mean, _value(producer, "labels"), rtol=ANOTHER_ORDER)


@pytest.mark.parametrize(
    "producer",
    ["dense", *(pytest.param(f"blocks of {what}", marks=pytest.mark.thorough) for what in ("classes", "rows"))],
)
def test_donated_logits_have_the_same_value_and_gradient(producer):
    step = jax.value_and_grad(_mean_of_logits(producer, "labels"))
    donated = jnp.array(LOGITS)
    result = jax.jit(step, donate_argnums=0)(donated)
    assert donated.is_deleted()
    jax.tree.map(np.testing.assert_array_equal, result, jax.jit(step)(jnp.array(LOGITS)))


def _mean_of_logits(producer, kind):
    data = {name: jnp.asarray(array) for name, array in _data(kind).items()}
    kernel = {"kernel": jnp.eye(V)} if "blocks" in producer else {}
    return lambda logits: WAYS[producer](data | kernel | {"logits": logits}, reduction="mean")


@functools.cache
def _value(producer, kind):
    return unoptimized.jit(_mean_of_logits(producer, kind))(jnp.asarray(LOGITS))
