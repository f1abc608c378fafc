"""A loss of one's own is the plain formula on held logits: every mode, both ways, masks, meshes, reductions."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import daily

import jaxce

RNG = np.random.default_rng(17)
ROWS, FEATURES, CLASSES = 4, 3, 7
SHAPE = {"weights": RNG.uniform(0.5, 2, ROWS), "where": np.arange(ROWS) != 2}
TARGETS = RNG.integers(0, CLASSES, ROWS, np.int32)
BESIDE = {
    "advantages": RNG.normal(size=ROWS),
    "old": -RNG.uniform(1, 3, ROWS),
    "actions": TARGETS,
}


def _clipped(beta, summary, rows):
    """Clipped policy gradient with an entropy bonus, and what one would log."""
    ratio = jnp.exp(-summary.nll - rows["old"])
    advantage = rows["advantages"]
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
    loss = -gain - beta * summary.entropy + 0.01 * summary.spread + 0.001 * summary.log_z**2
    return loss, {"hits": summary.argmax == rows["actions"], "entropy": summary.entropy}


def _plain(logits, beta, rows, vector, reduction):
    """The same on logits that are held, reduced by its definition."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(log_p, jnp.asarray(TARGETS)[:, None], axis=-1)[:, 0]
    entropy, spread = -jnp.sum(jnp.exp(log_p) * log_p, -1), -jnp.sum(log_p * vector[None], -1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    summary = jaxce.Summary(log_z, nll, spread, entropy, jnp.argmax(logits, -1).astype(jnp.int32))
    weights = jnp.where(SHAPE["where"], SHAPE["weights"], 0)

    def reduced(numbers):
        numbers = numbers.astype(weights.dtype)
        if reduction == "none":
            return weights * numbers
        total = jnp.sum(weights * numbers)
        return {"sum": total, "mean": total / jnp.sum(weights), "parts": jaxce.MeanParts(total, jnp.sum(weights))}[
            reduction
        ]

    return jax.tree.map(reduced, _clipped(beta, summary, rows))


def _custom(logits, beta, rows, vector, reduction, **options):
    return jaxce.custom_loss(
        partial(_clipped, beta),
        logits,
        TARGETS,
        rows=rows,
        class_vector=vector,
        entropy=True,
        argmax=True,
        has_aux=True,
        reduction=reduction,
        **SHAPE,
        **options,
    )


def _capped(head):
    hidden, kernel, bias = head
    return 5 * jnp.tanh((hidden @ kernel + bias[None]) / 5)


def _lazy(head, **options):
    return jaxce.LinearLogits(head[0], head[1], bias=head[2], softcap=5.0, **options)


def _arguments():
    head = RNG.normal(size=(ROWS, FEATURES)), RNG.normal(size=(FEATURES, CLASSES)), RNG.normal(size=CLASSES)
    return jax.tree.map(jnp.asarray, (head, 0.3, BESIDE["advantages"], np.linspace(0.1, 1, CLASSES)))


def _every_mode(loss):
    """Value, gradient, tangent, Hessian-vector product, and vmap of the gradient: of all that is floating."""

    def call(head, beta, advantages, vector):
        return loss(head, beta, BESIDE | {"advantages": advantages}, vector)

    def total(*arguments):
        losses, aux = call(*arguments)
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, losses)), aux

    beside_gradient = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)

    def gradient(*arguments):
        return beside_gradient(*arguments)[0]

    def modes(arguments):
        tangents = jax.tree.map(jnp.cos, arguments)
        batch = jax.tree.map(lambda array: jnp.stack([array, array / 2]), arguments)
        return {
            "value": call(*arguments),
            "gradient": beside_gradient(*arguments),
            "tangent": jax.jvp(lambda *arguments: call(*arguments)[0], arguments, tangents),
            "second": jax.jvp(gradient, arguments, tangents)[1],
            "mapped": jax.vmap(gradient)(*batch),
        }

    return unoptimized.jit(modes)


@cache
def _expected(reduction):
    with jax.enable_x64(True):
        arguments = _arguments()
        modes = _every_mode(lambda head, *rest: _plain(_capped(head), *rest, reduction))
        return arguments, jax.tree.map(np.asarray, modes(arguments))


SIZES = {"1": 1, "prime": 3, "V-1": CLASSES - 1, "V": CLASSES, "V+1": CLASSES + 1}
PRODUCERS = {"held": None} | {(size, recompute): None for size in SIZES for recompute in (True, False)}
CASES = [(producer, reduction) for producer in PRODUCERS for reduction in ("mean", "sum", "parts", "none")]
DAILY = [(("prime", False), "parts")]


@pytest.mark.parametrize(("producer", "reduction"), daily(CASES, DAILY))
def test_every_mode_is_that_of_the_plain_formula(producer, reduction):
    def logits(head):
        if producer == "held":
            return _capped(head)
        size, recompute = producer
        width = ROWS if recompute else CLASSES  # a block is of classes of all rows, or of rows of all classes
        return _lazy(head, block_bytes=4 * width * SIZES[size], recompute=recompute)

    arguments, expected = _expected(reduction)
    with jax.enable_x64(True):
        modes = _every_mode(lambda head, *rest: _custom(logits(head), *rest, reduction))
        results = modes(arguments)
    jax.tree.map(lambda result, wanted: np.testing.assert_allclose(result, wanted, 1e-10, 1e-10), results, expected)


@pytest.mark.parametrize("recompute", [True, False])
def test_multiplications(recompute):
    (head, beta, advantages, vector), _ = _expected("mean")
    head = jax.tree.map(lambda array: np.float32(np.asarray(array)), head)
    rows = {"advantages": np.float32(np.asarray(advantages)), "old": np.float32(BESIDE["old"]), "actions": TARGETS}

    def loss(head, beta):
        logits = _lazy(head, recompute=recompute)
        return _custom(logits, beta, rows, np.float32(np.asarray(vector)), "mean")

    def count(function):
        return jax.jit(function).lower(head, np.float32(np.asarray(beta))).as_text().count("dot_general")

    assert count(loss) == 1
    assert count(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)) == (4 if recompute else 3)


@pytest.mark.parametrize("recompute", [None, True, False])
def test_rows_that_do_not_count_are_not_read(recompute):
    """Not even by a formula that has no value and no slope at 0, nor by what it closes over."""
    mask = jnp.arange(4) < 2
    hidden = jnp.where(mask[:, None], jnp.ones((4, 3)), jnp.nan)
    extra = jnp.where(mask, jnp.ones(4), jnp.nan)
    kernel = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)

    def loss(scale, hidden, kernel, extra):
        logits = hidden @ kernel if recompute is None else jaxce.LinearLogits(hidden, kernel, recompute=recompute)

        def formula(summary, extra):
            return jnp.sqrt(scale * summary.nll) * jnp.log(extra + 1) / summary.entropy

        return jaxce.custom_loss(
            formula, logits, jnp.array([0, 1, 9, -1]), rows=extra, where=mask, entropy=True, reduction="sum"
        )

    value, gradients = unoptimized.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(2.0, hidden, kernel, extra)
    expected, wanted = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(
        2.0, jnp.ones((4, 3)), kernel, jnp.where(mask, 1.0, 0.5)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(wanted))
    if recompute is None:  # hidden · kernel outside has a NaN of its own
        gradients, wanted = gradients[::3], wanted[::3]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gradients, wanted)


def test_a_wrong_label_is_loud_in_its_row_alone():
    losses = jaxce.custom_loss(
        lambda summary: summary.nll**2, jnp.zeros((3, 4)), jnp.array([0, 7, 1]), reduction="none"
    )
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])


def test_what_is_beside_the_loss_has_no_derivative():
    def aux(logits):
        return jaxce.custom_loss(lambda summary: (summary.nll, summary.log_z), logits, 0, has_aux=True)[1]

    np.testing.assert_array_equal(jax.grad(aux)(jnp.arange(3.0)), np.zeros(3))


def test_a_formula_may_be_a_pytree_and_may_change_what_it_closes_over():
    logits, targets = jnp.arange(6.0).reshape(2, 3), jnp.array([0, 1])

    def scaled(scale, summary):
        return scale * summary.nll

    def loss(scale):
        return jaxce.custom_loss(jax.tree_util.Partial(scaled, scale), logits, targets)

    expected = float(jaxce.cross_entropy(logits, targets))
    assert float(loss(3.0)) == pytest.approx(3 * expected)
    assert float(jax.grad(loss)(3.0)) == pytest.approx(expected)
    scales = {"scale": 1.0}

    def formula(summary):
        return scales["scale"] * summary.nll

    for scales["scale"] in (1.0, 2.0):
        assert float(jaxce.custom_loss(formula, logits, targets)) == pytest.approx(scales["scale"] * expected)


WAYS = ["types", "names", "shard_map"]
HEADS = [None, True, False]
MESHES = [(way, recompute) for way in WAYS for recompute in HEADS]


@pytest.mark.parametrize(("way", "recompute"), daily(MESHES, [("types", True), ("names", False), ("shard_map", False)]))
def test_over_a_mesh(way, recompute):
    """2 × 4 devices, rows along one axis and classes along the other, with a setting that is closed over."""
    kind = jax.sharding.AxisType.Explicit if way == "types" else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    hidden, kernel = (np.float32(RNG.normal(size=shape)) for shape in ((4, 3), (3, 8)))
    targets, extra = np.array([0, 5, 7, 2]), np.float32(RNG.normal(size=4))
    names = {} if way == "types" else {"class_axis_name": "model", "batch_axis_name": "data"}

    def loss(scale, hidden, kernel, targets, extra, **names):
        logits = hidden @ kernel if recompute is None else jaxce.LinearLogits(hidden, kernel, recompute=recompute)

        def formula(summary, extra):
            aux = {"hits": summary.argmax == 5, "z": summary.log_z}
            return extra * summary.nll + scale * summary.entropy, aux

        return jaxce.custom_loss(
            formula, logits, targets, rows=extra, entropy=True, argmax=True, has_aux=True, reduction="mean", **names
        )

    def everything(*arguments, **names):
        return jax.value_and_grad(loss, argnums=(0, 1, 2, 4), has_aux=True)(*arguments, **names)

    specs = P(), P("data"), P(None, "model"), P("data"), P("data")
    arguments = jnp.float32(0.5), hidden, kernel, targets, extra
    expected = unoptimized.jit(everything)(*arguments)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arguments, specs, strict=True)
        ]
        function = partial(everything, **names)
        if way == "shard_map":
            out = (P(), {"hits": P(), "z": P()}), (specs[0], specs[1], specs[2], specs[4])
            function = jax.shard_map(function, in_specs=specs, out_specs=out)
        results = unoptimized.jit(function)(*placed)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), jax.device_get(results), expected)


ERRORS = {
    "entropy": (
        lambda summary: summary.entropy,
        {},
        ValueError,
        "`formula` reads `summary.entropy`, which is only there for who asks: pass entropy=True.",
    ),
    "argmax": (
        lambda summary: summary.argmax,
        {},
        ValueError,
        "`formula` reads `summary.argmax`, which is only there for who asks: pass argmax=True.",
    ),
    "spread": (
        lambda summary: summary.spread,
        {},
        ValueError,
        "`formula` reads `summary.spread`, which is only there for who asks: pass class_vector.",
    ),
    "rows closed over": (
        lambda summary: summary.nll * jnp.ones(2),
        {},
        TypeError,
        "`formula` must return one number for a row, and the loss is an array of shape (2,) and dtype float32. It sees "
        "one row: what there is of every row goes into `rows`, and comes one by one.",
    ),
    "no pair": (
        lambda summary: summary.nll,
        {"has_aux": True},
        TypeError,
        "`formula` must return a pair, (loss, aux), with has_aux=True; got an array of shape () and dtype float32.",
    ),
    "no function": (3, {}, TypeError, "`formula` must be a function of a summary; got 3."),
    "rows": (
        lambda summary, rows: summary.nll,
        {"rows": {"a": np.ones(3)}},
        ValueError,
        "`rows['a']` must have the shape of the losses, (2,); got (3,). Nothing is broadcast.",
    ),
    "entropy=1": (
        lambda summary: summary.nll,
        {"entropy": 1},
        TypeError,
        "`entropy` must be True or False, known when the function is traced; got 1.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    formula, options, kind, message = ERRORS[name]
    with pytest.raises(kind) as error:
        jaxce.custom_loss(formula, jnp.zeros((2, 3)), np.array([0, 1]), **options)
    assert str(error.value) == message
