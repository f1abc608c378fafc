"""Entropy and argmax of a summary: digits, edges and derivatives, of rows that are held and of blocks that are not."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import plain
import pytest
import unoptimized

import jaxce
from jaxce._formula import reduce_formula
from jaxce._inputs import check_classes
from jaxce._summary import summarize_rows

N, D, V = 4, 3, 5
RNG = np.random.default_rng(7)
ARRAYS = {"hidden": RNG.normal(size=(N, D)), "kernel": RNG.normal(size=(D, V)), "bias": RNG.normal(size=V)}
ARRAYS |= {"softcap": np.array(3.0), "scale": np.array(0.7)}
LABELS, DISTRIBUTION = np.array([4, 0, 2, 2]), RNG.uniform(0.1, 1, (N, V))
OTHERS = np.array([0.0, -0.3, -1.1, -4.0, -0.7, -9.0])
ASKED = {"entropy": True, "argmax": True}


class _Formula(NamedTuple):
    """The nll less the entropy, of rows that are right with another weight."""

    scale: object

    def __call__(self, rows):
        summary = summarize_rows(rows, **ASKED)
        weights = 1 + summary.argmax.astype(summary.nll.dtype)
        return weights * (summary.nll - jnp.asarray(self.scale, rows.dtype) * summary.entropy)


def _lazy(arrays, targets, size, recompute):
    """The mean of the formula, of lazy logits in blocks."""
    head = {name: array for name, array in arrays.items() if name != "scale"}
    how = {"block_bytes": size * 4 * (N if recompute else V), "recompute": recompute}
    inputs = check_classes(jaxce.LinearLogits(**head, **how), targets, may_be_lazy=True)
    return reduce_formula(_Formula(arrays["scale"]), inputs, reduction="mean")


def _dense(arrays, targets):
    logits = arrays["hidden"] @ arrays["kernel"] + arrays["bias"][None]
    logits = arrays["softcap"] * jnp.tanh(logits / arrays["softcap"])
    weights = 1 + jnp.argmax(logits, -1).astype(logits.dtype)
    return jnp.mean(weights * (plain.cross_entropy(logits, targets) - arrays["scale"] * plain.entropy(logits)))


def _modes(loss, arrays, direction):
    """Value, gradient, a forward derivative of both, and the gradient of two batches."""
    both = jax.value_and_grad(loss)
    two = jnp.stack([arrays["hidden"], 1.1 * arrays["hidden"]])
    batches = jax.vmap(lambda hidden: jax.grad(loss)(arrays | {"hidden": hidden}))(two)
    return jax.jvp(both, (arrays,), (direction,)), batches


@pytest.mark.parametrize("targets", [LABELS, pytest.param(DISTRIBUTION, marks=pytest.mark.thorough)])
def test_both_ways_of_lazy_logits_have_the_plain_entropy(targets, x64, request):
    arrays = {name: jnp.asarray(array) for name, array in ARRAYS.items()}
    direction = jax.tree.map(lambda array: jnp.cos(1 + array), arrays)
    is_thorough = request.config.getoption("--thorough")
    sizes = [(3, True), (3, False)] if not is_thorough else [
        (size, recompute) for size in (1, 3, V - 1, V, V + 1) for recompute in (True, False)
    ]  # fmt: skip

    @unoptimized.jit
    def everything(arrays, direction):
        losses = [functools.partial(_lazy, size=size, recompute=recompute) for size, recompute in sizes]
        return [_modes(lambda a, f=f: f(a, jnp.asarray(targets)), arrays, direction) for f in (*losses, _dense)]

    *results, expected = everything(arrays, direction)
    for result in results:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), result, expected)


@functools.cache
def _entropy_and_gradient(block):
    """Of rows, and of the same rows as a head whose kernel they are."""

    @jax.jit
    def both(rows, targets):
        def of_rows(rows):
            if block is not None:
                identity = jnp.eye(len(rows), dtype=rows.dtype)
                rows = jaxce.LinearLogits(identity, rows, block_bytes=4 * len(rows) * block)
            return jaxce.summarize(rows, targets, **ASKED)

        summary, pullback = jax.vjp(lambda rows: of_rows(rows).entropy, rows)
        return summary, pullback(jnp.ones_like(summary))[0], of_rows(rows).argmax

    return both


@pytest.mark.parametrize("target", ["ahead", "behind", "distribution"])
@pytest.mark.parametrize("block", [None, 3])
def test_entropy_of_confident_rows(block, target):
    leads = np.concatenate([np.linspace(0, 70, 29), -np.logspace(-1, 4, 5)])
    for offset in (0.0, 1e4):
        rows = np.float32(np.stack([np.insert(OTHERS, 3, lead) for lead in leads]) + offset)
        kinds = {"ahead": np.full(len(rows), 3), "behind": np.full(len(rows), 5)}
        targets = kinds.get(target, np.full(rows.shape, 0.2, np.float32))
        entropies, gradients, argmax = _entropy_and_gradient(block)(rows, targets)
        np.testing.assert_array_equal(argmax, rows.argmax(-1))
        for row, entropy, gradient in zip(rows, np.asarray(entropies), np.asarray(gradients), strict=True):
            value, slopes, sizes = oracle.entropy(row)
            assert oracle.relative_error(entropy, value) <= 2e-6
            for c, (slope, size) in enumerate(zip(slopes, sizes, strict=True)):
                # A slope is a difference only where a class is about as far below the maximum as all are in the mean.
                bound = (1e-6 + 1.2e-7 * float(row.max() - row[c])) * size
                assert abs(float(gradient[c]) - slope) <= max(bound, np.finfo(np.float32).tiny)


HOSTILE = {
    "ties": [1.0, 3, 3, 0, 3],
    "nothing but ties": [2.0] * 5,
    "minus infinity": [-np.inf, 0, -np.inf, 1, -np.inf],
    "one class that is not left out": [-np.inf, -np.inf, -2.0, -np.inf, -np.inf],
    "nothing": [-np.inf] * 5,
    "NaN": [0.0, 1, np.nan, 5, np.nan],
    "infinity": [0.0, np.inf, np.nan, 5, np.inf],
    "infinities": [0.0, 1, np.inf, 5, np.inf],
    "the smallest number": [-np.inf, -np.inf, np.finfo(np.float32).min, -np.inf, np.finfo(np.float32).min],
    "far apart": [1e38, -3e38, 3e38, 0, -1e38],
}


@functools.cache
def _of_hostile(block):
    """Of one row; of a head it is the bias, so that no product is NaN."""

    @jax.jit
    def everything(row, target, where):
        def entropy(row):
            logits = row[None]
            if block is not None:
                logits = jaxce.LinearLogits(jnp.zeros((1, 2)), jnp.zeros((2, 5)), bias=row, block_bytes=4 * block)
            summary = jaxce.summarize(logits, target[None], where=where[None], **ASKED)
            return summary.entropy[0], summary.argmax[0]

        pushed = jax.jvp(jax.grad(lambda row: entropy(row)[0]), (row,), (jnp.ones_like(row),))[1]
        return jax.value_and_grad(entropy, has_aux=True)(row), pushed

    return everything


@pytest.mark.parametrize("block", [None, 2, *(pytest.param(size, marks=pytest.mark.thorough) for size in (1, 3, 5))])
def test_entropy_and_argmax_of_hostile_rows(block):
    for target in (jnp.array(2), jnp.full(5, 0.2)):
        for name, row in HOSTILE.items():
            row = np.array(row, np.float32)
            with np.errstate(invalid="ignore"):
                depth = row.max().astype(float) - row
                p = np.exp(-depth) / np.exp(-depth).sum()
            exact = -np.sum(p * np.log(np.where(p == 0, 1, p)))
            ((entropy, argmax), gradient), pushed = _of_hostile(block)(row, target, jnp.array(True))
            assert argmax.dtype == jnp.int32
            assert argmax == np.argmax(row), name
            np.testing.assert_allclose(entropy, exact, rtol=2e-7, err_msg=name)
            assert np.isfinite(gradient).all() == np.isfinite(pushed).all() == np.isfinite(exact), name
            assert not gradient[np.isneginf(row)].any() or np.isnan(exact), name
            ((entropy, argmax), gradient), pushed = _of_hostile(block)(row, target, jnp.array(False))
            assert (float(entropy), int(argmax)) == (0, 0)
            assert not gradient.any()
            assert not pushed.any()


def test_one_class_has_no_entropy(rng):
    logits = jnp.asarray(rng.normal(0, 30, (64, 1)), jnp.float32)

    def entropy(logits, scale):
        return jaxce.summarize(logits * scale / 3, jnp.zeros(64, int), **ASKED).entropy

    entropies, gradient = jax.jit(lambda *a: (entropy(*a), jax.grad(lambda *a: entropy(*a).sum())(*a)))(logits, 0.7)
    assert not entropies.any()
    assert not gradient.any()


def test_entropy_is_never_negative(rng):
    """Of logits that every fusion computes anew, too."""
    logits = jnp.asarray(rng.normal(0, 100, (4096, 3)), jnp.float32)
    for targets in (jnp.zeros(4096, int), jnp.argmax(logits, -1), jnp.zeros((4096, 3))):
        entropies = jax.jit(lambda z, t=targets: jaxce.summarize(z / 3, t, entropy=True).entropy)(logits)
        assert entropies.min() >= 0


def test_padding_and_ignored_rows():
    """Padding is never the largest, and an ignored row has the first class."""
    logits = jnp.asarray(RNG.normal(size=(N, V)), jnp.float32).at[:, 3:].set(jnp.nan)
    labels = jnp.array([0, -1, 2, 1])
    summary = jaxce.summarize(logits, labels, ignore_index=-1, num_classes=3, **ASKED)
    counts = labels >= 0
    np.testing.assert_array_equal(summary.argmax, np.where(counts, np.argmax(logits[:, :3], -1), 0))
    np.testing.assert_allclose(summary.entropy, np.where(counts, plain.entropy(logits[:, :3]), 0), rtol=1e-6)


def test_what_is_not_asked_for_is_not_computed():
    def operations(**asked):
        text = (
            jax.jit(functools.partial(jaxce.summarize, **asked)).lower(jnp.zeros((3, 4)), jnp.zeros(3, int)).as_text()
        )
        return text.count("stablehlo.exponential"), text.count("stablehlo.reduce")

    (exponentials, sums), with_argmax, with_entropy = operations(), operations(argmax=True), operations(entropy=True)
    assert with_argmax == (exponentials, sums + 1)
    assert with_entropy > (exponentials, sums)
    summary = jaxce.summarize(jnp.zeros((3, 4)), jnp.zeros(3, int))
    assert summary.entropy is None
    assert summary.argmax is None


@pytest.mark.parametrize("target", ["labels", "distributions"])
def test_entropy_needs_no_second_array_over_the_classes(target):
    rows, classes = 1024, 32768
    logits = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
    targets = jax.ShapeDtypeStruct((rows,), jnp.int32) if target == "labels" else logits

    def loss(logits, targets):
        summary = jaxce.summarize(logits, targets, **ASKED)
        return jnp.mean(summary.nll - 0.1 * summary.entropy), jnp.mean(summary.argmax == 3)

    for function in (loss, jax.value_and_grad(loss, has_aux=True)):
        compiled = jax.jit(function).lower(logits, targets).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 0.01 * rows * classes * 4
