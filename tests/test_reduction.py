"""Reductions, and means that come in parts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import daily

import jaxce

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(12, 5)))
LABELS = jnp.asarray(RNG.integers(0, 5, 12))
WEIGHTS = jnp.asarray(RNG.uniform(0.5, 2, 12))
CLASS_WEIGHTS = jnp.asarray(RNG.uniform(0.5, 2, 5))
MASK = jnp.asarray(RNG.uniform(size=12) < 0.6)


def _loss(rows, reduction):
    return lambda logits: jaxce.cross_entropy(
        logits[rows],
        LABELS[rows],
        weights=WEIGHTS[rows],
        class_weights=CLASS_WEIGHTS,
        where=MASK[rows],
        label_smoothing=0.1,
        reduction=reduction,
    )


def test_reductions_are_what_they_say():
    losses = _loss(slice(None), "none")(LOGITS)
    share = np.where(MASK, WEIGHTS * CLASS_WEIGHTS[LABELS], 0)
    assert losses.shape == (12,)
    np.testing.assert_allclose(_loss(slice(None), "sum")(LOGITS), losses.sum(), rtol=1e-6)
    np.testing.assert_allclose(_loss(slice(None), "mean")(LOGITS), losses.sum() / share.sum(), rtol=1e-6)
    parts = _loss(slice(None), "parts")(LOGITS)
    np.testing.assert_allclose([parts.total, parts.weight], [losses.sum(), share.sum()], rtol=1e-6)


def test_class_weights_of_distributions_do_not_divide():
    targets = jax.nn.one_hot(LABELS, 5)
    by_label = jaxce.cross_entropy(LOGITS, LABELS, class_weights=CLASS_WEIGHTS, reduction="parts")
    by_distribution = jaxce.cross_entropy(LOGITS, targets, class_weights=CLASS_WEIGHTS, reduction="parts")
    np.testing.assert_allclose(by_label.total, by_distribution.total, rtol=1e-6)
    assert by_distribution.weight == 12
    np.testing.assert_allclose(by_label.weight, CLASS_WEIGHTS[LABELS].sum(), rtol=1e-6)


SPLITS = {"whole": [12], "in two": [5, 7], "in three": [1, 4, 7], "beside nothing": [3, 0, 9]}


@pytest.mark.parametrize("split", daily(SPLITS, ["in three", "beside nothing"]))
def test_parts_add_up_to_the_whole(split, x64):
    edges = np.cumsum([0, *SPLITS[split]])
    slices = [slice(a, b) for a, b in itertools.pairwise(edges)]

    def accumulated(logits):
        return sum(_loss(rows, "parts")(logits) for rows in slices).mean()

    logits = LOGITS.astype(jnp.float64)
    whole = jax.jit(jax.value_and_grad(_loss(slice(None), "mean")))(logits)
    for result, expected in zip(jax.jit(jax.value_and_grad(accumulated))(logits), whole, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-15)


def test_parts_through_scan_and_psum():
    def step(parts, batch):
        logits, labels, mask = batch
        return parts + jaxce.cross_entropy(logits, labels, where=mask, reduction="parts"), None

    batches = (LOGITS.reshape(4, 3, 5), LABELS.reshape(4, 3), MASK.reshape(4, 3))
    start = jaxce.MeanParts(jnp.zeros(()), jnp.zeros(()))
    scanned, _ = jax.lax.scan(step, start, batches)
    whole = jaxce.cross_entropy(LOGITS, LABELS, where=MASK)
    np.testing.assert_allclose(scanned.mean(), whole, rtol=1e-6)

    def on_device(logits, labels, mask):
        return jaxce.cross_entropy(logits, labels, where=mask, reduction="parts").psum("data").mean()

    means = jax.vmap(on_device, axis_name="data")(*batches)
    np.testing.assert_allclose(means, jnp.full(4, whole), rtol=1e-6)


def test_accumulated_gradients_of_nothing_are_zero():
    gradient = jax.grad(lambda z: jaxce.cross_entropy(z, LABELS, where=jnp.zeros(12, bool), reduction="parts").total)
    weight = jnp.zeros(())
    np.testing.assert_array_equal(jaxce.MeanParts(gradient(LOGITS), weight).mean(), 0)


def test_mean_parts_is_a_pytree_that_adds():
    parts = jaxce.MeanParts(jnp.float32(3), jnp.float32(2))
    assert len(jax.tree.leaves(parts)) == 2
    assert sum([parts, parts]).mean() == 1.5
    assert jaxce.MeanParts(jnp.float32(0), jnp.float32(0)).mean() == 0
    with pytest.raises(TypeError):
        parts + 1
    with pytest.raises(TypeError):
        1 + parts


def test_reduce_losses_of_any_shape():
    losses = jnp.arange(6.0).reshape(2, 3)
    weights = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]])
    where = jnp.array([[True, True, False], [True, True, True]])
    expected = np.where(where, weights, 0).astype(np.float32)
    np.testing.assert_allclose(
        jaxce.reduce_losses(losses, weights, where=where), (losses * expected).sum() / expected.sum()
    )
    np.testing.assert_allclose(
        jaxce.reduce_losses(losses, weights, where=where, reduction="none"), losses * expected, rtol=1e-7
    )


def test_weight_two_is_the_row_twice(x64):
    twice = jnp.concatenate([LOGITS, LOGITS[:1]]), jnp.concatenate([LABELS, LABELS[:1]])
    weights = jnp.ones(12).at[0].set(2)
    np.testing.assert_allclose(
        jaxce.cross_entropy(LOGITS, LABELS, weights=weights), jaxce.cross_entropy(*twice), rtol=1e-6
    )
