"""Losses on the device that is here against their textbook formulas in float64, of every kind of derivative.

The formulas are plain JAX and run on the CPU where JAX has one, else on the device. They share no code with the losses.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxce

ROWS, FEATURES, CLASSES, LISTED = 48, 32, 1000, 3
BLOCK_BYTES = 100_000  # several blocks both ways, the last of them smaller
MODES = ["value", "gradient", "jvp", "hvp"]
TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-2}  # against the largest entry


class Check(NamedTuple):
    name: str
    loss: Callable[..., jax.Array]
    formula: Callable[..., jax.Array]
    arrays: list[np.ndarray]  # by which both are differentiated


def checks() -> list[Check]:
    rng = np.random.default_rng(0)
    logits, teacher = (3 * rng.standard_normal((ROWS, CLASSES), np.float32) for _ in range(2))
    hidden = rng.standard_normal((ROWS, FEATURES), np.float32)
    kernel = 0.5 * rng.standard_normal((FEATURES, CLASSES), np.float32)
    labels = rng.integers(0, CLASSES, ROWS, np.int32)
    rows, where = np.arange(ROWS), labels % 3 > 0
    weights = rng.uniform(0.5, 2, CLASSES).astype(np.float32)
    listed = rng.integers(0, CLASSES, (ROWS, LISTED), np.int32)
    masses = rng.dirichlet(np.ones(LISTED), ROWS).astype(np.float32)
    masked = np.where(where[:, None], logits, np.float32(np.nan))
    options: dict[str, Any] = {"class_weights": weights, "where": where, "label_smoothing": 0.1, "z_loss": 1e-2}

    def nll(logits):
        return -jax.nn.log_softmax(logits)[rows, labels]

    def mean(logits):
        return nll(logits).mean()

    def with_options(logits):
        log_p, log_z = jax.nn.log_softmax(logits), jax.nn.logsumexp(logits, -1)
        row_weights = where * weights[labels]
        uniform = where * (log_p @ weights.astype(log_p.dtype)) / CLASSES
        total = -0.9 * row_weights * log_p[rows, labels] - 0.1 * uniform + 1e-2 * row_weights * log_z**2
        return total.sum() / row_weights.sum()

    def of_masked(logits):
        return with_options(jnp.where(where[:, None], logits, 0))

    def of_listed(logits, masses):
        return -(masses * jnp.take_along_axis(jax.nn.log_softmax(logits), listed, -1)).sum(-1).mean()

    def focal(logits):
        return ((1 - jnp.exp(-nll(logits))) ** 2 * nll(logits)).mean()

    def distillation(student, teacher):
        log_p, log_q = jax.nn.log_softmax(student / 2), jax.nn.log_softmax(teacher / 2)
        return 4 * (jnp.exp(log_q) * (log_q - log_p)).sum(-1).mean()

    cross_entropy = partial(jaxce.cross_entropy, targets=labels)
    found = [
        Check("cross_entropy", cross_entropy, lambda logits: nll(logits).mean(), [logits]),
        Check(
            "cross_entropy, bfloat16", cross_entropy, lambda logits: nll(logits).mean(), [logits.astype(jnp.bfloat16)]
        ),
        Check("cross_entropy, every option", partial(cross_entropy, **options), with_options, [logits]),
        Check("cross_entropy, NaN in masked rows", partial(cross_entropy, **options), of_masked, [masked]),
        Check(
            "cross_entropy of SparseTargets",
            lambda logits, masses: jaxce.cross_entropy(logits, jaxce.SparseTargets(listed, masses)),
            of_listed,
            [logits, masses],
        ),
        Check("focal_loss", lambda logits: jaxce.focal_loss(logits, labels, gamma=2.0), focal, [logits]),
        Check("distillation_loss", partial(jaxce.distillation_loss, temperature=2.0), distillation, [logits, teacher]),
    ]
    for way, recompute in {"class blocks": True, "row blocks": False}.items():
        blocks: dict[str, Any] = {"block_bytes": BLOCK_BYTES, "recompute": recompute}
        linear = partial(jaxce.linear_cross_entropy, targets=labels, **blocks)
        found += [
            Check(
                f"linear_cross_entropy, {way}",
                linear,
                lambda *head: mean(head[0] @ head[1]),
                [hidden, kernel],
            ),
            Check(
                f"linear_cross_entropy, {way}, every option",
                partial(linear, **options),
                lambda *head: with_options(head[0] @ head[1]),
                [hidden, kernel],
            ),
            Check(
                f"focal_loss of LinearLogits, {way}",
                lambda *head, blocks=blocks: jaxce.focal_loss(jaxce.LinearLogits(*head, **blocks), labels, gamma=2.0),
                lambda *head: focal(head[0] @ head[1]),
                [hidden, kernel],
            ),
        ]
    return found


def _derivatives(function: Callable[..., jax.Array], arrays: list[Any], directions: list[Any]) -> tuple[Any, ...]:
    """By the names of `MODES`; every one is of all arrays."""
    gradient = jax.grad(function, tuple(range(len(arrays))))
    value, slope = jax.jvp(function, tuple(arrays), tuple(directions))
    return value, gradient(*arrays), slope, jax.jvp(gradient, tuple(arrays), tuple(directions))[1]


def errors(check: Check) -> list[float]:
    """Of every mode, the largest difference to the formula's in float64, against the largest entry."""
    rng = np.random.default_rng(1)
    directions = [rng.standard_normal(array.shape).astype(array.dtype) for array in check.arrays]
    with jax.default_matmul_precision("highest"):
        found = jax.device_get(jax.jit(partial(_derivatives, check.loss))(check.arrays, directions))
    try:
        reference = jax.devices("cpu")[0]
    except RuntimeError:  # JAX was told to leave the CPU out
        reference = jax.devices()[0]
    with jax.enable_x64(True), jax.default_device(reference):
        wide = [[array.astype(np.float64) for array in arrays] for arrays in (check.arrays, directions)]
        exact = jax.device_get(jax.jit(partial(_derivatives, check.formula))(*wide))

    def error(value: Any, true: Any) -> float:
        return float(np.abs(np.asarray(value, np.float64) - true).max() / np.abs(true).max())

    pairs = zip(found, exact, strict=True)
    return [float(np.max(jax.tree.leaves(jax.tree.map(error, value, true)))) for value, true in pairs]


def rows(is_time: Callable[[], bool], smoke: bool) -> Iterator[list[str]]:
    """What a table shows of every check: its errors, and whether they are in order."""
    for check in checks()[:: 5 if smoke else 1]:
        if not is_time():
            yield [check.name, *["–"] * len(MODES), "not reached"]
            continue
        try:
            found = errors(check)
        except Exception as failure:  # whatever a driver raises: the other checks are wanted
            print(f"{check.name}: {str(failure)[:300]}", file=sys.stderr, flush=True)
            yield [check.name, *["–"] * len(MODES), f"fails: {type(failure).__name__}"]
            continue
        right = np.less_equal(found, TOLERANCES[str(check.arrays[0].dtype)]).all()  # not if NaN
        yield [check.name, *(f"{error:.1e}" for error in found), "right" if right else "WRONG"]
