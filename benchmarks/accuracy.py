"""The worst errors of loss and gradient, in units in the last place, against 50 digits.

One row of logits at a time, of kinds where float32 loses what a loss is made of. The oracle is that of the tests.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import mpmath
import numpy as np
from tqdm import tqdm

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS, in_float64
from benchmarks.report import NOT_INSTALLED, table
from tests import oracle

LIBRARIES = ["jaxce", "optax", "plain JAX", "PyTorch"]
ROWS, CLASSES = 16, 100


class Kind(NamedTuple):
    """Rows of one kind: changes the logits, given as normal with spread 2, where `at_label` is the label's place."""

    change: Callable[[np.ndarray, np.ndarray], Any] = lambda logits, at_label: logits
    classes: int = CLASSES
    rows: int = ROWS
    dtype: str = "float32"
    targets: str = "labels"  # or "distributions", or "distributions with a 0" where the first class is left out
    label_smoothing: float = 0.0


def _ahead(nats: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The label's logit, so far from the largest of the others."""
    return lambda logits, at_label: np.where(at_label, np.where(at_label, -np.inf, logits).max(-1) + nats, logits)


def _ties(logits: np.ndarray, at_label: np.ndarray) -> np.ndarray:
    return np.minimum(logits, 1)  # some thirty are the largest


def _dominance(logits: np.ndarray, at_label: np.ndarray) -> np.ndarray:
    return logits + 60 * np.roll(at_label, 1)


def _without_a_class(logits: np.ndarray, at_label: np.ndarray) -> np.ndarray:
    return np.where(np.roll(at_label, 1), -np.inf, logits)


def _without_the_first(logits: np.ndarray, at_label: np.ndarray) -> np.ndarray:
    return np.where(np.arange(logits.size) == 0, -np.inf, logits)


KINDS = {
    "ordinary": Kind(),
    "common offset 1e4": Kind(lambda logits, at_label: logits + 1e4),
    **{f"target ahead by {nats} nats": Kind(_ahead(nats)) for nats in (10, 17, 40, 70)},
    "target behind by 1e4": Kind(_ahead(-1e4)),
    "ties for the largest": Kind(_ties),
    "all logits equal": Kind(lambda logits, at_label: 0 * logits),
    "another class ahead by 60": Kind(_dominance),
    "−inf in another class": Kind(_without_a_class),
    "−inf, distribution 0 there": Kind(_without_the_first, targets="distributions with a 0"),
    "bfloat16, ordinary": Kind(dtype="bfloat16"),
    "bfloat16, target ahead by 20": Kind(_ahead(20), dtype="bfloat16"),
    "50257 classes": Kind(classes=50257, rows=2),
    "smoothing 0.125": Kind(label_smoothing=0.125),
    "distributions": Kind(targets="distributions"),
    "logits near 1e8": Kind(lambda logits, at_label: 1e8 + 8 * np.round(logits)),
}


def rows_of(kind: Kind, count: int):
    """Logits (1, C) as they are stored, and their target: a label, or a distribution."""
    rng = np.random.default_rng(0)
    for _ in range(min(kind.rows, count)):
        label = rng.integers(kind.classes)
        logits = kind.change(2 * rng.standard_normal(kind.classes), np.arange(kind.classes) == label)
        logits = np.asarray(logits, np.float32).astype(jnp.dtype(kind.dtype))[None]
        if kind.targets == "labels":
            yield logits, np.array([label], np.int32)
            continue
        powers = np.exp(2 * rng.standard_normal(kind.classes))
        if kind.targets == "distributions with a 0":
            powers[0] = 0
        yield logits, (powers / powers.sum()).astype(np.float32)[None]


def exact(logits: np.ndarray, target: np.ndarray, smoothing: float) -> tuple[Any, list[Any], list[Any]]:
    """(1−ε) nll + (ε/C) spread and its gradient, to 50 digits, and the sizes of what its entries are made of."""
    classes = logits.size
    label = None if target.ndim else int(target)
    _, nll, spread, p = oracle.row(logits, target if label is None else label, np.ones(classes) if smoothing else None)
    shares = [mpmath.mpf(c == label if target.ndim == 0 else float(target[c])) for c in range(classes)]
    mass, kept, uniform = mpmath.fsum(shares), 1 - mpmath.mpf(smoothing), mpmath.mpf(smoothing) / classes
    loss = kept * nll + (uniform * spread if smoothing else 0)
    pushes = [(kept * mass + smoothing) * pc for pc in p]
    pulls = [kept * tc + uniform for tc in shares]
    gradient = [push - pull for push, pull in zip(pushes, pulls, strict=True)]
    is_label = target.ndim == 0 and not smoothing
    sizes = gradient if is_label else [push + pull for push, pull in zip(pushes, pulls, strict=True)]
    return loss, gradient, sizes


def ulps(value: float, true: Any, dtype: str, size: Any = None) -> float:
    """The error in units of the last place of `size`, or of the true value; NaN and inf stay.

    Subnormal values are left out.
    """
    info = jnp.finfo(dtype)
    if not math.isfinite(value):
        return value
    if abs(true) < info.tiny:
        return 0.0 if true or not value else math.inf  # a class that is left out has a gradient of exactly 0
    unit = mpmath.ldexp(1, mpmath.frexp(true if size is None else size)[1] - 1 - info.nmant)
    return float(abs(mpmath.mpf(value) - true) / unit)


@functools.cache
def step_of(library: str, case: Case) -> Any:
    """One compiled step for all kinds of a shape."""
    return CONTENDERS[library](case)


def worst(kind: Kind, data: list[Any], library: str) -> list[str]:
    """Of loss and of gradient, in words; data is logits, targets, and what `exact` says."""
    targets = kind.targets.split()[0]
    case = Case("accuracy", (1, kind.classes), kind.dtype, targets, label_smoothing=kind.label_smoothing)
    try:
        make_ready = step_of(library, case)
    except ImportError:
        return [NOT_INSTALLED] * 2
    errors: tuple[list[float], list[float]] = ([], [])
    for logits, target, true_loss, true_gradient, sizes in data:
        loss, (gradient,) = make_ready([logits, target]).call()
        errors[0].append(ulps(float(in_float64(loss)), true_loss, "float32"))
        entries = zip(in_float64(gradient)[0], true_gradient, sizes, strict=True)
        errors[1].append(float(np.max([ulps(float(value), true, kind.dtype, size) for value, true, size in entries])))
    return [_in_words(float(np.max(part))) for part in errors]


def _in_words(error: float) -> str:
    if not math.isfinite(error):
        return "NaN" if math.isnan(error) else "inf"
    if error < 10:
        return f"{error:.2g}"
    return f"{error:.0f}" if error < 1000 else f"{error:.0e}".replace("e+0", "e")


def report(contenders: list[str], count: int = ROWS) -> str:
    libraries = [library for library in LIBRARIES if library in contenders]
    rows = []
    for name, kind in tqdm(KINDS.items(), desc="accuracy"):
        data = [
            (logits, target, *exact(logits[0], target[0], kind.label_smoothing))
            for logits, target in rows_of(kind, count)
        ]
        rows.append([name, *(cell for library in libraries for cell in worst(kind, data, library))])
    header = [f"{library}, {part}" for library in libraries for part in ("loss", "gradient")]
    return f"""## Worst errors

In units in the last place of the true value, against 50 digits of the logits as they are stored. An entry of the
gradient of smoothed labels and of distributions is p − t, where digits cancel: its unit is that of p + t. What is shown
is the largest over {count} rows of {CLASSES} classes (50257: 2 rows) and, for the gradient, over its entries. 0.5 is a
correctly rounded result, 2e7 one where nothing is left. Losses are float32, of bfloat16 logits too, which all but jaxce
get cast to it; gradients have the dtype of the logits. Entries whose true value is subnormal are left out.

{table(["rows", *header], rows)}
"""
