"""Under `debug_checks` and checkify a wrong value is an error that names it; without the first nothing is traced."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from jax.experimental import checkify
from marks import daily
from test_calls import CALLS

import jaxce

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
    "listed class": (
        lambda c, z: jaxce.cross_entropy(z, jaxce.SparseTargets(c, jnp.array([[[0.5, 0]] * 3] * 2))),
        jnp.stack([LABELS, jnp.full((2, 3), -1)], -1),
        (1, 0, 0),
        5,
        "`targets.classes` must be class indices in [0, 5); got 5 at position [1 0 0].",
    ),
    "mass of a listed class": (
        lambda m, z: jaxce.linear_cross_entropy(z, KERNEL, jaxce.SparseTargets(LABELS[..., None], m)),
        ONES[..., None],
        (0, 2, 0),
        -1,
        "`targets.masses` must be ≥ 0; got -1.0 at position [0 2 0].",
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
        lambda k, h: jaxce.distillation_loss(jaxce.LinearLogits(h, KERNEL), jaxce.LinearLogits(h, k)),
        KERNEL,
        (4, 0),
        jnp.nan,
        "`teacher_logits.kernel` must be numbers; got nan at position [4 0].",
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


@pytest.fixture(autouse=True)
def checks():
    with jaxce.debug_checks():
        yield


DAILY = {"label", "mass", "hidden"}


@pytest.mark.parametrize("name", daily(CASES, DAILY))
def test_a_wrong_value_is_named(name):
    """As it stands, through `jit`, and through `grad`, which is taken by the logits or by the array itself."""
    loss, array, position, value, message = CASES[name]
    argnum = 0 if jnp.issubdtype(array.dtype, jnp.floating) else 1
    ways = [loss, jax.jit(loss), jax.jit(jax.grad(loss, argnum))]
    for way in ways if name == "label" else ways[2:]:
        checked = unoptimized.jit(checkify.checkify(way)) if way is not loss else checkify.checkify(way)
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

    error, value = unoptimized.jit(checkify.checkify(losses))(*spoilt)
    assert error.get() is None
    assert jnp.isfinite(value)


def test_padding_is_not_looked_at():
    spoilt = LOGITS.at[..., 4].set(jnp.nan), MASSES.at[..., 4].set(-1), jnp.ones(5).at[4].set(-1)

    def losses(logits, masses, class_weights):
        options = {"num_classes": 4, "class_weights": class_weights}
        where = jnp.array([[True, True, False], [True, True, True]])
        by_label = jaxce.cross_entropy(logits, jnp.minimum(LABELS, 3), where=where, **options)
        return by_label + jaxce.cross_entropy(logits, masses, **options)

    error, value = unoptimized.jit(checkify.checkify(losses))(*spoilt)
    assert error.get() is None
    assert jnp.isfinite(value)


def test_checks_are_in_a_program_where_they_are_asked_for():
    """A trace from outside is not used inside, nor the other way round."""
    step = jax.jit(jaxce.cross_entropy)
    error = checkify.checkify(step)(LOGITS, LABELS.at[0, 0].set(9))[0].get()
    with jaxce.debug_checks(False):
        outside = checkify.checkify(step)(LOGITS, LABELS.at[0, 0].set(9))[0].get()
        assert not jax.make_jaxpr(step)(LOGITS, LABELS).effects
    assert error.startswith("`targets` must be class indices in [0, 5); got 9")
    assert outside is None
    assert jax.make_jaxpr(step)(LOGITS, LABELS).effects
    with pytest.raises(TypeError, match=r"^`enabled` must be True or False; got Array"):
        jaxce.debug_checks(jnp.array(True))


def test_without_checkify_nothing_is_compiled():
    def loss(logits, labels, weights, class_weights):
        return jaxce.cross_entropy(logits, labels, weights=weights, class_weights=class_weights)

    costs = []
    for enabled in (False, True):  # with the checks in the traced program, and without
        with jaxce.debug_checks(enabled):
            compiled = jax.jit(jax.grad(loss)).lower(LOGITS, LABELS, ONES, jnp.ones(5)).compile()
        costs.append((compiled.cost_analysis(), compiled.memory_analysis().temp_size_in_bytes))
    assert costs[0] == costs[1]
    assert costs[0][0]["flops"] > 0


# What a program does must not depend on what someone imported: of one loss of each kind every day.
CHOSEN = [
    "cross_entropy",
    "cross_entropy in parts",
    "linear_cross_entropy",
    "summarize of a head",
    "distillation_loss",
    "multi_margin_loss",
    "binary_cross_entropy",
    "expected_cost",
    "class_counts",
    "reduce_losses",
    "torch.cross_entropy mean",
]
SCRIPT = """
import sys
import jax, jax.export, jax.experimental.checkify
import jax.numpy as jnp
import numpy as np
from test_calls import CALLS

def python_calls(function):
    function(*arguments), function(*arguments)
    calls = []
    sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame.f_code.co_name))
    function(*arguments)
    sys.setprofile(None)
    return calls

ones = jnp.ones((7, 3), jnp.float32)
arguments = (ones, ones / 4, jnp.zeros(7, jnp.int32), jnp.float32(0.1))
nothing = jax.tree.map(lambda array: jnp.zeros((0, *jnp.shape(array)), jnp.result_type(array)), arguments)
for name in sys.argv[1:]:
    loss = CALLS[name]
    assert not jax.make_jaxpr(loss)(*arguments).effects
    compiled = jax.jit(loss)
    assert len(python_calls(compiled)) <= 1  # which makes the record that a program in parts returns
    exported = jax.export.export(jax.jit(lambda *arguments: jax.tree.leaves(loss(*arguments))))(*arguments)
    again = jax.export.deserialize(exported.serialize())
    jax.tree.map(np.testing.assert_array_equal, again.call(*arguments), jax.tree.leaves(compiled(*arguments)))
    assert all(leaf.shape[0] == 0 for leaf in jax.tree.leaves(jax.jit(jax.vmap(loss))(*nothing)))
"""


@pytest.mark.thorough
def test_importing_checkify_changes_nothing(request):
    """A loss has no effects and is dispatched by no Python, may be exported, and mapped over nothing."""
    chosen = CALLS if request.config.getoption("--thorough") else CHOSEN
    subprocess.run([sys.executable, "-c", SCRIPT, *chosen], check=True, cwd=Path(__file__).parent)
