"""Accuracy against 50 digits, with the bounds that the documentation states."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import plain
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from lazy import linear_distillation
from marks import daily

import jaxce

C = 7
OTHERS = np.array([0.0, -0.3, -1.1, -4.0, -0.7, -9.0])


@jax.jit
def _loss_and_gradient(logits, labels):
    losses, pullback = jax.vjp(lambda z: jaxce.cross_entropy(z, labels, reduction="none"), logits)
    return losses, pullback(jnp.ones_like(losses))[0]


@jax.jit
def _distribution_loss_and_gradient(logits, targets, label_smoothing):
    losses, pullback = jax.vjp(
        lambda z: jaxce.cross_entropy(z, targets, label_smoothing=label_smoothing, reduction="none"), logits
    )
    return losses, pullback(jnp.ones_like(losses))[0]


def _rows_with_lead(leads, offset):
    """Rows whose label 3 leads the others by `leads`, as float32 stores them."""
    rows = np.stack([np.insert(OTHERS, 3, lead) for lead in leads]) + offset
    return rows.astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_label_ahead_or_behind(offset):
    leads = np.concatenate([np.linspace(0, 70, 57), -np.logspace(-1, 4, 8), [0.0]])
    rows = _rows_with_lead(leads, offset)
    losses, gradients = _loss_and_gradient(rows, jnp.full(len(rows), 3))
    tiny = float(np.finfo(np.float32).tiny)
    for row, loss, gradient in zip(rows, np.asarray(losses), np.asarray(gradients), strict=True):
        distance = row.max() - row.astype(np.float64)
        lead = max(float(row[3]) - float(np.delete(row, 3).max()), 0)
        exact = oracle.row(row, 3)[1]
        assert oracle.relative_error(loss, exact) <= 1e-6 + 1.2e-7 * lead
        for c, true in enumerate(oracle.nll_gradient(row, 3)):
            if abs(true) < tiny:
                continue
            reach = lead if c == 3 else float(distance[c])
            assert oracle.relative_error(gradient[c], true) <= 1e-6 + 1.2e-7 * reach, (row, c)
    assert np.all(np.asarray(losses) > 0)
    assert np.all(np.asarray(gradients)[:, 3] < 0)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_distributions_and_smoothing(offset, label_smoothing, rng):
    leads = np.concatenate([np.linspace(0, 70, 15), -np.logspace(-1, 3, 5)])
    rows = _rows_with_lead(leads, offset)
    targets = rng.dirichlet(np.ones(C), len(rows)).astype(np.float32)
    targets[0] = np.eye(C)[3]
    losses, gradients = _distribution_loss_and_gradient(rows, targets, label_smoothing)
    smoothing = mpmath.mpf(float(np.float32(label_smoothing)))
    for row, target, loss, gradient in zip(rows, targets, np.asarray(losses), np.asarray(gradients), strict=True):
        t = [(1 - smoothing) * mpmath.mpf(float(q)) + smoothing / C for q in target]
        log_z, _, _, p = oracle.row(row, target)
        exact = mpmath.fsum(tc * (log_z - mpmath.mpf(float(zc))) for tc, zc in zip(t, row, strict=True))
        assert oracle.relative_error(loss, exact) <= 3e-6
        mass = mpmath.fsum(t)
        for c in range(C):
            assert abs(gradient[c] - (mass * p[c] - t[c])) <= 1e-6 * (p[c] + t[c])


def test_one_hot_distribution_is_as_exact_as_the_label():
    rows = _rows_with_lead(np.linspace(0, 70, 15), 0.0)
    by_label = _loss_and_gradient(rows, jnp.full(len(rows), 3))
    one_hot = jnp.broadcast_to(jnp.eye(C)[3], rows.shape)
    by_distribution = _distribution_loss_and_gradient(rows, one_hot, 0.0)
    for label, distribution in zip(by_label, by_distribution, strict=True):
        np.testing.assert_allclose(label, distribution, rtol=1e-6)


def test_offset_costs_nothing(x64):
    """Smoothing term and z-loss too: adding 1e4 to logits that can carry it changes what it should, exactly."""
    rows = np.round(np.random.default_rng(3).normal(0, 3, (5, C)) * 64) / 64
    labels = jnp.arange(5)
    for offset in (0.0, 1e4):
        shifted = (rows + offset).astype(np.float32)
        assert np.all(shifted.astype(np.float64) == rows + offset)
        exact = plain.cross_entropy(jnp.asarray(rows), labels, label_smoothing=0.2)
        losses = jaxce.cross_entropy(shifted, labels, label_smoothing=0.2, reduction="none")
        assert losses.dtype == jnp.float32
        np.testing.assert_allclose(losses, exact, rtol=5e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_give_the_float32_answer(dtype, rng):
    logits = jnp.asarray(rng.normal(0, 3, (64, C)), jnp.float32).astype(dtype)
    labels = jnp.asarray(rng.integers(0, C, 64))
    targets = jnp.asarray(rng.dirichlet(np.ones(C), 64), jnp.float32)
    kinds = np.asarray(labels), np.asarray(targets)

    @jax.jit
    def of_kinds(logits):
        return [
            jax.value_and_grad(lambda z, t=kind: jaxce.cross_entropy(z, t, label_smoothing=0.1))(logits)
            for kind in kinds
        ]

    for half, single in zip(of_kinds(logits), of_kinds(logits.astype(jnp.float32)), strict=True):
        assert half[0].dtype == jnp.float32
        assert half[1].dtype == dtype
        np.testing.assert_allclose(half[0], single[0], rtol=2e-7)
        np.testing.assert_array_equal(half[1], single[1].astype(dtype))


def test_confident_bfloat16_rows_keep_their_gradient():
    logits = jnp.array([[20.0, 0.0, -1.0]], jnp.bfloat16)
    gradient = jax.grad(jaxce.cross_entropy)(logits, jnp.array([0]))
    np.testing.assert_allclose(gradient[0, 0].astype(float), -2.819e-9, rtol=1e-2)


def test_float16_with_200_000_classes():
    logits = jnp.zeros((2, 200_000), jnp.float16)
    loss, gradient = jax.value_and_grad(jaxce.cross_entropy)(logits, jnp.array([0, 199_999]))
    np.testing.assert_allclose(loss, np.log(200_000), rtol=1e-6)
    assert jnp.all(jnp.isfinite(gradient))
    np.testing.assert_allclose(gradient[1, -1].astype(float), -0.5, rtol=1e-3)


def test_more_classes_than_float32_can_number():
    logits = jnp.zeros(2**24 + 2).at[2**24].set(20)
    np.testing.assert_allclose(
        jaxce.cross_entropy(logits, jnp.array(2**24 + 1)), np.log(2**24 + 1 + np.exp(20)), rtol=1e-6
    )


def test_second_order_at_ties(x64):
    hessians = jax.jit(
        lambda z: [jax.hessian(lambda z, t=t: jaxce.cross_entropy(z, t))(z) for t in (jnp.array(1), jnp.eye(4)[1])]
    )
    for logits in ([0.0, 0, 0, 0], [2.0, 2, -1, 0], [1.0, 3, 3, 3]):
        exact = np.array(oracle.nll_hessian(logits), float)
        for hessian in hessians(np.array(logits)):
            np.testing.assert_allclose(hessian, exact, atol=1e-15)


def test_largest_logits():
    assert f"{jaxce.cross_entropy(jnp.full(3, 1e8), jnp.array(1)):.6f}" == f"{np.log(3):.6f}"


def test_logits_that_are_computed_anew_in_every_fusion(x64):
    """x / T inside the same program: the maximum may differ in its last bit from what the sums see."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    targets = jax.nn.softmax(logits)
    for dtype, tolerance in ((jnp.float64, 1e-13), (jnp.float32, 1e-6)):
        for kind in (targets.astype(dtype), jnp.array([1, 0, 3])):
            temperatures, z = jnp.array([1.5, 2.0, 3.0, 7.0], dtype), logits.astype(dtype)

            def loss(temperature, z=z, kind=kind):
                return jaxce.cross_entropy(z / temperature, kind)

            expected = [loss(temperature) for temperature in temperatures]
            np.testing.assert_allclose(jax.jit(jax.vmap(loss))(temperatures), expected, rtol=tolerance)


def test_confident_rows_that_are_computed_anew():
    """tanh, scaling and casts are fused into every reader of the logits: the gradient at the label stays exact."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(0, 0.3, (64, 5)) + 40 * np.eye(5)[np.arange(64) % 5] / 30, jnp.float32)
    labels = jnp.arange(64) % 5
    for logits_of in (lambda x: 30 * jnp.tanh(x), lambda x: x * 29.7 + 0.3, lambda x: x / 0.037):
        logits = logits_of(inputs)
        fused = jax.jit(jax.grad(lambda z, f=logits_of: jaxce.cross_entropy(f(z), labels, reduction="sum")))(inputs)
        slope = jax.grad(lambda x, f=logits_of: f(x).sum())(inputs)
        apart = jax.grad(lambda z: jaxce.cross_entropy(z, labels, reduction="sum"))(logits) * slope
        confident = np.asarray(jax.nn.softmax(logits)[jnp.arange(64), labels] > 0.999)
        assert confident.sum() > 20
        np.testing.assert_allclose(
            fused[jnp.arange(64), labels][confident], apart[jnp.arange(64), labels][confident], rtol=2e-5
        )


def test_losses_of_labels_are_never_negative(rng):
    logits = jnp.asarray(rng.normal(0, 30, (4096, 3)), jnp.float32)
    losses = jax.jit(lambda z: jaxce.cross_entropy(z / 3, jnp.argmax(z, -1), reduction="none"))(logits)
    assert losses.min() >= 0


def test_focal_derivatives_are_finite_at_any_confidence():
    rows, gammas = np.zeros((9, 3), np.float32), np.array([0.0, 0.1, 0.5, 1.0, 2.0], np.float32)
    rows[:, 1:] = -np.array([0.0, 1, 10, 40, 70, 86, 90, 200, np.inf])[:, None]

    def loss(z, gamma):
        return jaxce.focal_loss(z, jnp.array(0), gamma=gamma)

    def orders(z, gamma):
        return loss(z, gamma), jax.grad(loss, (0, 1))(z, gamma), jax.hessian(loss)(z, gamma)

    everywhere = jax.jit(jax.vmap(jax.vmap(orders, (0, None)), (None, 0)))(rows, gammas)
    assert all(np.all(np.isfinite(result)) for result in jax.tree.leaves(everywhere))
    behind = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(np.array([-200.0, 0, 0], np.float32), gammas)
    np.testing.assert_allclose(behind, np.tile([-1, 0.5, 0.5], (5, 1)), rtol=1e-6)


def test_focal_keeps_the_digits_of_small_losses(x64):
    logits = jnp.array([[lead, 0.0, -1.0] for lead in (0.1, 1.0, 5.0, 15.0)])
    exact = []
    for row in np.asarray(logits):
        nll = oracle.row(row, 0)[1]
        exact.append(float((1 - mpmath.exp(-nll)) ** mpmath.mpf(0.5) * nll))
    losses = jaxce.focal_loss(logits, jnp.zeros(4, jnp.int32), gamma=0.5, reduction="none")
    np.testing.assert_allclose(losses, exact, rtol=1e-14)


BINARY = [-np.inf, -1e3, -100.0, -20.0, -11.0, -1.0, 0.0, 1.0, 11.0, 20.0, 100.0, 1e3, np.inf]


@pytest.mark.parametrize("pos_weight", [1.0, 3.0])
@pytest.mark.parametrize("target", [0.0, 0.9, 1.0])
def test_binary_cross_entropy_anywhere(target, pos_weight):
    logits = jnp.array(BINARY)
    targets = jnp.full(len(BINARY), target)

    def loss(z, t):
        return jaxce.binary_cross_entropy(z, t, pos_weight=pos_weight, reduction="none")

    losses = loss(logits, targets)
    gradients = jax.grad(lambda z: loss(z, targets).sum())(logits)
    t = mpmath.mpf(float(np.float32(target)))
    for z, value, gradient in zip(BINARY, np.asarray(losses), np.asarray(gradients), strict=True):
        x = mpmath.mpf(z)
        yes = mpmath.mpf(0) if t == 0 or x == mpmath.inf else pos_weight * t * mpmath.log1p(mpmath.exp(-x))
        no = mpmath.mpf(0) if t == 1 or x == -mpmath.inf else (1 - t) * mpmath.log1p(mpmath.exp(x))
        exact = yes + no
        slope = (1 - t) / (1 + mpmath.exp(-x)) - pos_weight * t / (1 + mpmath.exp(x))
        np.testing.assert_allclose(value, float(exact), rtol=2e-7, atol=1e-37, err_msg=f"{z}")
        np.testing.assert_allclose(gradient, float(slope), rtol=3e-7, atol=1e-7 * (target not in (0, 1)) + 1e-37)


def test_binary_focal_loss_anywhere():
    logits, targets, gammas = jnp.meshgrid(jnp.array(BINARY[1:-1]), jnp.array([0, 0.9, 1]), jnp.array([0, 0.5, 2.0]))

    def loss(z, t, gamma):
        return jaxce.binary_focal_loss(z, t, gamma=gamma)

    def orders(*arguments):
        return loss(*arguments), jax.grad(loss, (0, 1, 2))(*arguments), jax.grad(jax.grad(loss))(*arguments)

    everywhere = jax.jit(jax.vmap(orders))(logits.ravel(), targets.ravel(), gammas.ravel())
    assert all(bool(jnp.all(jnp.isfinite(result))) for result in jax.tree.leaves(everywhere))
    logits = jnp.array(BINARY)
    np.testing.assert_allclose(
        jaxce.binary_focal_loss(logits, jnp.ones_like(logits), gamma=0.0, reduction="none"),
        jaxce.binary_cross_entropy(logits, jnp.ones_like(logits), reduction="none"),
        rtol=1e-6,
    )


def test_means_accumulate_in_float32():
    """2²⁰ rows of 0.1 in bfloat16 would sum to 32 in bfloat16, and a float16 sum would overflow."""
    for dtype in (jnp.bfloat16, jnp.float16):
        losses = jnp.full(2**20, 0.1, dtype)
        np.testing.assert_allclose(jaxce.reduce_losses(losses), np.float32(losses[0]), rtol=1e-6)
        np.testing.assert_allclose(
            jaxce.mse_loss(losses, jnp.zeros_like(losses), reduction="sum"), float(losses[0]) ** 2 * 2**20, rtol=1e-6
        )


EYE = np.eye(80, dtype=np.float32)  # a head whose logits are its kernel, exactly
ON_DEVICES = {"num_classes": 22, "class_axis_name": "model"}


def _of_head(recompute, block_bytes):
    def losses(student, teacher, **options):
        how = {"recompute": recompute, "block_bytes": block_bytes}
        return linear_distillation(EYE, student, EYE, teacher, **how, **options)

    return losses


def _of_devices(losses):
    def split(student, teacher, weights, temperature, mixture, **options):
        def on_device(student, teacher, weights, temperature, mixture):
            settings = {"weights": weights, "temperature": temperature, "mixture": mixture}
            return losses(student, teacher, **settings, **options, **ON_DEVICES)

        mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
        specs = P(None, "model"), P(None, "model"), P(), P(), P()
        return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P())(
            student, teacher, weights, jnp.asarray(temperature), jnp.asarray(mixture)
        )

    return split


DISTILLATION = {
    "dense": jaxce.distillation_loss,
    "head, blocks of 1": _of_head(True, 4 * 80),
    "head, blocks of 5": _of_head(True, 5 * 4 * 80),
    "head, one block": _of_head(True, None),
    "head, forward gradients": _of_head(False, 7 * 4 * 24),
    "dense on devices": _of_devices(jaxce.distillation_loss),
    "head on devices": _of_devices(_of_head(True, 2 * 4 * 80)),
}


DIVERGENCES = ["forward", "reverse", "jensen_shannon"]


def _divergence(student, teacher, temperature, kind="forward", mixture=0.5):
    """T² times the divergence of every row in float64, and its derivatives by both logits, by T and by the mixture."""
    if kind == "reverse":
        value, d_teacher, d_student, *rest = _divergence(teacher, student, temperature)
        return value, d_student, d_teacher, *rest
    scaled = [z.astype(np.float64) / temperature for z in (student, teacher)]
    u, v = (z - z.max(-1, keepdims=True) for z in scaled)
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (u, v))
    p, q, r = np.exp(log_p), np.exp(log_q), log_p - log_q
    if kind == "forward":
        divergence = _positive_terms(p, q, r).sum(-1)
        d_u, d_v = p - q, -q * (r + divergence[:, None])
        by_mixture = 0 * divergence
    else:
        share = 1 - mixture
        x, y = _log_mean_exp(-r, mixture), _log_mean_exp(r, share)
        m = mixture * q + share * p
        of_student, of_teacher = _positive_terms(m, p, x).sum(-1), _positive_terms(m, q, y).sum(-1)
        divergence, by_mixture = share * of_student + mixture * of_teacher, of_teacher - of_student
        d_u, d_v = -share * p * (x + of_student[:, None]), -mixture * q * (y + of_teacher[:, None])
    by_temperature = 2 * temperature * divergence - temperature * (d_u * u + d_v * v).sum(-1)
    squared = temperature**2
    return squared * divergence, temperature * d_u, temperature * d_v, by_temperature, squared * by_mixture


def _log_mean_exp(r, share):
    """log(1 − share + share · exp(r))."""
    near = np.log1p(share * np.expm1(np.where(abs(r) < 1, r, 0)))
    return np.where(abs(r) < 1, near, np.logaddexp(np.log1p(-share), np.log(share) + r))


def _positive_terms(m, p, x):
    """m − p − p x, where m = p exp(x)."""
    near = np.where(abs(x) < 1, x, 0)
    return np.where(abs(x) < 1, p * (np.expm1(near) - near), m - p - p * x)


def _agreeing(temperature, rng):
    """Rows of two models that are 1e-2 … 1e-9 nats apart, most of them with an offset, as float32 stores them."""
    nats = np.repeat([1e-2, 1e-4, 4e-7, 3e-9, 1e-9], 16)[:, None]
    teacher = rng.normal(0, 3, (80, 24)).astype(np.float32)
    noise = temperature * np.sqrt(2 * nats) * rng.normal(size=teacher.shape)
    offsets = np.array([0, 1e3, -1e4])[np.arange(80) % 3]
    return (teacher + noise + offsets[:, None]).astype(np.float32), teacher


@pytest.mark.parametrize("way", daily(["dense", "head, blocks of 5"], ["dense"]))
def test_distillation_at_either_end_of_the_temperatures(way, rng):
    """T² KL becomes half of the variance of the logits' differences; of a cold T, the price of another first class."""
    student, teacher = rng.normal(size=(2, 80, 24)).astype(np.float32)
    hot = DISTILLATION[way](student, teacher, temperature=1e9, reduction="none")
    np.testing.assert_allclose(hot, np.var((student - teacher).astype(np.float64), -1) / 2, rtol=1e-5)
    cold = DISTILLATION[way](student, teacher, temperature=1e-9, reduction="none")
    gap = student.max(-1) - np.take_along_axis(student, teacher.argmax(-1)[:, None], -1)[:, 0]
    np.testing.assert_allclose(cold, 1e-9 * gap, rtol=1e-5)
    mixed = {"divergence": "jensen_shannon", "mixture": 0.3, "reduction": "none"}
    hot = DISTILLATION[way](student, teacher, temperature=1e9, **mixed)
    np.testing.assert_allclose(hot, 0.3 * 0.7 * np.var((student - teacher).astype(np.float64), -1) / 2, rtol=1e-5)
    cold = DISTILLATION[way](student, teacher, temperature=1e-9, **mixed)
    differs = student.argmax(-1) != teacher.argmax(-1)
    np.testing.assert_allclose(cold, -1e-18 * (0.3 * np.log(0.3) + 0.7 * np.log(0.7)) * differs, rtol=1e-5)


NEAR = [(kind, way, temperature) for kind in DIVERGENCES for way in DISTILLATION for temperature in (1.0, 2.0, 3.0)]
NEAR_DAILY = [("forward", "dense", 2.0), ("jensen_shannon", "head, blocks of 5", 2.0)]


@pytest.mark.parametrize(("kind", "way", "temperature"), daily(NEAR, NEAR_DAILY))
def test_distillation_near_agreement(kind, way, temperature, rng):
    student, teacher = _agreeing(temperature, rng)
    real = slice(0, 22 if "devices" in way else 24)
    mixture = float(np.float32(0.3))
    exact, d_student, d_teacher, d_temperature, d_mixture = _divergence(
        student[:, real], teacher[:, real], temperature, kind, mixture
    )
    assert exact.min() < 1e-9 * temperature**2
    weights = (1 / exact).astype(np.float32)  # so that every row has a part in the sum

    @jax.jit
    def results(*arguments):
        def losses(weights, reduction, *moving):
            options = {"temperature": moving[2], "mixture": moving[3], "divergence": kind, "reduction": reduction}
            return DISTILLATION[way](*moving[:2], weights=weights, **options)

        of_sum = jax.value_and_grad(lambda *moving: losses(weights, "sum", *moving), (0, 1, 2, 3))
        return losses(jnp.ones(80), "none", *arguments), *of_sum(*arguments)

    each, total, gradients = results(student, teacher, temperature, mixture)
    np.testing.assert_allclose(each, exact, rtol=2e-6)
    np.testing.assert_allclose(total, np.sum(weights * exact), rtol=2e-6)
    np.testing.assert_allclose(gradients[2], np.sum(weights * d_temperature), rtol=1e-5)
    np.testing.assert_allclose(gradients[3], np.sum(weights * d_mixture), rtol=1e-5)
    for gradient, row_gradient in zip(gradients, (d_student, d_teacher), strict=False):
        expected = weights[:, None] * row_gradient
        error = np.abs(np.asarray(gradient)[:, real] - expected).max(-1) / np.abs(expected).max(-1)
        assert error.max() <= 2e-6


def test_divergence_of_the_reference():
    """The formulas in float64 that the tests of distillation are held to, by 50 digits."""
    near, far = _agreeing(1.0, np.random.default_rng(0)), _apart(np.random.default_rng(0))
    student, teacher = (np.concatenate(rows) for rows in zip(near, far, strict=True))
    values = [_divergence(student, teacher, 1.0, kind, 0.25)[0] for kind in DIVERGENCES]
    for row, other, *value in zip(student, teacher, *values, strict=True):
        (log_z, _, _, p), (log_t, _, _, q) = oracle.row(row, 0), oracle.row(other, 0)
        log_p, log_q = [float(z) - log_z for z in row], [float(t) - log_t for t in other]
        log_m = [mpmath.log(qc / 4 + 3 * pc / 4) for pc, qc in zip(p, q, strict=True)]
        exact = (
            oracle.divergence(q, log_q, log_p),
            oracle.divergence(p, log_p, log_q),
            oracle.divergence(q, log_q, log_m) / 4 + 3 * oracle.divergence(p, log_p, log_m) / 4,
        )
        for of_kind, exact_of_kind in zip(value, exact, strict=True):
            assert oracle.relative_error(of_kind, exact_of_kind) <= 1e-9


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.thorough)])
def test_distillation_is_never_negative(kind, dtype, rng):
    teacher = rng.normal(0, 4, (4096, 33))
    noise = 10.0 ** rng.uniform(-9, 1, (4096, 1)) * rng.normal(size=teacher.shape)
    student, teacher = jnp.asarray(teacher + noise, dtype), jnp.asarray(teacher, dtype)

    @jax.jit
    @jax.vmap
    def losses(temperature, mixture):
        options = {"temperature": temperature, "mixture": mixture, "divergence": kind}
        return jaxce.distillation_loss(student, teacher, reduction="none", **options)

    assert losses(jnp.array([0.3, 1, 3]), jnp.array([0.5, 1e-6, 1 - 1e-6])).min() >= 0


AGREEING = [(kind, offset) for kind in DIVERGENCES for offset in (0.0, 1e3, -1e4)]


@pytest.mark.parametrize(("kind", "offset"), daily(AGREEING, [("jensen_shannon", -1e4)]))
def test_distillation_is_zero_where_the_models_agree(kind, offset, rng):
    teacher = jnp.asarray(np.round(rng.normal(0, 4, (80, 24)) * 64) / 64, jnp.float32)
    student = teacher + offset  # exactly

    @jax.jit
    def results(temperature):
        of_ways = []
        for losses in (DISTILLATION["dense"], DISTILLATION["head, blocks of 5"]):
            options = {"temperature": temperature, "divergence": kind, "reduction": "none"}
            each, pullback = jax.vjp(functools.partial(losses, **options), student, teacher)
            of_ways.append((each, *pullback(jnp.ones(80))))
        return of_ways

    for temperature in (1.0, 2.0, 3.0):
        for array in jax.tree.leaves(results(temperature)):
            np.testing.assert_array_equal(array, 0)


def _apart(rng):
    """Rows of two models that are up to 1e4 nats apart."""
    teacher = rng.normal(0, 2, (80, 24)).astype(np.float32)
    noise = np.logspace(-0.5, 4, 80)[:, None] * rng.normal(size=teacher.shape)
    return (teacher + noise).astype(np.float32), teacher


@pytest.mark.parametrize("way", daily(["dense", "head, blocks of 5", "head, forward gradients"], ["dense"]))
def test_jensen_shannon_far_from_agreement(way, rng):
    """To its largest, the entropy of the mixture, and with classes that one of the models leaves out, or both."""
    student, teacher = _apart(rng)
    mixture = float(np.float32(0.3))
    options = {"divergence": "jensen_shannon", "mixture": mixture}
    exact, d_student, d_teacher, *_ = _divergence(student, teacher, 1.0, "jensen_shannon", mixture)
    largest = -mixture * np.log(mixture) - (1 - mixture) * np.log(1 - mixture)
    assert exact.min() < 0.01
    assert exact.max() > 0.999 * largest
    np.testing.assert_allclose(DISTILLATION[way](student, teacher, reduction="none", **options), exact, rtol=2e-6)
    gradients = jax.jit(jax.grad(lambda *z: DISTILLATION[way](*z, reduction="sum", **options), (0, 1)))
    for result, expected in zip(gradients(student, teacher), (d_student, d_teacher), strict=True):
        np.testing.assert_allclose(result, expected, rtol=2e-6, atol=1e-6)

    left_out, both = np.arange(24) % 5, np.arange(24) == 4
    biases = [np.where((left_out == i) | both, -np.inf, 0).astype(np.float32) for i in range(2)]
    low = [np.where(np.isinf(bias), -1e5, array) for bias, array in zip(biases, (student, teacher), strict=True)]
    exact, d_student, d_teacher, *_ = _divergence(*low, 1.0, "jensen_shannon", mixture)

    @jax.jit
    def without(*arrays):
        if way == "dense":
            held = (array + bias[None] for array, bias in zip(arrays, biases, strict=True))
            return DISTILLATION[way](*held, reduction="sum", **options)
        of_biases = {"bias": biases[0], "teacher_bias": biases[1]}
        return DISTILLATION[way](*arrays, reduction="sum", **of_biases, **options)

    value, gradients = jax.value_and_grad(without, (0, 1))(student, teacher)
    np.testing.assert_allclose(value, exact.sum(), rtol=2e-6)
    for result, expected, bias in zip(gradients, (d_student, d_teacher), biases, strict=True):
        np.testing.assert_allclose(result, expected, rtol=2e-6, atol=1e-6)
        assert not np.asarray(result)[:, np.isinf(bias)].any()


@pytest.mark.thorough
def test_reverse_is_forward_with_the_roles_swapped(rng):
    """To the last bit, and in the blocks that the student wants."""
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((80, 3), (3, 24), (80, 24))]

    def lazy(hidden, kernel, **how):
        return jaxce.LinearLogits(hidden, kernel, recompute=True, **how)

    def results(divergence, is_swapped):
        def losses(hidden, kernel, held):
            five, seven = (lazy(hidden, scale * kernel, block_bytes=4 * 80 * n) for scale, n in ((1, 5), (2, 7)))
            pairs = (five, seven), (held, 2 * held)
            if is_swapped:
                pairs = (lazy(hidden, 2 * kernel, block_bytes=4 * 80 * 5), five), (2 * held, held)
            return sum(jaxce.distillation_loss(*pair, temperature=2.0, divergence=divergence) for pair in pairs)

        return jax.jit(jax.value_and_grad(losses, (0, 1, 2)))(*arrays)

    jax.tree.map(np.testing.assert_array_equal, results("reverse", False), results("forward", True))


@functools.cache
def _with_pullback(way):
    def of_temperature(student, teacher, temperature):
        losses = functools.partial(DISTILLATION[way], temperature=temperature, reduction="none")
        divergence, pullback = jax.vjp(losses, student, teacher)
        return divergence, pullback(jnp.ones(80))

    return jax.jit(of_temperature)


@pytest.mark.parametrize("way", daily(["dense", "head, blocks of 5", "head, forward gradients"], ["dense"]))
def test_distillation_far_from_agreement(way, rng):
    """From 0.1 to 1e4 nats, and with classes that the teacher leaves out."""
    student, teacher = _apart(rng)
    exact, d_student, d_teacher, *_ = _divergence(student, teacher, 1.0)
    assert exact.min() < 1
    assert exact.max() > 1e4
    losses = functools.partial(DISTILLATION[way], reduction="none")
    np.testing.assert_allclose(losses(student, teacher), exact, rtol=2e-6)
    summed = jax.jit(jax.grad(lambda *arrays: DISTILLATION[way](*arrays, reduction="sum"), (0, 1)))
    for result, expected in zip(summed(student, teacher), (d_student, d_teacher), strict=True):
        scale = np.maximum(1, exact)[:, None]
        np.testing.assert_allclose(result / scale, expected / scale, rtol=2e-6, atol=2e-6)

    def left_out(name, array):
        """Without class 3, of a head by its bias."""
        bias = np.where(np.arange(24) == 3, -np.inf, 0).astype(np.float32)
        return (array + bias, {}) if way == "dense" else (array, {name: bias})

    without = _divergence(np.delete(student, 3, 1), np.delete(teacher, 3, 1), 1.0)[0]
    z = student.astype(np.float64)
    rest = np.logaddexp.reduce(z, -1) - np.logaddexp.reduce(np.delete(z, 3, 1), -1)
    array, options = left_out("teacher_bias", teacher)
    np.testing.assert_allclose(losses(student, array, **options), without + rest, rtol=2e-6)

    array, options = left_out("bias", student)
    np.testing.assert_array_equal(losses(array, teacher, **options), np.inf)
    gradient = jax.grad(lambda z: DISTILLATION[way](z, teacher, reduction="sum", **options))(array)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("num_classes", [50257, 131072])
def test_long_rows_lose_nothing_in_their_sums(num_classes, rng):
    """One by one, in float32, the terms of a row this long are off by 2e-6 and more."""
    logits, labels = rng.normal(0, 2, (8, num_classes)).astype(np.float32), np.arange(8)
    exact = logits.astype(np.float64)
    maximum = exact.max(-1)
    log_z = np.log(np.exp(exact - maximum[:, None]).sum(-1)) + maximum
    losses = jaxce.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(losses, log_z - exact[np.arange(8), labels], rtol=3e-7)
    spread = jaxce.summarize(logits, labels, class_vector=np.ones(num_classes, np.float32)).spread
    np.testing.assert_allclose(spread, num_classes * log_z - exact.sum(-1), rtol=3e-7)
