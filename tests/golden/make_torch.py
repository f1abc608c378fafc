"""What PyTorch computes, for tests that run without it: `python tests/golden/make_torch.py` writes torch.json.

`CASES` is a table of calls to `torch.nn.functional`, in groups that compile together. The file holds their float64
values and gradients on the numbers of seed 0; where PyTorch is installed the tests run the same table on others.
"""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILE = Path(__file__).with_name("torch.json")
NUM_CLASSES = 4
SHAPES = {"S": (), "C": (4,), "NC": (3, 4), "NC1": (2, 4, 3), "NC12": (2, 4, 3, 2), "empty": (0, 4)}
REDUCTIONS = ("none", "mean", "sum")


class Case(NamedTuple):
    """A call, its arrays by the names that `draw` gives them, and the arguments that it is differentiated by."""

    group: str
    name: str
    loss: str
    arrays: dict[str, str]
    by: tuple[str, ...]
    options: dict[str, Any]
    cotangent: str | None


def draw(seed: int) -> dict[str, np.ndarray]:
    """All arrays, float64 or int64, by name."""
    rng = np.random.default_rng(seed)
    arrays = {
        "class_weights": rng.uniform(0.2, 3, NUM_CLASSES),
        "weight_for_3": np.array([0.0, 0.0, 0.0, 2.0]),
        "pos_weight": rng.uniform(0.2, 3, NUM_CLASSES),
        "factor": rng.uniform(0.2, 3, 1),
    }
    for key, shape in SHAPES.items():
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        axis = min(len(shape) - 1, 1)
        logits = rng.normal(0, 2, shape)
        labels = rng.integers(0, NUM_CLASSES, rows)
        labels.flat[:3] = [1, 2, 0][: labels.size]
        masked = labels.copy()
        masked.flat[1::3] = -100
        arrays |= {
            f"logits_{key}": logits,
            f"log_probs_{key}": _log_softmax(logits, axis),
            f"log_targets_{key}": _log_softmax(rng.normal(0, 2, shape), axis),
            f"probs_{key}": rng.uniform(0.05, 1, shape),
            f"weights_{key}": rng.uniform(0.2, 3, shape),
            f"labels_{key}": labels,
            f"masked_{key}": masked,
            f"all_masked_{key}": np.full(rows, -100),
            f"row_cotangent_{key}": rng.normal(0, 1, rows),
            f"cotangent_{key}": rng.normal(0, 1, shape),
        }
    arrays |= {
        "hidden_C": rng.normal(0, 1, 5),
        "hidden_NC": rng.normal(0, 1, (3, 5)),
        "linear_weight": rng.normal(0, 1, (NUM_CLASSES, 5)),
        "linear_bias": rng.normal(0, 1, NUM_CLASSES),
        "hidden_empty": np.zeros((0, 5)),
    }
    for key in ("NC1", "NC12"):
        arrays |= {
            f"hidden_{key}": rng.normal(0, 1, (SHAPES[key][0], 5)),
            f"linear_weight_{key}": rng.normal(0, 1, (NUM_CLASSES, *SHAPES[key][2:], 5)),
            f"linear_bias_{key}": rng.normal(0, 1, (NUM_CLASSES, *SHAPES[key][2:])),
        }
    arrays["hard_NC"] = np.eye(NUM_CLASSES)[arrays["labels_NC"]]
    arrays["impossible_NC"] = np.where(np.arange(NUM_CLASSES) == 3, -np.inf, arrays["logits_NC"])
    return {name: np.asarray(array) for name, array in arrays.items()}


def run(case: Case, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Value and gradients of a case in PyTorch."""
    import torch  # late: the table is of use without it

    tensors = {argument: torch.tensor(arrays[name]) for argument, name in case.arrays.items()}
    for argument in case.by:
        tensors[argument].requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "reduction: 'mean' divides")  # kl_div
        value = getattr(torch.nn.functional, case.loss)(**tensors, **case.options)
    cotangent = torch.ones_like(value) if case.cotangent is None else torch.tensor(arrays[case.cotangent])
    gradients = torch.autograd.grad(value, [tensors[argument] for argument in case.by], cotangent)
    return value.detach().numpy(), {name: g.numpy() for name, g in zip(case.by, gradients, strict=True)}


def load() -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]]:
    """The file's arrays, and its values and gradients by the names of the cases."""
    stored = json.loads(FILE.read_text())
    results = {
        name: (_unpack(result["value"]), {argument: _unpack(g) for argument, g in result["gradients"].items()})
        for name, result in stored["results"].items()
    }
    return {name: _unpack(array) for name, array in stored["arrays"].items()}, results


def _cases():
    yield from _cross_entropy()
    yield from _nothing()
    for key in ("C", "NC", "NC1", "NC12"):
        for weight, ignore_index in itertools.product((False, True), (-100, 2)):
            target = f"masked_{key}" if ignore_index == -100 else f"labels_{key}"
            arrays = {"input": f"log_probs_{key}", "target": target} | _weight(weight)
            yield from _reduced(f"nll-{key}", "nll_loss", key, arrays, ("input",), {"ignore_index": ignore_index})
    for key, weight, (p, margin) in itertools.product(("C", "NC"), (False, True), ((1, 1.0), (1, -0.3), (2, 0.5))):
        arrays = {"input": f"logits_{key}", "target": f"labels_{key}"} | _weight(weight)
        yield from _reduced(f"margin-{key}", "multi_margin_loss", key, arrays, ("input",), {"p": p, "margin": margin})
    yield from _linear()
    yield from _positions()
    yield from _elementwise()
    for key, dims in {"S": (0,), "C": (0,), "NC": (0, 1, -1), "NC12": (1, 3)}.items():
        for loss, dim in itertools.product(("softmax", "log_softmax"), dims):
            arrays = {"input": f"logits_{key}"}
            yield Case("softmax", f"{loss}-{key}-{dim}", loss, arrays, ("input",), {"dim": dim}, f"cotangent_{key}")


def _cross_entropy():
    for key, weight, smoothing in itertools.product(("C", "NC", "NC1", "NC12"), (False, True), (0.0, 0.1)):
        for ignore_index in (-100, 2):
            target = f"masked_{key}" if ignore_index == -100 else f"labels_{key}"
            arrays = {"input": f"logits_{key}", "target": target} | _weight(weight)
            options = {"ignore_index": ignore_index, "label_smoothing": smoothing}
            yield from _reduced(f"labels-{key}", "cross_entropy", key, arrays, ("input",), options)
        arrays = {"input": f"logits_{key}", "target": f"probs_{key}"} | _weight(weight)
        options = {"label_smoothing": smoothing}
        yield from _reduced(f"probabilities-{key}", "cross_entropy", key, arrays, tuple(arrays), options)
    arrays = {"input": "logits_NC", "target": "hard_NC"} | _weight(True)
    yield from _reduced("probabilities-NC", "cross_entropy", "NC", arrays, tuple(arrays), {})
    arrays = {"input": "impossible_NC", "target": "labels_NC"} | _weight(True)
    yield from _reduced("impossible", "cross_entropy", "NC", arrays, ("input",), {})


def _nothing():
    for key, smoothing in itertools.product(("NC", "NC12", "empty"), (0.0, 0.1)):
        arrays = {"input": f"logits_{key}", "target": f"all_masked_{key}"} | _weight(smoothing > 0)
        yield from _reduced("nothing", "cross_entropy", key, arrays, ("input",), {"label_smoothing": smoothing})
    for key in ("NC", "NC12", "empty"):
        arrays = {"input": f"log_probs_{key}", "target": f"all_masked_{key}"}
        yield from _reduced("nothing", "nll_loss", key, arrays, ("input",), {})
    arrays = {"input": "logits_NC", "target": "labels_NC", "weight": "weight_for_3"}
    yield from _reduced("nothing", "cross_entropy", "NC", arrays, ("input",), {})
    arrays = {"input": "logits_empty", "target": "probs_empty"}
    yield from _reduced("nothing", "cross_entropy", "empty", arrays, ("input", "target"), {"label_smoothing": 0.1})
    for loss in ("binary_cross_entropy_with_logits", "mse_loss", "l1_loss", "kl_div"):
        yield from _reduced("nothing", loss, "empty", arrays, ("input", "target"), {}, elements=True)


def _linear():
    head = {"linear_weight": "linear_weight", "linear_bias": "linear_bias"}
    for key, weight, smoothing in itertools.product(("C", "NC"), (False, True), (0.0, 0.1)):
        options = {"label_smoothing": smoothing}
        arrays = {"input": f"hidden_{key}", "target": f"masked_{key}"} | head | _weight(weight)
        yield from _reduced("linear", "linear_cross_entropy", key, arrays, ("input", *head), options)
        arrays["target"] = f"probs_{key}"
        yield from _reduced("linear", "linear_cross_entropy", key, arrays, tuple(arrays), options)
    for key, target in (("NC", "all_masked_NC"), ("empty", "labels_empty"), ("empty", "probs_empty")):
        arrays = {"input": f"hidden_{key}", "target": target, "linear_weight": "linear_weight"}
        yield from _reduced("linear", "linear_cross_entropy", key, arrays, ("input", "linear_weight"), {})


def _positions():
    """Heads with a weight for each position."""
    for key, weight in itertools.product(("NC1", "NC12"), (False, True)):
        head = {"linear_weight": f"linear_weight_{key}"} | ({"linear_bias": f"linear_bias_{key}"} if weight else {})
        for target, ignore_index in (("masked", None), ("labels", 2), ("probs", None)):
            options = {"label_smoothing": 0.1 * weight, "ignore_index": ignore_index}
            arrays = {"input": f"hidden_{key}", "target": f"{target}_{key}"} | head | _weight(weight)
            by = tuple(arrays) if target == "probs" else ("input", *head)
            yield from _reduced(f"positions-{key}", "linear_cross_entropy", key, arrays, by, options)
    arrays = {"input": "hidden_NC1", "target": "all_masked_NC1", "linear_weight": "linear_weight_NC1"}
    yield from _reduced("positions-NC1", "linear_cross_entropy", "NC1", arrays, ("input", "linear_weight"), {})


def _elementwise():
    for key, factors in (
        ("S", {}),
        ("C", {}),
        ("C", {"weight": "weights_C"}),
        ("NC", {}),
        ("NC", {"weight": "weights_NC"}),
        ("NC", {"weight": "class_weights"}),
        ("NC", {"pos_weight": "pos_weight"}),
        ("NC", {"pos_weight": "factor"}),
        ("NC", {"weight": "factor", "pos_weight": "pos_weight"}),
    ):
        arrays = {"input": f"logits_{key}", "target": f"probs_{key}"} | factors
        by = ("input", "target")
        yield from _reduced("binary", "binary_cross_entropy_with_logits", key, arrays, by, {}, elements=True)
    for loss, key, weight in itertools.product(("mse_loss", "l1_loss"), ("S", "C", "NC"), (False, True)):
        arrays = {"input": f"logits_{key}", "target": f"probs_{key}"} | ({"weight": f"weights_{key}"} if weight else {})
        yield from _reduced("errors", loss, key, arrays, tuple(arrays), {}, elements=True)
    for key, log_target in itertools.product(("S", "C", "NC", "NC1"), (False, True)):
        target = f"log_targets_{key}" if log_target else f"probs_{key}"
        arrays = {"input": f"log_probs_{key}", "target": target}
        options = {"log_target": log_target}
        yield from _reduced("divergence", "kl_div", key, arrays, tuple(arrays), options, elements=True)
    arrays = {"input": "log_probs_NC", "target": "hard_NC"}
    yield from _reduced("divergence", "kl_div", "NC", arrays, ("input",), {}, elements=True)


def _reduced(group, loss, key, arrays, by, options, *, elements=False):
    """The case in every reduction; the rows' cotangent is not uniform."""
    for reduction in (*REDUCTIONS, "batchmean") if loss == "kl_div" else REDUCTIONS:
        words = [loss, *arrays.values(), *(f"{name}={value}" for name, value in options.items()), reduction]
        cotangent = f"{'cotangent' if elements else 'row_cotangent'}_{key}" if reduction == "none" else None
        yield Case(group, "-".join(words), loss, arrays, by, options | {"reduction": reduction}, cotangent)


def _weight(wanted):
    return {"weight": "class_weights"} if wanted else {}


def _log_softmax(logits, axis):
    if logits.ndim == 0:
        return -np.abs(logits)
    return logits - np.log(np.sum(np.exp(logits), axis, keepdims=True))


def _pack(array):
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": array.ravel().tolist()}


def _unpack(stored):
    return np.array(stored["data"], stored["dtype"]).reshape(stored["shape"])


def _write():
    arrays = draw(0)
    used = {name for case in CASES for name in (*case.arrays.values(), case.cotangent)}
    lines = [[f'"{name}": {json.dumps(_pack(array))}' for name, array in arrays.items() if name in used], []]
    for case in CASES:
        value, gradients = run(case, arrays)
        result = {"value": _pack(value), "gradients": {name: _pack(g) for name, g in gradients.items()}}
        lines[1].append(f'"{case.name}": {json.dumps(result)}')
    blocks = (
        f'"{key}": {{\n{joined}\n}}' for key, joined in zip(("arrays", "results"), map(",\n".join, lines), strict=True)
    )
    FILE.write_text("{" + ",\n".join(blocks) + "}\n")


CASES = list(_cases())

if __name__ == "__main__":
    _write()
