"""The recipes of post-training are the plain formulas on held logits; what they hold is a table of `benchmarks`."""

import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import daily

import jaxce
from benchmarks import post_training
from benchmarks.post_training import METHODS, Size

METHOD = {method.name: method for method in METHODS}
SIZE = Size(4, 5, 3, 26, jnp.float64)


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Recipes are a user's code, which may promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _array(rng, struct):
    if struct.dtype == bool:
        return rng.random(struct.shape) < 0.7
    if struct.dtype == jnp.int32:
        return rng.integers(0, SIZE.classes if len(struct.shape) > 1 else 2, struct.shape, np.int32)
    return 0.7 * rng.normal(size=struct.shape) if struct.shape else np.float64(0.5)


def _step(method, loss):
    return unoptimized.jit(jax.value_and_grad(loss, method.argnums, has_aux=True) if method.argnums else loss)


@cache
def _expected(name):
    method = METHOD[name]
    rng = np.random.default_rng(len(name))
    arguments = jax.tree.map(partial(_array, rng), method.arguments(SIZE))
    return arguments, jax.tree.map(np.asarray, _step(method, method.held)(*arguments))


CASES = [(name, recompute) for name in METHOD for recompute in (True, False)]
DAILY = []


@pytest.mark.parametrize(("name", "recompute"), daily(CASES, DAILY))
def test_recipe_is_the_plain_formula(name, recompute, x64):
    """Value, gradients, and what is logged."""
    arguments, expected = _expected(name)
    loss = partial(METHOD[name].lazy, block_bytes=1000, recompute=recompute)
    results = _step(METHOD[name], loss)(*arguments)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), results, expected)


def test_micro_batches_are_the_whole_batch(x64):
    """Of fine-tuning, where other numbers of tokens count in each."""
    (hidden, kernel, tokens, _), _ = _expected("fine-tuning")
    mask = np.arange(SIZE.length) < np.array([[5], [1], [2], [4]])

    def whole(kernel):
        return post_training.held_fine_tuning(hidden, kernel, tokens, mask)

    (loss, expected), gradient = unoptimized.jit(jax.value_and_grad(whole, has_aux=True))(kernel)
    batches = [array.reshape(2, 2, *array.shape[1:]) for array in (hidden, tokens, mask)]
    summed, logged = post_training.recipe("fine_tuning")["step"](kernel, batches)
    np.testing.assert_allclose(summed, gradient, rtol=1e-10, atol=1e-14)
    expected |= {"loss": loss, "perplexity": jnp.exp(expected["nll"])}
    assert logged.keys() == expected.keys()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), logged, expected)


def test_contrastive_loss_over_devices_holds_no_square(rng):
    pairs = 1024
    arguments = [np.float32(rng.normal(size=(pairs, 8))) for _ in range(2)] + [np.float32(3)]
    expected = _step(METHOD["contrastive"], post_training.held_contrastive)(*arguments)
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, NamedSharding(mesh, P(*["data"][: array.ndim]))) for array in arguments[:2]
        ] + arguments[2:]
        step = jax.jit(post_training.recipe("contrastive")["step"]).lower(*placed).compile()
        loss, gradients = jax.device_get(step(*placed))
    np.testing.assert_allclose(loss, expected[0][0], rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), gradients, expected[1])
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[(\d+(?:,\d+)*)\]", step.as_text())}
    assert (pairs // 8, 8) in shapes
    assert max(int(np.prod(shape)) for shape in shapes) < pairs**2 // 8


FORMULAS = {"nll": lambda summary: summary.nll, "entropy": lambda summary: summary.entropy}


@pytest.mark.parametrize(("name", "recompute"), [(name, way) for name in FORMULAS for way in (True, False)])
@pytest.mark.thorough
def test_bfloat16_is_as_exact_as_float32_logits_that_are_held(name, recompute, x64, rng):
    """Of a large vocabulary: the losses by the rows, and the gradients of their mean."""
    dtype, classes = jnp.bfloat16, 152064
    hidden = jnp.asarray(rng.normal(size=(8, 64)), dtype)
    kernel = jnp.asarray(rng.normal(size=(64, classes)) / 4, dtype)
    labels = jnp.asarray(rng.integers(0, classes, 8))

    def lazy(hidden, kernel, reduction="mean"):
        logits = jaxce.LinearLogits(hidden, kernel, recompute=recompute, block_bytes=2**20)
        return jaxce.custom_loss(FORMULAS[name], logits, labels, entropy=True, reduction=reduction)

    def plain(logits):
        log_p = jax.nn.log_softmax(logits)
        if name == "nll":
            return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def held(hidden, kernel, reduction="mean"):
        losses = plain(jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32))
        return losses.mean() if reduction == "mean" else losses

    def exact(hidden, kernel, reduction="mean"):
        losses = plain(hidden @ kernel)
        return losses.mean() if reduction == "mean" else losses

    def numbers(loss, *arguments):
        return [loss(*arguments, "none"), *jax.grad(loss, argnums=(0, 1))(*arguments)]

    truth = jax.jit(partial(numbers, exact))(hidden.astype(jnp.float64), kernel.astype(jnp.float64))
    ours, theirs = (jax.jit(partial(numbers, loss))(hidden, kernel) for loss in (lazy, held))
    for what, table, *both, true in zip(
        ("rows", "hidden", "kernel"), (1e-6, *[float(jnp.finfo(dtype).eps)] * 2), ours, theirs, truth, strict=True
    ):
        our_error, their_error = (
            float(jnp.linalg.norm(array.astype(jnp.float64) - true) / jnp.linalg.norm(true)) for array in both
        )
        print(f"{name}, recompute={recompute}, {what}: {our_error:.1e}, held {their_error:.1e}")
        assert our_error <= their_error + table


@pytest.mark.thorough
def test_the_table_is_printed(monkeypatch):
    """Of tiny arrays, on the CPU alone."""
    monkeypatch.setattr(post_training, "DEVICES", {"CPU": post_training.DEVICES["CPU"]})
    lines = post_training.report(smoke=True).splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| CPU")]
    assert [row[1] for row in rows] == list(METHOD)
    assert all(re.fullmatch(r"[\d.]+ (B|kB|MB)", cell.strip(" |")) for row in rows for cell in row[3:])


def test_documented_rows_are_results():
    root = Path(__file__).parent.parent
    results = (root / "benchmarks" / "results" / "post_training.md").read_text().splitlines()
    page = (root / "docs" / "post_training.md").read_text().partition("## Memory")[2].partition("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 16
    assert set(rows) <= set(results)
