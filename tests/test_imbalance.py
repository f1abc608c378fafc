"""Counts of classes, what is made of them, and what a mistake costs: against scikit-learn and the papers' formulas."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import unoptimized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from marks import needs

import jaxce
from jaxce import imbalance

STUDY = np.array([260, 10, 56, 500])
LONG_TAIL = np.array([50000, 1281, 700, 700, 33, 5, 1])
SCHEMES = ["balanced", "inverse_sqrt", "effective_number", "median_frequency"]
RNG = np.random.default_rng(7)
LABELS = RNG.integers(0, 5, (8, 6))
WHERE = RNG.random((8, 6)) < 0.7
COSTS = RNG.uniform(0, 3, (5, 5))


def _bincount(labels, where, num_classes=5):
    return np.bincount(labels[where], minlength=num_classes)


# --- counts


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64"])
def test_counts_of_any_integer_dtype_and_rank(dtype, x64):
    largest = 127 if dtype == "int8" else 200
    labels = np.array([[[0, 3, largest], [largest, 1, 3]]], dtype)
    counts = imbalance.class_counts(jnp.asarray(labels), 300)
    assert counts.dtype == jnp.float32
    np.testing.assert_array_equal(counts, np.bincount(labels.ravel(), minlength=300))
    np.testing.assert_array_equal(jax.jit(imbalance.class_counts, static_argnums=1)(labels, 300), counts)
    assert imbalance.class_counts(jnp.asarray(labels[0, 0, 1]), 4).tolist() == [0, 0, 0, 1]
    assert imbalance.class_counts(jnp.asarray(labels[0, 0, 1]), jnp.asarray(4)).tolist() == [0, 0, 0, 1]
    assert imbalance.class_counts(jnp.zeros(0, dtype), 2).tolist() == [0, 0]


def test_counts_leave_out_what_is_masked():
    labels = np.where(WHERE, LABELS, 255)
    for array in (LABELS, labels, jnp.asarray(labels), jnp.asarray(np.where(WHERE, LABELS, -1))):
        np.testing.assert_array_equal(imbalance.class_counts(array, 5, where=WHERE), _bincount(LABELS, WHERE))


@pytest.mark.parametrize("wrong", [-1, -5, 5, 2**31 - 1])
def test_a_wrong_label_is_loud_and_no_class(wrong):
    labels = LABELS.copy()
    labels[3, 2] = wrong

    @unoptimized.jit
    def everything(labels):
        counts = imbalance.class_counts(labels, 5)
        return counts, imbalance.class_weights(counts), imbalance.logit_adjustment(counts)

    for array in everything(labels):
        assert np.all(np.isnan(array))
    assert np.all(np.isfinite(imbalance.class_counts(jnp.asarray(labels), 5, where=labels != wrong)))


def test_more_labels_than_float32_can_count_one_by_one():
    labels = jnp.zeros(2**24 + 3, jnp.uint8)
    assert imbalance.class_counts(labels, 2).tolist() == [2**24 + 4, 0]  # 2^24 + 3, rounded once


def test_a_long_sum_of_counts_is_as_exact_as_promised():
    """Every batch of three is rounded to one of four, 2^25 being the total."""
    labels = jnp.zeros(3, jnp.int32)
    total = jax.jit(
        lambda start: jax.lax.fori_loop(0, 1000, lambda _, counts: counts + imbalance.class_counts(labels, 1), start)
    )(jnp.array([2.0**25]))[0]
    exact = 2**25 + 3000
    assert 0 < abs(total - exact) <= 1000 * 6e-8 * exact


def test_counts_of_batches_add_up():
    labels, where = jnp.asarray(np.where(WHERE, LABELS, 99)), jnp.asarray(WHERE)

    def step(counts, batch):
        return counts + imbalance.class_counts(batch[0], 5, where=batch[1]), None

    def over_steps(labels, where):
        return jax.lax.scan(step, imbalance.class_counts(labels[0], 5, where=where[0]), (labels[1:], where[1:]))[0]

    def over_devices(labels, where):
        own = over_steps(labels, where)
        return jax.lax.psum(own, ("data", "model")), own

    expected = _bincount(LABELS, WHERE)
    np.testing.assert_array_equal(jax.jit(over_steps)(labels, where), expected)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    split = jax.shard_map(over_devices, mesh=mesh, in_specs=P(("data", "model")), out_specs=(P(), P(("data", "model"))))
    total, own = jax.jit(split)(labels, where)
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(own.reshape(4, 5).sum(0), expected)
    mapped = jax.vmap(lambda labels, where: imbalance.class_counts(labels, 5, where=where))(labels, where)
    np.testing.assert_array_equal(mapped.sum(0), expected)


@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", "model"), P(("data", "model"))])
def test_counts_of_labels_that_an_explicit_mesh_splits(spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    labels = jax.device_put(np.where(WHERE, LABELS, 99), NamedSharding(mesh, spec))
    where = jnp.asarray(WHERE)
    with jax.set_mesh(mesh):
        counts = jax.jit(lambda labels, where: imbalance.class_counts(labels, 5, where=where))(labels, where)
        by_mask = imbalance.class_counts(jnp.asarray(LABELS), 5, where=jax.device_put(where, NamedSharding(mesh, spec)))
    np.testing.assert_array_equal(counts, _bincount(LABELS, WHERE))
    np.testing.assert_array_equal(by_mask, _bincount(LABELS, WHERE))
    assert jnp.all(jnp.isnan(imbalance.class_counts(labels, 5)))


# --- weights


def _formula(scheme, counts, beta=0.999):
    """The papers' formulas, of counts without a 0."""
    n = counts.astype(float)
    if scheme == "balanced":
        return n.sum() / (len(n) * n)
    if scheme == "inverse_sqrt":
        return n.sum() / (np.sqrt(n) * np.sqrt(n).sum())
    if scheme == "effective_number":
        effective = (1 - beta**n) / (1 - beta)
        return len(n) / effective / (1 / effective).sum()
    return np.median(n) / n


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("counts", [STUDY, LONG_TAIL, np.array([7])], ids=["study", "long tail", "one class"])
def test_weights_are_those_of_the_formula(scheme, counts):
    weights = jax.jit(imbalance.class_weights, static_argnames="scheme")(counts, scheme=scheme)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, _formula(scheme, counts), rtol=1e-6)


def test_balanced_weights_are_those_of_scikit_learn():
    class_weight = needs("sklearn.utils.class_weight")
    for counts in (STUDY, LONG_TAIL):
        labels = np.repeat(np.arange(len(counts)), counts)
        expected = class_weight.compute_class_weight("balanced", classes=np.arange(len(counts)), y=labels)
        weights = imbalance.class_weights(imbalance.class_counts(labels, len(counts)))
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_figures_of_the_study():
    # 826 rows in 4 classes, and what 1/n makes of them by hand
    np.testing.assert_allclose(imbalance.class_weights(STUDY), [826 / 1040, 826 / 40, 826 / 224, 826 / 2000], rtol=1e-6)
    np.testing.assert_allclose(
        imbalance.class_weights(STUDY, scheme="median_frequency"), [158 / 260, 158 / 10, 158 / 56, 158 / 500], rtol=1e-6
    )


@pytest.mark.parametrize("scheme", ["balanced", "inverse_sqrt"])
def test_the_mean_weight_of_a_row_is_1(scheme):
    for counts in (STUDY, LONG_TAIL, np.array([260, 0, 56, 500])):
        weights = np.asarray(imbalance.class_weights(counts, scheme=scheme))
        np.testing.assert_allclose(weights @ counts, counts.sum(), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.9999, 1 - 1e-7, 1 - 1e-12])
def test_effective_numbers_at_every_beta(beta):
    """(1 − β^n) / (1 − β) as a sum, which loses no digits: Σ β^i over i < n."""
    effective = np.array([np.sum(beta ** np.arange(n, dtype=float)) for n in LONG_TAIL])
    expected = len(effective) / effective / (1 / effective).sum()
    weights = imbalance.class_weights(LONG_TAIL, scheme="effective_number", beta=beta)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_effective_numbers_of_a_traced_beta():
    def weights(beta):
        return imbalance.class_weights(STUDY, scheme="effective_number", beta=beta)

    exact = _formula("effective_number", STUDY, float(np.float32(0.99)))
    everything = unoptimized.jit(lambda beta: [weights(beta), jax.jacfwd(weights)(beta), jax.jacrev(weights)(beta)])
    np.testing.assert_allclose(everything(np.float32(0.99))[0], exact, rtol=1e-5)
    for array in everything(np.float32(0)):
        assert np.all(np.isfinite(array))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_class_that_was_never_counted(scheme):
    counts = np.array([0, 260, 10, 0, 56, 500])
    weights = np.asarray(imbalance.class_weights(counts, scheme=scheme))
    np.testing.assert_allclose(weights[counts > 0], imbalance.class_weights(STUDY, scheme=scheme), rtol=1e-6)
    np.testing.assert_array_equal(weights[counts == 0], weights[2])
    slopes = unoptimized.jit(jax.jacrev(lambda n: imbalance.class_weights(n, scheme=scheme)))
    for array in (counts.astype(np.float32), np.zeros(6, np.float32)):
        assert np.all(np.isfinite(slopes(array)))
    np.testing.assert_array_equal(imbalance.class_weights(array, scheme=scheme), np.ones(6))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_count_that_is_none_is_loud(scheme):
    @unoptimized.jit
    def both(counts):
        return imbalance.class_weights(counts, scheme=scheme), imbalance.logit_adjustment(counts)

    for wrong in (-3.0, np.nan, np.inf):
        for array in both(np.array([2.0, wrong, 5.0], np.float32)):
            assert np.all(np.isnan(array))


def test_a_beta_that_is_none_is_loud():
    weights = jax.jit(lambda beta: imbalance.class_weights(STUDY, scheme="effective_number", beta=beta))
    for beta in (1.0, 1.5, -0.1, np.nan):
        assert np.all(np.isnan(weights(np.float32(beta)))), beta


def test_counts_beyond_32_bits():
    counts = np.array([5 * 10**9, 10**6])
    np.testing.assert_allclose(imbalance.class_weights(counts), _formula("balanced", counts), rtol=1e-6)
    # It is added to logits: the digits of a log near 0 are lost there anyway.
    adjustment = imbalance.logit_adjustment(counts)
    np.testing.assert_allclose(adjustment, np.log(counts / counts.sum()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", ["balanced", "inverse_sqrt", "median_frequency"])
def test_frequencies_do_as_counts(scheme):
    frequencies = (STUDY / STUDY.sum()).astype(np.float32)
    expected = imbalance.class_weights(STUDY, scheme=scheme)
    np.testing.assert_allclose(imbalance.class_weights(frequencies, scheme=scheme), expected, rtol=1e-5)
    np.testing.assert_allclose(imbalance.logit_adjustment(frequencies), imbalance.logit_adjustment(STUDY), rtol=1e-5)


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_derivatives_by_counts_beta_and_tau(order, x64):
    n, beta, tau = jnp.array([260.0, 10, 0, 56, 500]), jnp.asarray(0.99), jnp.asarray(1.3)
    cotangent = jnp.asarray(RNG.normal(size=5))

    def total(n, beta, tau):
        weights = [imbalance.class_weights(n, scheme=scheme, beta=beta) for scheme in SCHEMES]
        return sum(jnp.vdot(cotangent, array) for array in [*weights, imbalance.logit_adjustment(n, tau=tau)])

    def of_counted(counted, beta, tau):  # 0 is a corner, not a point of a curve
        return total(n.at[jnp.array([0, 1, 3, 4])].set(counted), beta, tau)

    counted = n[jnp.array([0, 1, 3, 4])]
    # β near 1 has third derivatives of (1 − β)^−3: the step of the finite differences has to be small.
    arguments = counted, beta, tau
    check_grads(jax.jit(of_counted), arguments, order=order, modes=("fwd", "rev"), eps=1e-6, rtol=1e-5, atol=1e-5)


def test_float64_counts_make_float64_weights(x64):
    for scheme in SCHEMES:
        weights = imbalance.class_weights(LONG_TAIL.astype(float), scheme=scheme)
        assert weights.dtype == jnp.float64
        np.testing.assert_allclose(weights, _formula(scheme, LONG_TAIL), rtol=1e-12)
    assert imbalance.class_weights(LONG_TAIL, beta=np.float64(0.9), scheme="effective_number").dtype == jnp.float32
    assert imbalance.logit_adjustment(jnp.asarray(STUDY), tau=jnp.asarray(1.0)).dtype == jnp.float32


# --- logit adjustment


def test_adjusted_loss_is_cross_entropy_with_the_prior():
    """Menon et al., their equation 11: log(1 + Σ_{k≠y} (π_k / π_y)^τ exp(z_k − z_y))."""
    logits, labels, prior = RNG.normal(0, 2, (6, 4)), RNG.integers(0, 4, 6), STUDY / STUDY.sum()
    for tau in (1.0, 0.7, 2.0):
        ratios = (prior / prior[labels, None]) ** tau * np.exp(logits - logits[np.arange(6), labels][:, None])
        expected = np.log1p(ratios.sum(-1) - 1)  # the label's own is 1
        adjusted = logits.astype(np.float32) + imbalance.logit_adjustment(STUDY, tau=tau)[None]
        losses = jaxce.cross_entropy(adjusted, labels, reduction="none")
        np.testing.assert_allclose(losses, expected, rtol=2e-6)
    shifted = jaxce.cross_entropy(jnp.asarray(logits + np.log(prior), jnp.float32), labels)
    adjusted = jaxce.cross_entropy(logits.astype(np.float32) + imbalance.logit_adjustment(STUDY)[None], labels)
    np.testing.assert_allclose(adjusted, shifted, rtol=1e-6)


def test_adjustment_of_what_was_never_counted():
    adjustment = imbalance.logit_adjustment(np.array([260, 10, 0, 56, 500]))
    np.testing.assert_allclose(np.delete(adjustment, 2), np.log(STUDY / STUDY.sum()), rtol=1e-6)
    assert adjustment[2] == adjustment[1]
    np.testing.assert_allclose(imbalance.logit_adjustment(jnp.zeros(4)), np.full(4, -np.log(4)), rtol=1e-6)
    np.testing.assert_array_equal(imbalance.logit_adjustment(STUDY, tau=0), np.zeros(4))


def test_adjustment_takes_the_prior_out_of_a_trained_network():
    """With nothing to see, a network learns the prior: trained with the adjustment, its own logits are equal."""
    labels = np.repeat(np.arange(4), STUDY)
    adjustment = imbalance.logit_adjustment(STUDY)

    @unoptimized.jit
    def train(adjustment):
        def loss(logits):
            return jaxce.cross_entropy(jnp.broadcast_to(logits + adjustment, (len(labels), 4)), labels)

        return jax.lax.fori_loop(0, 400, lambda _, z: z - 3 * jax.grad(loss)(z), jnp.array([1.0, -1.0, 0.5, 0.0]))

    plain, adjusted = train(jnp.zeros(4)), train(adjustment)
    np.testing.assert_allclose(jax.nn.softmax(plain), STUDY / STUDY.sum(), atol=2e-3)
    np.testing.assert_allclose(jax.nn.softmax(adjusted), np.full(4, 0.25), atol=0.02)


# --- expected cost


def test_expected_cost_is_the_sum_of_prices_times_probabilities(x64):
    logits, labels, q = RNG.normal(0, 2, (3, 5, 2)), RNG.integers(0, 5, (3, 2)), RNG.uniform(0.1, 1, (3, 5, 2))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    by_label = imbalance.expected_cost(logits, labels, COSTS, axis=1, reduction="none")
    np.testing.assert_allclose(by_label, np.einsum("nsc,ncs->ns", COSTS[labels], p), rtol=1e-13)
    by_mass = imbalance.expected_cost(logits, q, COSTS, axis=1, reduction="none")
    np.testing.assert_allclose(by_mass, np.einsum("nks,kc,ncs->ns", q, COSTS, p), rtol=1e-13)


MISTAKES = np.array([[0.0, 1, 2], [5, 0, 1], [1, 1, 0]])


@pytest.mark.parametrize("costs", [1 - np.eye(3), MISTAKES, -np.eye(3), MISTAKES + 6], ids=str)
def test_confident_rows_have_all_of_their_digits(costs):
    """Ahead by up to 70 nats, right or wrong: how far the cost is from that of the largest logit, and every slope."""
    evaluate = jax.jit(jax.value_and_grad(lambda z, y: imbalance.expected_cost(z, y, costs.astype(np.float32))))
    for lead in (0.0, 1.0, 17.0, 40.0, 70.0):
        z = np.array([lead, 0.0, -1.0])
        e = [mpmath.exp(x - lead) for x in z]
        p = [x / mpmath.fsum(e) for x in e]
        for label in range(3):
            cost, gradient = evaluate(jnp.asarray(z, jnp.float32), jnp.array(label))
            k = [mpmath.mpf(x) for x in costs[label]]
            excess = mpmath.fsum((x - k[0]) * y for x, y in zip(k, p, strict=True))
            slopes = [y * (x - k[0] - excess) for x, y in zip(k, p, strict=True)]
            tolerance = 1e-6 + 1.2e-7 * lead
            np.testing.assert_allclose(cost, float(k[0] + excess), rtol=tolerance)
            np.testing.assert_allclose(gradient, np.array(slopes, float), rtol=3 * tolerance, atol=1e-37)


def test_costs_are_read_in_their_own_dtype(x64):
    logits, labels = RNG.normal(size=(4, 5)).astype(np.float32), RNG.integers(0, 5, 4)
    assert imbalance.expected_cost(logits, labels, COSTS.astype(np.float32)).dtype == jnp.float32
    wide = jax.value_and_grad(imbalance.expected_cost)(jnp.asarray(logits), labels, jnp.asarray(COSTS))
    assert (wide[0].dtype, wide[1].dtype) == (jnp.float64, jnp.float32)
    p = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(-1, keepdims=True)
    np.testing.assert_allclose(wide[0], (COSTS[labels] * p).sum(-1).mean(), rtol=1e-13)
    integers = np.round(COSTS).astype(np.int32)
    expected = imbalance.expected_cost(logits, labels, integers.astype(np.float32))
    assert imbalance.expected_cost(logits, labels, integers) == expected


def test_only_the_mistake_that_is_dear_is_punished_harder():
    """A price on class 3 taken for class 0 leaves the rows of the other classes alone."""
    logits, labels = jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32), jnp.arange(4)
    costs = jnp.zeros((4, 4)).at[3, 0].set(2.0)

    def loss(logits, costs):
        return jaxce.cross_entropy(logits, labels) + imbalance.expected_cost(logits, labels, costs)

    plain, dear = jax.grad(loss)(logits, 0 * costs), jax.grad(loss)(logits, costs)
    np.testing.assert_array_equal(dear[:3], plain[:3])
    assert dear[3, 0] > plain[3, 0]
    np.testing.assert_allclose(dear[3].sum(), 0, atol=1e-6)
