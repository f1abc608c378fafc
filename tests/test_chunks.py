"""What a CPU makes of many numbers a few at a time is what it makes of a few at once: all modes, and second orders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import daily

import jaxce

ROWS, CLASSES = 4, 40009  # three rows at a time, and one
LONG = {
    "labels": {},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 0.01},
    "mask": {"where": np.arange(ROWS) % 3 != 1},
    "distributions": {},
}
DAILY = [("labels", "bfloat16"), ("mask", "float32"), ("distributions", "float32")]
EVERY = [(kind, dtype) for kind in LONG for dtype in ("float32", "bfloat16")]


def _modes(loss, *arguments):
    """Value, gradient, and along a direction the derivative and, by reverse mode alone, the Hessian's product."""
    direction = jax.random.normal(jax.random.key(3), arguments[0].shape).astype(arguments[0].dtype)

    def of_first(first):
        return loss(first, *arguments[1:])

    value, gradient = jax.value_and_grad(of_first)(arguments[0])
    slope = jax.jvp(of_first, arguments[:1], (direction,))[1]
    product = jax.grad(lambda first: jnp.vdot(jax.grad(of_first)(first), direction))(arguments[0])
    return value, gradient, slope, product


def _compare(some, all_at_once, rtol, atol):
    for part, expected in zip(some, all_at_once, strict=True):
        np.testing.assert_allclose(np.asarray(part, np.float64), np.asarray(expected, np.float64), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("kind", "dtype"), daily(EVERY, DAILY))
def test_many_classes(kind, dtype, rng):
    logits = jnp.asarray(rng.normal(0, 2, (ROWS, CLASSES)), dtype)
    targets = jnp.asarray(rng.integers(0, CLASSES, ROWS))
    if kind == "distributions":
        targets = jax.nn.softmax(jnp.asarray(rng.normal(0, 2, (ROWS, CLASSES)), jnp.float32))
    if kind == "mask":  # what such rows hold is not read
        logits = logits.at[1].set(jnp.nan)

    @jax.jit
    def modes(logits, targets):
        return _modes(lambda z, t: jaxce.cross_entropy(z, t, reduction="sum", **LONG[kind]), logits, targets)

    def of_row(row, target, mask):
        options = {name: value for name, value in LONG[kind].items() if name != "where"}
        return jaxce.cross_entropy(row[None], target[None], where=mask[None], reduction="sum", **options)

    @jax.jit
    def one_by_one(logits, targets):
        masks = jnp.asarray(LONG[kind].get("where", np.ones(ROWS, bool)))
        return _modes(lambda z, t: sum(map(of_row, z, t, masks)), logits, targets)

    rtol = 1e-5 if dtype == "float32" else 2e-2  # bfloat16 gradients are rounded
    results = modes(logits, targets)
    assert all(bool(jnp.all(jnp.isfinite(result))) for result in results)
    _compare(results, one_by_one(logits, targets), rtol=rtol, atol=rtol * 1e-2)


def test_numbers_of_many_classes(rng):
    logits = jnp.asarray(rng.normal(0, 2, (2, ROWS, CLASSES)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, (2, ROWS)))

    def numbers(logits, labels):
        return jaxce.summarize(logits, labels, entropy=True, argmax=True)

    at_once = jax.jit(jax.vmap(jax.vmap(numbers)))(logits, labels)
    for part, expected in zip(jax.jit(numbers)(logits, labels), at_once, strict=True):
        if part is not None:
            np.testing.assert_allclose(part, expected, rtol=1e-6)


@pytest.mark.parametrize("loss", [jaxce.binary_cross_entropy, jaxce.binary_focal_loss])
def test_many_elements(loss, rng):
    logits = jnp.asarray(rng.normal(0, 4, (3, 33333)), jnp.float32).at[0, :2].set([jnp.inf, 0])
    targets = jnp.asarray(rng.integers(0, 2, logits.shape), jnp.float32).at[0, 0].set(1)

    @jax.jit
    def modes(logits, targets):
        return _modes(lambda z, t: loss(z, t, reduction="sum"), logits, targets)

    @jax.jit
    def one_by_one(logits, targets):
        return _modes(lambda z, t: sum(loss(*row, reduction="sum") for row in zip(z, t, strict=True)), logits, targets)

    _compare(modes(logits, targets), one_by_one(logits, targets), rtol=2e-5, atol=1e-6)
