"""Under checkify a wrong value is an error that names argument, value and position; without it nothing is compiled."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from marks import daily

import jaxce
from jaxce import _eager

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
LABELS = jnp.array([[1, 0, 3], [2, 4, 4]])
MASSES = jnp.full((2, 3, 5), 0.2)
ONES = jnp.ones((2, 3))
HIDDEN, KERNEL = LOGITS, jnp.eye(5)

# A loss of an array, the array, where to put what in it, and what is said of it.
CASES = {
    "label": (
        lambda y, z: jaxce.cross_entropy(z, y),
        LABELS,
        (1, 1),
        9,
        "`targets` must be class indices in [0, 5); got 9 at position [1 1].",
    ),
    "label of a head": (
        lambda y, z: jaxce.linear_cross_entropy(z, KERNEL, y),
        LABELS,
        (0, 2),
        -1,
        "`targets` must be class indices in [0, 5); got -1 at position [0 2].",
    ),
    "weight": (
        lambda w, z: jaxce.focal_loss(z, LABELS, weights=w),
        ONES,
        (0, 1),
        -2,
        "`weights` must be ≥ 0; got -2.0 at position [0 1].",
    ),
    "weight of an element": (
        lambda w, z: jaxce.mse_loss(z[..., 0], ONES, weights=w),
        ONES,
        (1, 2),
        -2,
        "`weights` must be ≥ 0; got -2.0 at position [1 2].",
    ),
    "label that is counted": (
        lambda y, z: jnp.sum(jaxce.imbalance.class_counts(y, 5)) * z[0, 0, 0],
        LABELS,
        (1, 1),
        9,
        "`targets` must be class indices in [0, 5); got 9 at position [1 1].",
    ),
    "weight of a loss": (
        lambda w, z: jaxce.reduce_losses(z[..., 0], w),
        ONES,
        (1, 2),
        -2,
        "`weights` must be ≥ 0; got -2.0 at position [1 2].",
    ),
    "class weight": (
        lambda w, z: jaxce.cross_entropy(z, MASSES, class_weights=w),
        jnp.ones(5),
        (3,),
        -2,
        "`class_weights` must be ≥ 0; got -2.0 at position [3].",
    ),
    "mass": (
        lambda q, z: jaxce.cross_entropy(z, q, axis=1),
        MASSES,
        (1, 2, 4),
        -0.5,
        "`targets` must be masses ≥ 0; got -0.5 at position [1 2 4].",
    ),
    "logit": (
        lambda z, _: jaxce.poly_loss(z, LABELS),
        LOGITS,
        (1, 0, 3),
        jnp.nan,
        "`logits` must be numbers; got nan at position [1 0 3].",
    ),
    "log-probability": (
        lambda z, _: jaxce.nll_loss(z, LABELS),
        LOGITS,
        (1, 0, 3),
        jnp.nan,
        "`log_probs` must be numbers; got nan at position [1 0 3].",
    ),
    "teacher's logit": (
        lambda t, z: jaxce.distillation_loss(z, t),
        LOGITS,
        (0, 2, 0),
        jnp.nan,
        "`teacher_logits` must be numbers; got nan at position [0 2 0].",
    ),
    "hidden": (
        lambda h, _: jaxce.linear_cross_entropy(h, KERNEL, LABELS),
        HIDDEN,
        (1, 1, 0),
        jnp.nan,
        "`hidden` must be numbers; got nan at position [1 1 0].",
    ),
    "teacher's kernel": (
        lambda k, h: jaxce.linear_distillation_loss(h, KERNEL, h, k),
        KERNEL,
        (4, 0),
        jnp.nan,
        "`teacher_kernel` must be numbers; got nan at position [4 0].",
    ),
    "binary logit": (
        lambda z, _: jaxce.binary_cross_entropy(z, MASSES),
        LOGITS,
        (1, 0, 3),
        jnp.nan,
        "`logits` must be numbers; got nan at position [1 0 3].",
    ),
    "prediction": (
        lambda z, _: jaxce.l1_loss(z, MASSES),
        LOGITS,
        (1, 0, 3),
        jnp.nan,
        "`predictions` must be numbers; got nan at position [1 0 3].",
    ),
}


DAILY = {"label", "label that is counted", "weight", "mass", "hidden", "prediction"}


@pytest.mark.parametrize("name", daily(CASES, DAILY))
def test_a_wrong_value_is_named(name):
    """As it stands, through `jit`, and through `grad`, which is taken by the logits or by the array itself."""
    loss, array, position, value, message = CASES[name]
    argnum = 0 if jnp.issubdtype(array.dtype, jnp.floating) else 1
    ways = [loss, jax.jit(loss), jax.jit(jax.grad(loss, argnum))]
    for way in ways if name == "label" else ways[2:]:
        checked = jax.jit(checkify.checkify(way)) if way is not loss else checkify.checkify(way)
        assert checked(array, LOGITS)[0].get() is None
        error = checked(array.at[position].set(value), LOGITS)[0].get()
        assert error is not None
        assert error.startswith(message)


def test_what_does_not_count_is_not_looked_at():
    where = jnp.array([[True, True, False], [True, True, True]])
    spoilt = LOGITS.at[0, 2, 1].set(jnp.nan), LABELS.at[0, 2].set(-7), ONES.at[0, 2].set(-1), MASSES.at[0, 2].set(-1)

    def losses(logits, labels, weights, masses):
        by_label = jaxce.cross_entropy(logits, labels, weights=weights, where=where)
        ignored = jaxce.cross_entropy(logits, labels, weights=weights, ignore_index=-7)
        return by_label + ignored + jaxce.cross_entropy(logits, masses, where=where)

    error, value = jax.jit(checkify.checkify(losses))(*spoilt)
    assert error.get() is None
    assert jnp.isfinite(value)


def test_padding_is_not_looked_at():
    spoilt = LOGITS.at[..., 4].set(jnp.nan), MASSES.at[..., 4].set(-1), jnp.ones(5).at[4].set(-1)

    def losses(logits, masses, class_weights):
        options = {"num_classes": 4, "class_weights": class_weights}
        where = jnp.array([[True, True, False], [True, True, True]])
        by_label = jaxce.cross_entropy(logits, jnp.minimum(LABELS, 3), where=where, **options)
        return by_label + jaxce.cross_entropy(logits, masses, **options)

    error, value = jax.jit(checkify.checkify(losses))(*spoilt)
    assert error.get() is None
    assert jnp.isfinite(value)


def test_until_checkify_is_imported_no_program_has_an_effect(monkeypatch):
    """JAX dispatches programs with an effect from Python; a trace from before the import must not be used after it."""

    def effects():
        return jax.make_jaxpr(jax.grad(jaxce.cross_entropy))(LOGITS, LABELS).effects

    assert effects()
    with monkeypatch.context() as before_the_import:
        before_the_import.delitem(sys.modules, "jax.experimental.checkify")
        assert not effects()
    assert effects()


def test_without_checkify_nothing_is_compiled():
    def loss(logits, labels, weights, class_weights):
        return jaxce.cross_entropy(logits, labels, weights=weights, class_weights=class_weights)

    costs = []
    for is_eager in (False, True):  # with the checks in the traced program, and without
        token = _eager._is_eager.set(is_eager)
        try:
            lowered = jax.jit(jax.grad(loss)).lower(LOGITS, LABELS, ONES, jnp.ones(5))
        finally:
            _eager._is_eager.reset(token)
        compiled = lowered.compile()
        costs.append((compiled.cost_analysis(), compiled.memory_analysis().temp_size_in_bytes))
    assert costs[0] == costs[1]
    assert costs[0][0]["flops"] > 0
