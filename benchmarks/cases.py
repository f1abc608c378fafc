"""What is compared: classification heads of real models, scaled to a CPU, with their data and their exact results.

A case is shapes and options, nothing more. Its arrays come from a seed, and its reference is NumPy in float64, which
shares no code with anything that is measured.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    model: str
    shape: tuple[int, ...]  # of the logits
    dtype: str = "float32"
    kind: str = "labels"  # or "distributions"
    axis: int = -1  # of the classes
    features: int | None = None  # of a linear head: hidden and kernel are given, and the logits are not
    softcap: float | None = None
    class_weights: bool = False
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def classes(self) -> int:
        return self.shape[self.axis]

    @property
    def rows(self) -> tuple[int, ...]:
        axis = self.axis % len(self.shape)
        return self.shape[:axis] + self.shape[axis + 1 :]

    @property
    def argnums(self) -> tuple[int, ...]:
        """The arrays that the gradient is of: logits, or hidden and kernel."""
        return (0,) if self.features is None else (0, 1)

    @property
    def plain(self) -> bool:
        """Labels and no option."""
        return self == replace(self, kind="labels", softcap=None, **PLAIN)

    def __str__(self) -> str:
        if self == replace(self, **OPTIONS):
            return f"{replace(self, **PLAIN)}, every option"
        size = " × ".join(map(str, self.shape if self.features is None else (*self.rows, self.features, self.classes)))
        options = {
            "class weights": self.class_weights,
            f"ignore_index {self.ignore_index}": self.ignore_index is not None,
            f"smoothing {self.label_smoothing}": self.label_smoothing,
            f"z-loss {self.z_loss}": self.z_loss,
            f"softcap {self.softcap}": self.softcap,
        }
        return ", ".join([self.model, size, self.dtype, self.kind, *(name for name, given in options.items() if given)])


OPTIONS: dict[str, Any] = {"class_weights": True, "ignore_index": -100, "label_smoothing": 0.1, "z_loss": 1e-4}
PLAIN: dict[str, Any] = {"class_weights": False, "ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.0}
CITY: dict[str, Any] = {"axis": 1, "class_weights": True, "ignore_index": 255}

CASES = [
    Case("token tags", (64, 1024, 9), ignore_index=-100),
    Case("ImageNet-1k", (8192, 1000)),
    Case("ImageNet-1k", (8192, 1000), "bfloat16"),
    Case("ImageNet-1k", (8192, 1000), **OPTIONS),
    Case("ImageNet-1k", (8192, 1000), kind="distributions"),
    Case("ImageNet-21k", (1024, 21841)),
    Case("ImageNet-21k", (1024, 21841), "bfloat16"),
    Case("Cityscapes", (2, 19, 512, 1024), **CITY),
    Case("Cityscapes", (2, 19, 512, 1024), "bfloat16", **CITY),
    Case("GPT-2", (512, 50257)),
    Case("GPT-2", (512, 50257), "bfloat16"),
    Case("GPT-2", (512, 50257), "bfloat16", **OPTIONS),
    Case("GPT-2", (512, 50257), "bfloat16", kind="distributions"),
    Case("Llama-3", (256, 128256)),
    Case("Llama-3", (256, 128256), "bfloat16"),
    Case("GPT-2 head", (512, 50257), features=768),
    Case("GPT-2 head", (512, 50257), "bfloat16", features=768),
    Case("GPT-2 head", (512, 50257), features=768, **OPTIONS),
    Case("Llama-3 head", (256, 128256), features=512),
    Case("Llama-3 head", (256, 128256), "bfloat16", features=512),
    Case("Gemma-2 head", (128, 256000), features=512, softcap=30.0),
]


def tiny(case: Case) -> Case:
    """The same case with a few rows of a few classes."""
    sizes = [3] * len(case.shape)
    sizes[case.axis] = min(case.classes, 13)
    return replace(case, shape=tuple(sizes), features=case.features and 8)


SMOKE = [tiny(case) for case in CASES if case.model in ("ImageNet-1k", "Cityscapes", "GPT-2 head", "Gemma-2 head")]


def shapes(case: Case) -> list[jax.ShapeDtypeStruct]:
    """Logits, or hidden and kernel; targets; class weights if the case has them."""
    inputs = [case.shape] if case.features is None else [(*case.rows, case.features), (case.features, case.classes)]
    structs = [jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype)) for shape in inputs]
    labels = case.kind == "labels"
    structs.append(jax.ShapeDtypeStruct(case.rows if labels else case.shape, jnp.int32 if labels else jnp.float32))
    if case.class_weights:
        structs.append(jax.ShapeDtypeStruct((case.classes,), jnp.float32))
    return structs


def arrays(case: Case) -> list[np.ndarray]:
    """The data of `shapes`: logits of spread 2, labels of which a tenth is ignored where any is."""
    rng = np.random.default_rng(0)

    def normal(shape, spread):
        return spread * rng.standard_normal(shape, np.float32)

    if case.features is None:
        inputs = [normal(case.shape, 2)]
    else:
        inputs = [normal((*case.rows, case.features), 1)]
        inputs.append(normal((case.features, case.classes), 2 / case.features**0.5))
    inputs = [array.astype(jnp.dtype(case.dtype)) for array in inputs]
    if case.kind == "distributions":
        powers = np.exp(normal(case.shape, 2))
        return [*inputs, powers / powers.sum(case.axis, keepdims=True)]
    labels = rng.integers(0, case.classes, case.rows, np.int32)
    if case.ignore_index is not None:
        labels[rng.random(labels.shape) < 0.1] = case.ignore_index
    if case.class_weights:
        return [*inputs, labels, rng.uniform(0.5, 2, case.classes).astype(np.float32)]
    return [*inputs, labels]


def reference(case: Case, data: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """The loss and its gradients in float64, classes last inside: l = Σ a (log_z − z) + λ w log_z²."""
    inputs, rest = [data[i].astype(np.float64) for i in case.argnums], data[len(case.argnums) :]
    logits = inputs[0] if case.features is None else inputs[0] @ inputs[1]
    if case.softcap is not None:
        logits = case.softcap * np.tanh(logits / case.softcap)
    logits = np.moveaxis(logits, case.axis, -1)
    weights = rest[1].astype(np.float64) if case.class_weights else np.ones(case.classes)
    smoothing = case.label_smoothing
    if case.kind == "labels":
        counts = (rest[0] != case.ignore_index).astype(np.float64)
        labels = np.where(counts, rest[0], 0)
        row_weights = weights[labels] * counts
        share = counts[..., None] * weights * (smoothing / case.classes)
        index = labels[..., None]
        np.put_along_axis(
            share, index, np.take_along_axis(share, index, -1) + (1 - smoothing) * row_weights[..., None], -1
        )
    else:
        share = weights * ((1 - smoothing) * np.moveaxis(rest[0], case.axis, -1) + smoothing / case.classes)
        row_weights = np.ones(case.rows)
    offset = logits.max(-1, keepdims=True)
    powers = np.exp(logits - offset)
    log_z = offset + np.log(powers.sum(-1, keepdims=True))
    z_weights = case.z_loss * row_weights[..., None]
    loss = (share * (log_z - logits)).sum() + (z_weights * log_z**2).sum()
    gradient = (share.sum(-1, keepdims=True) + 2 * z_weights * log_z) * (powers / powers.sum(-1, keepdims=True)) - share
    gradient /= row_weights.sum()
    if case.softcap is not None:
        gradient *= 1 - (logits / case.softcap) ** 2
    gradient = np.moveaxis(gradient, -1, case.axis)
    gradients = [gradient] if case.features is None else [gradient @ inputs[1].T, inputs[0].T @ gradient]
    return float(loss / row_weights.sum()), gradients
