"""Who is compared, all under one signature: `contender(case)` gives what makes the case's arrays ready, or None.

None says that the library has no way to the case, without writing half of the loss around it. Everyone's loss is in
float32, of logits that are cast to it as trainers do; of a linear head, hidden · kernel is in their dtype. A package
is imported when its contender is first asked.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxce
from benchmarks.cases import Case, shapes
from benchmarks.report import cores

Loss = Callable[..., jax.Array]  # of the arrays of a case


class Ready(NamedTuple):
    """Arrays are where they belong, programs are compiled: what is left is to call."""

    call: Callable[[], tuple[Any, Any]]  # the loss and its gradients, finished
    temporaries: int | None = None  # bytes
    transposed: bool = False  # the kernel, and its gradient, are (V, D)


Contender = Callable[[Case], Callable[[list[np.ndarray]], Ready] | None]


def _options(case: Case) -> dict[str, Any]:
    return {"ignore_index": case.ignore_index, "label_smoothing": case.label_smoothing, "z_loss": case.z_loss}


def jaxce_loss(case: Case) -> Loss | None:
    if case.features is None:
        return lambda logits, targets, class_weights=None: jaxce.cross_entropy(
            logits, targets, axis=case.axis, class_weights=class_weights, **_options(case)
        )
    return lambda hidden, kernel, targets, class_weights=None: jaxce.linear_cross_entropy(
        hidden, kernel, targets, class_weights=class_weights, softcap=case.softcap, **_options(case)
    )


def _held_logits(case: Case, data: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Logits in float32, targets and class weights (or 1), from the arrays of a case."""
    inputs, targets, *rest = data[: len(case.argnums)], *data[len(case.argnums) :]
    logits = (inputs[0] if case.features is None else inputs[0] @ inputs[1]).astype(jnp.float32)
    if case.softcap is not None:
        logits = case.softcap * jnp.tanh(logits / case.softcap)
    return logits, targets, rest[0] if rest else jnp.ones(case.classes)


def _with_options(case: Case, losses_of: Callable[[Any, Any, Any], jax.Array]) -> Loss:
    """What users write around a loss per row: mask, weighted mean, z-loss."""

    def loss(*data):
        logits, targets, class_weights = _held_logits(case, data)
        if case.kind == "distributions":
            return losses_of(logits, targets, class_weights).mean()
        mask = jnp.ones(targets.shape) if case.ignore_index is None else targets != case.ignore_index
        labels = jnp.where(mask, targets, 0)
        row_weights = mask * class_weights[labels] if case.class_weights else mask
        losses = mask * losses_of(logits, labels, class_weights)
        if case.z_loss:
            losses += case.z_loss * row_weights * jax.nn.logsumexp(logits, case.axis) ** 2
        return losses.sum() / row_weights.sum()

    return loss


def optax_loss(case: Case) -> Loss | None:
    optax: Any = importlib.import_module("optax")

    def losses_of(logits, targets, class_weights):
        if case.kind == "labels" and not case.label_smoothing:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets, case.axis)
            return losses * class_weights[targets] if case.class_weights else losses
        if case.kind == "labels":
            targets = optax.smooth_labels(jax.nn.one_hot(targets, case.classes), case.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets * class_weights, case.axis)

    return _with_options(case, losses_of)


def plain_loss(case: Case) -> Loss | None:
    def losses_of(logits, targets, class_weights):
        distances = -jax.nn.log_softmax(logits, case.axis)
        if case.kind == "distributions":
            return jnp.sum(targets * distances, case.axis)
        losses = jnp.take_along_axis(distances, jnp.expand_dims(targets, case.axis), case.axis).squeeze(case.axis)
        losses = losses * class_weights[targets] if case.class_weights else losses
        if case.label_smoothing:
            uniform = jnp.sum(distances * class_weights, case.axis) / case.classes
            losses = (1 - case.label_smoothing) * losses + case.label_smoothing * uniform
        return losses

    return _with_options(case, losses_of)


def keras_loss(case: Case) -> Loss | None:
    """Classes go to the end; class weights are weights of rows, so that they do not go with smoothing."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras: Any = importlib.import_module("keras")
    if case.z_loss or (case.label_smoothing and case.kind == "labels"):
        return None

    def loss(*data):
        logits, targets, class_weights = _held_logits(case, data)
        logits = jnp.moveaxis(logits, case.axis, -1)
        if case.kind == "distributions":
            return keras.losses.CategoricalCrossentropy(from_logits=True)(targets, logits)
        sparse = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=case.ignore_index, reduction="mean_with_sample_weight"
        )
        weights = class_weights[jnp.where(targets == case.ignore_index, 0, targets)] if case.class_weights else None
        return sparse(targets, logits, sample_weight=weights)

    return loss


def jax_cce_loss(case: Case) -> Loss | None:
    jax_cce: Any = importlib.import_module("jax_cce")
    if case.features is None or not case.plain:
        return None
    return lambda hidden, kernel, labels: jax_cce.linear_cross_entropy(hidden, kernel, labels)


def tokamax_loss(implementation: str | None) -> Callable[[Case], Loss | None]:
    def loss_of(case):
        tokamax: Any = importlib.import_module("tokamax")
        importlib.import_module("absl.flags").FLAGS(["benchmarks"])  # else it reads our command line
        if case.features is None or not case.plain:
            return None

        def loss(hidden, kernel, labels):
            op = tokamax.linear_softmax_cross_entropy_loss
            return op(hidden, labels, kernel, reduction="mean", implementation=implementation)

        try:
            jax.eval_shape(loss, *shapes(case))
        except (ValueError, NotImplementedError):  # an implementation that this release, or this case, has not
            return None
        return loss

    return loss_of


def shapes_for(name: str, case: Case) -> list[jax.ShapeDtypeStruct]:
    """The arrays of a case as a contender wants them."""
    inputs = shapes(case)
    if name in TRANSPOSED:
        inputs[1] = jax.ShapeDtypeStruct(inputs[1].shape[::-1], inputs[1].dtype)
    return inputs


def on_jax(name: str, loss_of: Callable[[Case], Loss | None]) -> Contender:
    def contender(case):
        loss = loss_of(case)
        if loss is None:
            return None
        step = jax.jit(jax.value_and_grad(loss, case.argnums)).lower(*shapes_for(name, case)).compile()
        analysis: Any = step.memory_analysis()
        transposed = name in TRANSPOSED

        def ready(data):
            placed = [jnp.asarray(array.T.copy() if transposed and i == 1 else array) for i, array in enumerate(data)]
            return Ready(lambda: jax.block_until_ready(step(*placed)), analysis.temp_size_in_bytes, transposed)

        return ready

    return contender


def _on_torch(linear: bool) -> Contender:
    """PyTorch, by autograd on CUDA or all cores: `linear` is its `linear_cross_entropy`, in blocks of rows."""

    def contender(case):
        torch: Any = importlib.import_module("torch")
        on_cuda = torch.cuda.is_available()
        torch.set_num_threads(cores())
        functional = torch.nn.functional
        if linear and (not hasattr(functional, "linear_cross_entropy") or case.features is None):
            return None
        if linear and (case.softcap is not None or case.z_loss or case.label_smoothing):
            return None
        ignore_index = -100 if case.ignore_index is None else case.ignore_index
        options = {"label_smoothing": case.label_smoothing}

        def held(inputs, targets, class_weights):
            logits = inputs[0] if case.features is None else functional.linear(*inputs)
            logits = logits.float()
            if case.softcap is not None:
                logits = case.softcap * torch.tanh(logits / case.softcap)
            if case.axis == -1:
                logits = logits.flatten(0, -2)
                targets = targets.flatten() if case.kind == "labels" else targets.flatten(0, -2)
            if case.kind == "labels":
                options["ignore_index"] = ignore_index
            loss = functional.cross_entropy(logits, targets, class_weights, **options)
            if case.z_loss:
                mask = targets != ignore_index
                row_weights = mask * (1 if class_weights is None else class_weights[torch.where(mask, targets, 0)])
                log_z = torch.logsumexp(logits, 1)
                loss = loss + case.z_loss * (row_weights * log_z**2).sum() / row_weights.sum()
            return loss

        def in_blocks(inputs, targets, class_weights):
            blocks = torch.nn.LinearCrossEntropyOptions()
            return functional.linear_cross_entropy(
                *inputs, targets, weight=class_weights, ignore_index=ignore_index, options=blocks
            )

        def ready(data):
            placed = [
                torch.from_numpy(np.array(array, np.float32 if array.dtype.kind in "fV" else np.int64))
                for array in (array.T if case.features and i == 1 else array for i, array in enumerate(data))
            ]
            placed = [tensor.to("cuda" if on_cuda else "cpu") for tensor in placed]
            inputs = [placed[i].to(getattr(torch, case.dtype)).requires_grad_() for i in case.argnums]
            targets, *rest = placed[len(inputs) :]
            class_weights = rest[0] if rest else None

            def call():
                loss = (in_blocks if linear else held)(inputs, targets, class_weights)
                gradients = [gradient.detach() for gradient in torch.autograd.grad(loss, inputs)]
                if on_cuda:
                    torch.cuda.synchronize()
                return loss.detach(), gradients

            return Ready(call, transposed=case.features is not None)

        return ready

    return contender


JAX_LOSSES: dict[str, Callable[[Case], Loss | None]] = {
    "jaxce": jaxce_loss,
    "optax": optax_loss,
    "plain JAX": plain_loss,
    "Keras": keras_loss,
    "jax-cce": jax_cce_loss,
    "tokamax xla": tokamax_loss("xla"),
    "tokamax chunked_xla": tokamax_loss("chunked_xla"),
}

TRANSPOSED = {"jax-cce"}  # those that take the kernel as (V, D)

CONTENDERS: dict[str, Contender] = {name: on_jax(name, loss_of) for name, loss_of in JAX_LOSSES.items()} | {
    "PyTorch": _on_torch(linear=False),
    "PyTorch linear": _on_torch(linear=True),
}


def in_float64(array: Any) -> np.ndarray:
    """Of JAX, NumPy or PyTorch."""
    return np.asarray(array.double().cpu().numpy() if hasattr(array, "double") else array, np.float64)


def results(ready: Ready) -> tuple[float, list[np.ndarray]]:
    """The loss and its gradients in float64, the kernel's as (D, V)."""
    loss, gradients = ready.call()
    gradients = [in_float64(gradient) for gradient in gradients]
    if ready.transposed:
        gradients[1] = gradients[1].T
    return float(in_float64(loss)), gradients
