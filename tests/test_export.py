"""Losses are exported for every platform with sizes that are not known yet, and agree when they come back."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from marks import daily

import jaxce

F = jaxce.torch
RNG = np.random.default_rng(11)
ROWS, CLASSES = 6, 5
ASKED = {"entropy": True, "argmax": True}


def _listed(labels, distributions):
    """The label and another class of every row; a slice of two of the classes would have a symbolic size."""
    masses = jnp.stack([distributions[:, 0], distributions[:, 1]], -1)
    return jaxce.SparseTargets(jnp.stack([labels, (labels + 1) % 3], -1), masses)


# Logits z, labels y, distributions q, class weights w, row weights v and the mask of rows m of symbolic sizes.
LOSSES = {
    "labels": lambda z, y, q, w, v, m: jaxce.cross_entropy(
        z, y, class_weights=w, weights=v, where=m, label_smoothing=0.1, z_loss=0.1
    ),
    "ignored labels": lambda z, y, q, w, v, m: jaxce.cross_entropy(z, y, ignore_index=3, reduction="none"),
    "distributions": lambda z, y, q, w, v, m: jaxce.cross_entropy(
        z, q, class_weights=w, weights=v, where=m, label_smoothing=0.1, z_loss=0.1
    ),
    "listed": lambda z, y, q, w, v, m: jaxce.cross_entropy(z, _listed(y, q), class_weights=w, weights=v, where=m),
    "classes first": lambda z, y, q, w, v, m: jaxce.cross_entropy(z.T, y, axis=0),
    "padding": lambda z, y, q, w, v, m: jaxce.cross_entropy(z, y % 4, num_classes=4),
    "NumPy labels": lambda z, y, q, w, v, m: jaxce.cross_entropy(z[jnp.arange(2)], np.array([1, 3])),
    "focal": lambda z, y, q, w, v, m: jaxce.focal_loss(z, y, class_weights=w, weights=v, where=m),
    "poly": lambda z, y, q, w, v, m: jaxce.poly_loss(z, y, class_weights=w, weights=v, where=m),
    "nll": lambda z, y, q, w, v, m: jaxce.nll_loss(z, y, class_weights=w, weights=v, where=m),
    "margin": lambda z, y, q, w, v, m: jaxce.multi_margin_loss(z, y, class_weights=w, weights=v, where=m),
    "distillation": lambda z, y, q, w, v, m: jaxce.distillation_loss(z, q, temperature=2.0, weights=v, where=m),
    "jensen_shannon": lambda z, y, q, w, v, m: jaxce.distillation_loss(z, q, divergence="jensen_shannon", where=m),
    "binary": lambda z, y, q, w, v, m: jaxce.binary_cross_entropy(z, q, pos_weight=w, weights=q, where=q > 0.1),
    "binary focal": lambda z, y, q, w, v, m: jaxce.binary_focal_loss(z, q, alpha=0.2),
    "squared error": lambda z, y, q, w, v, m: jaxce.mse_loss(z, q, weights=q),
    "absolute error": lambda z, y, q, w, v, m: jaxce.l1_loss(z, q),
    "own losses": lambda z, y, q, w, v, m: jaxce.reduce_losses(z, q),
    "summary": lambda z, y, q, w, v, m: jaxce.summarize(z, y, class_vector=w, where=m, **ASKED),
    "expected cost": lambda z, y, q, w, v, m: jaxce.imbalance.expected_cost(z, y, q.T @ q, where=m),
    "weights of counts": lambda z, y, q, w, v, m: jaxce.imbalance.class_weights(w, scheme="median_frequency"),
    "adjustment": lambda z, y, q, w, v, m: jaxce.imbalance.logit_adjustment(w),
    "counts": lambda z, y, q, w, v, m: jaxce.imbalance.class_counts(y, CLASSES, where=m),
    "PyTorch's labels": lambda z, y, q, w, v, m: F.cross_entropy(z, y, w, label_smoothing=0.1),
    "PyTorch's binary": lambda z, y, q, w, v, m: F.binary_cross_entropy_with_logits(z, q, v[:, None], pos_weight=w),
    "PyTorch's KL": lambda z, y, q, w, v, m: F.kl_div(z, q, reduction="batchmean"),
}
DAILY = ["labels", "NumPy labels", "distillation", "binary"]


def _total(results):
    return sum(jnp.sum(result.astype(jnp.float32)) for result in jax.tree.leaves(results))


def _arrays():
    masses = RNG.uniform(0.1, 1, (ROWS, CLASSES)).astype(np.float32)
    labels = RNG.integers(0, CLASSES, ROWS, np.int32)
    return [
        RNG.normal(size=(ROWS, CLASSES)).astype(np.float32),
        labels,
        masses,
        np.linspace(0.5, 2, CLASSES, dtype=np.float32),
        np.linspace(0.5, 2, ROWS, dtype=np.float32),
        np.arange(ROWS) != 2,
    ]


@pytest.mark.parametrize("name", daily(LOSSES, DAILY))
def test_rows_and_classes_may_be_symbolic(name):
    def everything(*arrays):
        def total(z):
            return _total(LOSSES[name](z, *arrays[1:]))

        return [*jax.tree.leaves(LOSSES[name](*arrays)), jax.grad(total)(arrays[0])]

    symbols = dict(zip((ROWS, CLASSES), jax.export.symbolic_shape("rows, classes"), strict=True))
    arrays = _arrays()
    shapes = [jax.ShapeDtypeStruct([symbols[length] for length in array.shape], array.dtype) for array in arrays]
    exported = jax.export.export(jax.jit(everything), platforms=("cpu", "cuda", "tpu"))(*shapes)
    again = jax.export.deserialize(exported.serialize())
    results, expected = unoptimized.jit(again.call)(*arrays), unoptimized.jit(everything)(*arrays)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-6, atol=1e-7)


# The same of lazy logits, of which features are symbolic too: hidden h, kernel k, bias b.
LAZY_LOSSES = {
    "labels": lambda z, y, q, w, v, m: jaxce.cross_entropy(z, y, class_weights=w, weights=v, where=m, z_loss=0.1),
    "distributions": lambda z, y, q, w, v, m: jaxce.cross_entropy(z, q, class_weights=w, label_smoothing=0.1),
    "listed": lambda z, y, q, w, v, m: jaxce.cross_entropy(z, _listed(y, q), class_weights=w, where=m),
    "focal": lambda z, y, q, w, v, m: jaxce.focal_loss(z, y, ignore_index=3),
    "distillation": lambda z, y, q, w, v, m: jaxce.distillation_loss(z, q, temperature=2.0, where=m),
    "two heads": lambda z, y, q, w, v, m: jaxce.distillation_loss(
        z, dataclasses.replace(z, hidden=z.hidden**2), where=m
    ),
    "jensen_shannon": lambda z, y, q, w, v, m: jaxce.distillation_loss(
        z, dataclasses.replace(z, hidden=z.hidden**2), where=m, divergence="jensen_shannon"
    ),
    "summary": lambda z, y, q, w, v, m: jaxce.summarize(z, q, class_vector=w, where=m, **ASKED),
}
FEATURES = 3
TWO_AND_A_BIT = 4 * ROWS * 2  # bytes: blocks of two classes, the last one of one; or of two rows, the last one of two
CASES = [(name, recompute, TWO_AND_A_BIT) for name in LAZY_LOSSES for recompute in (True, False)]
CASES += [("labels", recompute, size) for recompute in (True, False) for size in (None, 1, 4 * ROWS * CLASSES)]


@pytest.mark.parametrize(
    ("name", "recompute", "block_bytes"),
    daily(CASES, [("labels", True, TWO_AND_A_BIT)]),
)
def test_rows_features_and_classes_of_lazy_logits_may_be_symbolic(name, recompute, block_bytes):
    def everything(hidden, kernel, bias, *arrays):
        def total(head):
            lazy = jaxce.LinearLogits(
                head[0],
                head[1],
                bias=head[2],
                softcap=5.0,
                temperature=arrays[3],  # of the rows
                block_bytes=block_bytes,
                recompute=recompute,
            )
            return _total(LAZY_LOSSES[name](lazy, *arrays))

        head = (hidden, kernel, bias)
        value, gradients = jax.value_and_grad(total)(head)
        return value, gradients, jax.jvp(jax.grad(total), (head,), (head,))[1]

    symbols = dict(zip((ROWS, FEATURES, CLASSES), jax.export.symbolic_shape("rows, features, classes"), strict=True))
    head = [RNG.normal(size=shape).astype(np.float32) for shape in ((ROWS, FEATURES), (FEATURES, CLASSES), (CLASSES,))]
    arrays = [*head, *_arrays()[1:]]
    shapes = [jax.ShapeDtypeStruct([symbols[length] for length in array.shape], array.dtype) for array in arrays]
    exported = jax.export.export(jax.jit(everything), platforms=("cpu", "cuda", "tpu"))(*shapes)
    again = jax.export.deserialize(exported.serialize())
    results, expected = unoptimized.jit(again.call)(*arrays), unoptimized.jit(everything)(*arrays)
    for result, wanted in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-6)
