"""What a CPU makes of many numbers a few at a time is what it makes of a few at once: all modes, and second orders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
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

    @unoptimized.jit
    def one_by_one(logits, targets):
        masks = jnp.asarray(LONG[kind].get("where", np.ones(ROWS, bool)))
        return _modes(lambda z, t: jnp.sum(jax.vmap(of_row)(z, t, masks)), logits, targets)

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


def _elements(rng, rows=3):
    logits = jnp.asarray(rng.normal(0, 4, (rows, 33333)), jnp.float32).at[0, :2].set([jnp.inf, 0])
    return logits, jnp.asarray(rng.integers(0, 2, logits.shape), jnp.float32).at[0, 0].set(1)


def _modes_of_elements(loss, *, by_rows=False):
    """By rows, none of them has many elements."""

    def total(logits, targets):
        return jnp.sum(jax.vmap(loss)(logits, targets)) if by_rows else loss(logits, targets)

    return lambda logits, targets: _modes(total, logits, targets)


BINARY = {
    "cross entropy": lambda z, t: jaxce.binary_cross_entropy(z, t, reduction="sum"),
    "focal": lambda z, t: jaxce.binary_focal_loss(z, t, reduction="sum"),
}


@pytest.mark.parametrize("name", daily(BINARY, ["focal"]))
def test_many_elements(name, rng):
    arrays = _elements(rng)
    results = jax.jit(_modes_of_elements(BINARY[name]))(*arrays)
    one_by_one = unoptimized.jit(_modes_of_elements(BINARY[name], by_rows=True))(*arrays)
    _compare(results, one_by_one, rtol=2e-5, atol=1e-6)


def _long_rows(rng):
    return jnp.asarray(rng.normal(0, 2, (ROWS, CLASSES)), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, ROWS))


LARGE = {
    "elements": (BINARY["cross entropy"], lambda rng: _elements(rng, 6)),
    "classes": (lambda z, t: jaxce.cross_entropy(z, t, label_smoothing=0.1, reduction="sum"), _long_rows),
}
WAYS = [(name, way) for name in LARGE for way in ("Explicit", "Auto", "shard_map")]


@pytest.mark.parametrize(("name", "way"), daily(WAYS, [("elements", "Explicit")]))
def test_rows_over_a_mesh(name, way, rng):
    """Each device cuts its own in `shard_map`; where the types or the partitioner have them, they are not cut."""
    loss, arrays_of = LARGE[name]
    arrays, spec = arrays_of(rng), P("data")
    expected = unoptimized.jit(jax.value_and_grad(loss))(*arrays)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit if way == "Explicit" else AxisType.Auto,))

    def step(*arrays):
        value, gradient = jax.value_and_grad(loss)(*arrays)
        return jax.lax.psum(value, "data") if way == "shard_map" else value, gradient

    if way == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(spec, spec), out_specs=(P(), spec))
    with jax.set_mesh(mesh):
        results = jax.jit(step)(*(jax.device_put(array, NamedSharding(mesh, spec)) for array in arrays))
    _compare(results, expected, rtol=1e-5, atol=1e-6)
    assert results[1].sharding.spec[0] == "data"
