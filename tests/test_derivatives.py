"""Every way of differentiating every loss, by every floating argument, against the plain formula in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import unoptimized
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads
from marks import daily, except_for
from modes import all_modes, plain_modes

import jaxce

N, C = 3, 4
RNG = np.random.default_rng(1)
LABELS = np.array([2, 0, 3])
LOGITS = RNG.normal(0, 2, (N, C))
OTHER_LOGITS = RNG.normal(0, 2, (N, C))
LISTED = np.array([[1, 3, 1], [0, 0, 2], [2, -1, 3]])  # twice, and padding
MASSES = np.linspace(0.3, 0.9, LISTED.size).reshape(LISTED.shape) * (LISTED >= 0)
DISTRIBUTION = RNG.uniform(0.1, 1, (N, C))  # does not sum to 1
CLASS_WEIGHTS = RNG.uniform(0.5, 2, C)
WEIGHTS = RNG.uniform(0.5, 2, N)
COSTS = np.linspace(-1, 3, C * C).reshape(C, C) ** 2
COTANGENT = RNG.normal(size=N)
ELEMENT_COTANGENT = RNG.normal(size=(N, C))


class Case(NamedTuple):
    loss: object  # arguments by name → losses of the rows, or a scalar
    reference: object
    arguments: dict


def _total(losses):
    cotangent = {0: np.ones(()), 1: COTANGENT, 2: ELEMENT_COTANGENT}[losses.ndim]
    return jnp.sum(jnp.asarray(cotangent) * losses)


def _labels():
    return jnp.asarray(LABELS)


def _entropy_of_right_rows(summary):
    return summary.entropy * jnp.where(summary.argmax == LABELS.astype(np.int32), 1.5, 0.5)


def _of_listed(masses):
    return jnp.sum(jax.nn.one_hot(LISTED, C) * masses[..., None], 1)


def _mean(logits, targets, class_weights, weights, label_smoothing, z_loss):
    losses = plain.cross_entropy(logits, targets, class_weights, weights, label_smoothing, z_loss)
    return jnp.sum(losses) / plain.divisor(targets, class_weights, weights)


ROW = {"class_weights": CLASS_WEIGHTS, "weights": WEIGHTS, "label_smoothing": 0.1, "z_loss": 0.05}


def _distillation(divergence, **settings):
    def loss(weights, **arguments):
        return jaxce.distillation_loss(divergence=divergence, weights=weights, reduction="none", **arguments)

    def reference(weights, **arguments):
        return weights * plain.distillation(divergence=divergence, **arguments)

    arguments = {"logits": LOGITS, "teacher_logits": OTHER_LOGITS, "temperature": 2.0, "weights": WEIGHTS}
    return Case(loss, reference, arguments | settings)


CASES = {
    "cross_entropy": Case(
        lambda logits: jaxce.cross_entropy(logits, _labels(), reduction="none"),
        lambda logits: plain.cross_entropy(logits, _labels()),
        {"logits": LOGITS},
    ),
    "cross_entropy at ties": Case(
        lambda logits: jaxce.cross_entropy(logits, _labels(), label_smoothing=0.1, reduction="none"),
        lambda logits: plain.cross_entropy(logits, _labels(), label_smoothing=0.1),
        {"logits": np.zeros((N, C))},
    ),
    "cross_entropy of distributions at ties": Case(
        lambda logits, targets: jaxce.cross_entropy(logits, targets, reduction="none"),
        lambda logits, targets: plain.cross_entropy(logits, targets),
        {"logits": np.array([[1.0, 1, 0, -2], [0, 0, 0, 0], [3, 3, 3, -1]]), "targets": DISTRIBUTION},
    ),
    "cross_entropy with options": Case(
        lambda **arguments: jaxce.cross_entropy(targets=_labels(), reduction="none", **arguments),
        lambda **arguments: plain.cross_entropy(targets=_labels(), **arguments),
        {"logits": LOGITS, **ROW},
    ),
    "mean cross_entropy with options": Case(
        lambda **arguments: jaxce.cross_entropy(targets=_labels(), **arguments),
        lambda **arguments: _mean(targets=_labels(), **arguments),
        {"logits": LOGITS, **ROW},
    ),
    "cross_entropy of distributions": Case(
        lambda **arguments: jaxce.cross_entropy(reduction="none", **arguments),
        lambda **arguments: plain.cross_entropy(**arguments),
        {"logits": LOGITS, "targets": DISTRIBUTION, **ROW},
    ),
    "mean cross_entropy of distributions": Case(
        lambda **arguments: jaxce.cross_entropy(**arguments),
        lambda **arguments: _mean(**arguments),
        {"logits": LOGITS, "targets": DISTRIBUTION, **ROW},
    ),
    "cross_entropy of listed classes": Case(
        lambda masses, **arguments: jaxce.cross_entropy(
            targets=jaxce.SparseTargets(LISTED, masses), reduction="none", **arguments
        ),
        lambda masses, **arguments: plain.cross_entropy(targets=_of_listed(masses), **arguments),
        {"logits": LOGITS, "masses": MASSES, **ROW},
    ),
    "summarize": Case(
        lambda logits, targets, class_vector: sum(
            scale * number
            for scale, number in zip(
                (0.3, 0.7, -0.2, 0.4),
                jaxce.summarize(logits, targets, class_vector=class_vector, entropy=True)[:4],
                strict=True,
            )
        ),
        lambda logits, targets, class_vector: (
            0.3 * jax.nn.logsumexp(logits, axis=-1)
            + 0.7 * plain.cross_entropy(logits, targets)
            - 0.2 * plain.cross_entropy(logits, jnp.broadcast_to(class_vector, (N, C)))
            + 0.4 * plain.entropy(logits)
        ),
        {"logits": LOGITS, "targets": DISTRIBUTION, "class_vector": CLASS_WEIGHTS},
    ),
    "summarize with entropy and argmax": Case(
        lambda logits: _entropy_of_right_rows(jaxce.summarize(logits, _labels(), entropy=True, argmax=True)),
        lambda logits: plain.entropy(logits) * jnp.where(jnp.argmax(logits, -1) == _labels(), 1.5, 0.5),
        {"logits": LOGITS},
    ),
    "nll_loss": Case(
        lambda log_probs, class_weights, weights: jaxce.nll_loss(
            log_probs, _labels(), class_weights=class_weights, weights=weights, reduction="none"
        ),
        lambda log_probs, class_weights, weights: weights * class_weights[_labels()] * plain.nll(log_probs, _labels()),
        {"log_probs": LOGITS, "class_weights": CLASS_WEIGHTS, "weights": WEIGHTS},
    ),
    "focal_loss": Case(
        lambda logits, gamma, class_weights, weights: jaxce.focal_loss(
            logits, _labels(), gamma=gamma, class_weights=class_weights, weights=weights, reduction="none"
        ),
        lambda logits, gamma, class_weights, weights: (
            weights * class_weights[_labels()] * plain.focal(logits, _labels(), gamma)
        ),
        {"logits": LOGITS, "gamma": 1.5, "class_weights": CLASS_WEIGHTS, "weights": WEIGHTS},
    ),
    "focal_loss of confident rows": Case(
        lambda logits, gamma: jaxce.focal_loss(logits, _labels(), gamma=gamma, reduction="none"),
        lambda logits, gamma: plain.focal(logits, _labels(), gamma),
        {"logits": LOGITS + 6 * np.eye(C)[LABELS], "gamma": 0.5},
    ),
    "poly_loss": Case(
        lambda logits, epsilon, class_weights, weights: jaxce.poly_loss(
            logits, _labels(), epsilon=epsilon, class_weights=class_weights, weights=weights, reduction="none"
        ),
        lambda logits, epsilon, class_weights, weights: (
            weights * class_weights[_labels()] * plain.poly(logits, _labels(), epsilon)
        ),
        {"logits": LOGITS, "epsilon": 1.5, "class_weights": CLASS_WEIGHTS, "weights": WEIGHTS},
    ),
    "distillation_loss": _distillation("forward"),
    "distillation_loss, reverse": _distillation("reverse"),
    "distillation_loss, jensen_shannon": _distillation("jensen_shannon", mixture=0.3),
    "expected_cost": Case(
        lambda logits, costs, weights: jaxce.imbalance.expected_cost(
            logits, _labels(), costs, weights=weights, reduction="none"
        ),
        lambda logits, costs, weights: weights * plain.expected_cost(logits, _labels(), costs),
        {"logits": LOGITS, "costs": COSTS, "weights": WEIGHTS},
    ),
    "expected_cost of distributions": Case(
        lambda logits, targets, costs: jaxce.imbalance.expected_cost(logits, targets, costs, reduction="none"),
        lambda logits, targets, costs: plain.expected_cost(logits, targets, costs),
        {"logits": LOGITS, "targets": DISTRIBUTION, "costs": COSTS},
    ),
    "multi_margin_loss": Case(
        lambda logits, margin, class_weights, weights: jaxce.multi_margin_loss(
            logits, _labels(), p=2, margin=margin, class_weights=class_weights, weights=weights, reduction="none"
        ),
        lambda logits, margin, class_weights, weights: (
            weights * class_weights[_labels()] * plain.multi_margin(logits, _labels(), margin, 2)
        ),
        {"logits": LOGITS, "margin": 1.5, "class_weights": CLASS_WEIGHTS, "weights": WEIGHTS},
    ),
    "binary_cross_entropy": Case(
        lambda logits, targets, pos_weight, weights, label_smoothing: jaxce.binary_cross_entropy(
            logits,
            targets,
            pos_weight=pos_weight,
            weights=weights,
            label_smoothing=label_smoothing,
            reduction="none",
        ),
        lambda logits, targets, pos_weight, weights, label_smoothing: (
            weights * plain.binary(logits, targets * (1 - label_smoothing) + label_smoothing / 2, pos_weight)
        ),
        {
            "logits": LOGITS,
            "targets": DISTRIBUTION,
            "pos_weight": CLASS_WEIGHTS,
            "weights": np.abs(ELEMENT_COTANGENT),
            "label_smoothing": 0.1,
        },
    ),
    "binary_cross_entropy at zero": Case(
        lambda logits, targets: jaxce.binary_cross_entropy(logits, targets, reduction="none"),
        lambda logits, targets: plain.binary(logits, targets),
        {"logits": np.zeros((N, C)), "targets": np.eye(N, C)},
    ),
    "binary_focal_loss": Case(
        lambda logits, targets, gamma, alpha: jaxce.binary_focal_loss(
            logits, targets, gamma=gamma, alpha=alpha, reduction="none"
        ),
        lambda logits, targets, gamma, alpha: plain.binary_focal(logits, targets, gamma, alpha),
        {"logits": LOGITS, "targets": DISTRIBUTION, "gamma": 1.5, "alpha": 0.25},
    ),
    "binary_focal_loss of hard targets": Case(
        lambda logits, targets, gamma: jaxce.binary_focal_loss(logits, targets, gamma=gamma, reduction="none"),
        lambda logits, targets, gamma: 2 * plain.binary_focal(logits, targets, gamma, 0.5),
        {"logits": LOGITS * (np.arange(C) > 0), "targets": np.eye(N, C), "gamma": 0.5},
    ),
    "mse_loss": Case(
        lambda predictions, targets, weights: jaxce.mse_loss(predictions, targets, weights=weights, reduction="none"),
        lambda predictions, targets, weights: weights * (predictions - targets) ** 2,
        {"predictions": LOGITS, "targets": DISTRIBUTION, "weights": np.abs(ELEMENT_COTANGENT)},
    ),
    "l1_loss": Case(
        lambda predictions, targets, weights: jaxce.l1_loss(predictions, targets, weights=weights, reduction="none"),
        lambda predictions, targets, weights: weights * jnp.abs(predictions - targets),
        {"predictions": LOGITS, "targets": DISTRIBUTION, "weights": np.abs(ELEMENT_COTANGENT)},
    ),
    "reduce_losses": Case(
        lambda losses, weights: jaxce.reduce_losses(losses, weights),
        lambda losses, weights: jnp.sum(losses * weights) / jnp.sum(weights),
        {"losses": LOGITS, "weights": np.abs(ELEMENT_COTANGENT)},
    ),
}


def _flat(case):
    """The arguments as one vector, and loss and reference as scalar functions of it."""
    vector, unravel = ravel_pytree({name: jnp.asarray(value) for name, value in case.arguments.items()})

    def of_vector(function):
        return lambda vector: _total(function(**unravel(vector)))

    return vector, of_vector(case.loss), of_vector(case.reference)


LONG = (
    "cross_entropy",
    "cross_entropy of listed classes",
    "cross_entropy at ties",
    "mean cross_entropy with options",
    "poly_loss",
    "summarize",
    "distillation_loss",
    "distillation_loss, reverse",
    "distillation_loss, jensen_shannon",
    "focal_loss of confident rows",
    "mean cross_entropy of distributions",
    "cross_entropy of distributions at ties",
    "binary_focal_loss of hard targets",
    "expected_cost of distributions",
    "binary_focal_loss",
)


IN_EVERY_MODE = "cross_entropy with options"  # every day, and the other losses in these:
DAILY_MODES = ("value", "value of value_and_grad", "value_and_grad", "linearize", "hessian", "rev over rev")


@pytest.mark.parametrize("name", except_for(CASES, LONG))
def test_every_mode_agrees_with_the_plain_formula(name, x64, request):
    is_every = name == IN_EVERY_MODE or request.config.getoption("--thorough")
    _compare_modes(name, jax.vmap, chosen=None if is_every else DAILY_MODES)


UNMAPPED = ["cross_entropy", "cross_entropy with options", "cross_entropy of distributions", "distillation_loss"]
UNMAPPED += ["distillation_loss, jensen_shannon"]


@pytest.mark.parametrize("name", daily(UNMAPPED, ["cross_entropy"]))
def test_every_mode_works_without_vmap(name, x64):
    _compare_modes(name)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy with options", "binary_focal_loss"])
def test_every_mode_works_without_jit(name, x64):
    _compare_modes(name, jit=lambda f: f)


def _compare_modes(name, vmap=None, *, jit=unoptimized.jit, chosen=None):
    x, loss, reference = _flat(CASES[name])
    x = np.stack([x, x * 1.01]) if vmap else np.asarray(x)
    v = RNG.normal(size=x.shape)
    wrap = vmap or (lambda f: f)
    expected = unoptimized.jit(wrap(plain_modes(reference, chosen)))(x, v)
    results = jit(wrap(all_modes(loss, chosen)))(jnp.asarray(x), jnp.asarray(v))
    for mode, result in results.items():
        np.testing.assert_allclose(result, expected[mode], rtol=1e-9, atol=1e-10, err_msg=mode)
        if mode.startswith("value of"):
            np.testing.assert_allclose(result, results["value"], rtol=1e-14, err_msg=mode)


CHECKED_DAILY = {("cross_entropy", "logits")}
ARGUMENTS = [
    pytest.param(name, argument, marks=[] if (name, argument) in CHECKED_DAILY else [pytest.mark.thorough])
    for name, case in CASES.items()
    if "mean" not in name
    for argument in case.arguments
    if argument != "masses"  # finite differences would give padding a mass
]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_check_grads(name, argument, x64):
    case = CASES[name]
    arguments = {key: jnp.asarray(value) for key, value in case.arguments.items()}

    def of_argument(value):
        return _total(case.loss(**{**arguments, argument: value}))

    check_grads(jax.jit(of_argument), (arguments[argument],), order=2, modes=("fwd", "rev"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", daily(["forward", "reverse", "jensen_shannon"], ["reverse"]))
def test_second_derivatives_where_both_models_leave_a_class_out(divergence, x64):
    """They are those of the other classes, by the temperature too."""

    def loss(logits, teacher_logits, temperature, mixture):
        options = {"temperature": temperature, "mixture": mixture, "divergence": divergence}
        return jaxce.distillation_loss(logits, teacher_logits, **options)

    @unoptimized.jit
    def second(*arguments):
        def slope(*arguments):
            gradients = jax.grad(loss, (0, 1, 2, 3))(*arguments)
            return sum(jnp.sum(jnp.cos(gradient)) for gradient in gradients)

        return jax.grad(slope, (0, 1, 2, 3))(*arguments)

    logits, teacher_logits = jnp.asarray(LOGITS[0]), jnp.asarray(OTHER_LOGITS[0])
    results = second(logits.at[1].set(-jnp.inf), teacher_logits.at[1].set(-jnp.inf), 1.5, 0.3)
    expected = second(jnp.delete(logits, 1), jnp.delete(teacher_logits, 1), 1.5, 0.3)
    for result in results[:2]:
        assert result[1] == 0
    results = [jnp.delete(result, 1) if result.ndim else result for result in results]
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-12, atol=1e-14)


def test_gradient_is_linear_in_the_cotangent_and_sums_to_zero(x64):
    def gradient(scale):
        return jax.grad(lambda z: scale * jaxce.cross_entropy(z, _labels(), label_smoothing=0.1, reduction="sum"))(
            jnp.asarray(LOGITS)
        )

    np.testing.assert_allclose(gradient(2.0), 2 * gradient(1.0), rtol=1e-15)
    np.testing.assert_allclose(gradient(1.0).sum(-1), 0, atol=1e-15)


def test_one_forward_pass_serves_two_pullbacks(x64):
    logits = jnp.asarray(LOGITS)
    _, pullback = jax.vjp(lambda z: jaxce.cross_entropy(z, _labels(), reduction="none"), logits)
    first, second = pullback(jnp.asarray(COTANGENT)), pullback(jnp.ones(N))
    plain_pullback = jax.vjp(lambda z: plain.cross_entropy(z, _labels()), logits)[1]
    np.testing.assert_allclose(first, plain_pullback(jnp.asarray(COTANGENT)), rtol=1e-12)
    np.testing.assert_allclose(second, plain_pullback(jnp.ones(N)), rtol=1e-12)


def test_logits_may_serve_two_losses_and_be_donated(x64):
    def both(z):
        return jaxce.cross_entropy(z, _labels()) + jaxce.focal_loss(z, _labels())

    expected = jax.grad(lambda z: plain.cross_entropy(z, _labels()).mean() + plain.focal(z, _labels(), 2.0).mean())(
        jnp.asarray(LOGITS)
    )
    donated = jax.jit(jax.grad(both), donate_argnums=0)(jnp.array(LOGITS))
    np.testing.assert_allclose(donated, expected, rtol=1e-12)


def test_labels_pass_through_vjp_and_vmap(x64):
    logits = jnp.asarray(LOGITS)
    _, pullback = jax.vjp(lambda z, y: jaxce.cross_entropy(z, y), logits, _labels())
    assert pullback(jnp.ones(()))[1].dtype == jax.dtypes.float0
    over_labels = jax.vmap(lambda y: jaxce.cross_entropy(logits[0], y))(jnp.arange(C))
    np.testing.assert_allclose(over_labels, -jax.nn.log_softmax(logits[0]), rtol=1e-14)
