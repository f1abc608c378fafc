"""The recipes of post-training beside the same formulas on logits that are held: what the compiled programs hold.

For the CPU, and for a TPU v5e and an H100 where their compilers are installed: compiled, not timed. The formulas are
what the tests compare the recipes with.
"""

import math
import runpy
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.errors import JaxRuntimeError
from jax.sharding import PartitionSpec
from tqdm import tqdm

import jaxce
from benchmarks.compiled import compile_step, cpu, h100, mesh_of, temporaries, v5e
from benchmarks.report import in_bytes, table

RECIPES = Path(__file__).parent.parent / "examples" / "recipes"
KEPT = 32  # classes of a teacher's top k


class Size(NamedTuple):
    batch: int  # even: half of it is chosen, half rejected
    length: int
    features: int
    classes: int
    dtype: Any = jnp.float32

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __str__(self) -> str:
        return f"{self.tokens} × {self.features} × {self.classes} {jnp.dtype(self.dtype)}"


class Method(NamedTuple):
    """A recipe's loss, and the same of held logits; both take hidden, kernel and what else `arguments` describes.

    Both return a pair of the loss and what is logged beside it. `lazy` also takes the options of `LinearLogits`.
    """

    name: str
    lazy: Callable[..., tuple[jax.Array, Any]]
    held: Callable[..., tuple[jax.Array, Any]]
    arguments: Callable[[Size], list[ShapeDtypeStruct]]
    argnums: tuple[int, ...] = (0, 1)  # of the gradient; none for an evaluation

    def shape(self, size: Size) -> str:
        """Rows × features × classes, with the classes of all heads."""
        hidden, kernel = (argument.shape for argument in self.arguments(size)[:2])
        classes = kernel[:-2] + kernel[-1:] if kernel[-2] == hidden[-1] else kernel[:-1]
        return " × ".join(map(str, [math.prod(hidden[:-1]), hidden[-1], *classes]))


@cache
def recipe(name: str) -> dict[str, Any]:
    return runpy.run_path(str(RECIPES / f"{name}.py"))


def _of_logits(name: str, function: str, hidden: Any, kernel: Any, *batch: Any, **options: Any) -> tuple[Any, Any]:
    result = recipe(name)[function](jaxce.LinearLogits(hidden, kernel, **options), *batch)
    return result if isinstance(result, tuple) else (result, None)


# The formulas on held logits, as one writes them.


def _log_softmax(hidden: Any, kernel: Any) -> jax.Array:
    logits = hidden @ kernel
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def _of_target(log_p: Any, tokens: Any) -> jax.Array:
    return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def _mean(numbers: Any, mask: Any) -> jax.Array:
    return jnp.sum(jnp.where(mask, numbers, 0)) / jnp.sum(mask)


def held_policy(hidden, kernel, tokens, rollout, mask, low=0.2, high=0.28, penalty=0.04, bonus=1e-3):
    log_softmax = _log_softmax(hidden, kernel)
    log_p = _of_target(log_softmax, tokens)
    entropy = -jnp.sum(jnp.exp(log_softmax) * log_softmax, axis=-1)
    ratio = jnp.exp(log_p - rollout["old_log_p"])
    gain, clipped = ratio * rollout["advantage"], jnp.clip(ratio, 1 - low, 1 + high) * rollout["advantage"]
    behind = rollout["reference_log_p"] - log_p
    kl = jnp.exp(behind) - behind - 1
    loss = -jnp.minimum(gain, clipped) + penalty * kl - bonus * entropy
    logged = {"clip_fraction": clipped < gain, "entropy": entropy, "kl": kl}
    return _mean(loss, mask), {name: _mean(number, mask) for name, number in logged.items()}


def held_preference(hidden, kernel, tokens, mask, reference_log_p, beta=0.1):
    log_p = jnp.sum(jnp.where(mask, _of_target(_log_softmax(hidden, kernel), tokens), 0), axis=-1)
    gain = log_p - reference_log_p
    margin = beta * (gain[0] - gain[1])
    return -jax.nn.log_sigmoid(margin).mean(), {"margin": margin.mean(), "accuracy": (margin > 0).mean()}


def held_fine_tuning(hidden, kernel, tokens, mask, z_loss=1e-4):
    logits = hidden @ kernel
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll, z_part = log_z - _of_target(logits, tokens), z_loss * log_z**2
    logged = {"nll": nll, "z_part": z_part, "accuracy": jnp.argmax(logits, axis=-1) == tokens}
    return _mean(nll + z_part, mask), {name: _mean(number, mask) for name, number in logged.items()}


def held_scaled(hidden, kernel, tokens, mask):
    log_p = _of_target(_log_softmax(hidden, kernel), tokens)
    return _mean(-jax.lax.stop_gradient(jnp.exp(log_p)) * log_p, mask), {"nll": _mean(-log_p, mask)}


def held_top_k(hidden, kernel, classes, log_masses, mask):
    log_p = jnp.take_along_axis(_log_softmax(hidden, kernel), classes, axis=-1)
    return _mean(jnp.sum(jnp.exp(log_masses) * (log_masses - log_p), axis=-1), mask), None


def held_multi_token(hidden, kernels, tokens):
    losses = []
    for ahead, kernel in enumerate(kernels, 1):
        log_p = _of_target(_log_softmax(hidden[:, :-ahead], kernel), tokens[:, ahead:])
        losses.append(-log_p.mean())
    losses = jnp.stack(losses)
    return losses.mean(), losses


def held_contrastive(images, texts, temperature):
    logits = images @ texts.T / temperature
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    ways = [jnp.diagonal(jax.nn.log_softmax(square)).mean() for square in (logits, logits.T)]
    return -(ways[0] + ways[1]) / 2, None


def held_score(hidden, kernel, tokens, mask, answers):
    log_p = jnp.sum(jnp.where(mask, _of_target(_log_softmax(hidden, kernel), tokens), 0), axis=-1)
    there = mask.any(axis=-1)
    chosen = jnp.where(there, log_p, -jnp.inf).argmax(axis=-1)
    where = there.any(axis=-1)
    logged = {"accuracy": _mean(chosen == answers, where), "log_p": _mean(_of_target(log_p, answers), where)}
    return logged["log_p"], logged


# The recipes with lazy logits.


def lazy_fine_tuning(*arguments, **options):
    loss, logged = _of_logits("fine_tuning", "fine_tuning_loss", *arguments, **options)
    return loss.mean(), {name: parts.mean() for name, parts in logged.items()}


def lazy_multi_token(*arguments, **options):
    return recipe("multi_token")["multi_token_loss"](*arguments, **options)


def lazy_contrastive(*arguments, **options):
    return recipe("contrastive")["contrastive_loss"](*arguments, **options), None


def lazy_score(*arguments, **options):
    scores = recipe("multiple_choice")["score"](jaxce.LinearLogits(*arguments[:2], **options), *arguments[2:])
    logged = {name: parts.mean() for name, parts in scores.items()}
    return logged["log_p"], logged


# Their arguments.


def _head(size: Size, *rows: int) -> list[ShapeDtypeStruct]:
    shapes = (*rows, size.features), (size.features, size.classes)
    return [ShapeDtypeStruct(shape, size.dtype) for shape in shapes]


def _integers(*shape: int) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(shape, jnp.int32)


def _floats(size: Size, *shape: int) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(shape, jnp.promote_types(size.dtype, jnp.float32))


def _mask(*shape: int) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(shape, jnp.bool_)


def _of_tokens(size: Size) -> list[ShapeDtypeStruct]:
    rows = size.batch, size.length
    return [*_head(size, *rows), _integers(*rows), _mask(*rows)]


def _of_policy(size: Size) -> list[Any]:
    *head, tokens, mask = _of_tokens(size)
    numbers = ("advantage", "old_log_p", "reference_log_p")
    return [*head, tokens, dict.fromkeys(numbers, _floats(size, *tokens.shape)), mask]


def _of_pairs(size: Size) -> list[ShapeDtypeStruct]:
    rows = 2, size.batch // 2, size.length
    return [*_head(size, *rows), _integers(*rows), _mask(*rows), _floats(size, *rows[:2])]


def _of_top_k(size: Size) -> list[ShapeDtypeStruct]:
    rows = size.batch, size.length
    kept = min(KEPT, size.classes // 2)
    return [*_head(size, *rows), _integers(*rows, kept), _floats(size, *rows, kept), _mask(*rows)]


def _of_heads(size: Size) -> list[ShapeDtypeStruct]:
    hidden, kernel = _head(size, size.batch, size.length)
    return [hidden, ShapeDtypeStruct((2, *kernel.shape), size.dtype), _integers(size.batch, size.length)]


def _of_both(size: Size) -> list[ShapeDtypeStruct]:
    """As many pairs as make a square as large as the logits of the others, to a power of two; of fewer features."""
    pairs = 2 ** (((size.tokens * size.classes).bit_length() - 1) // 2)
    both = ShapeDtypeStruct((pairs, min(size.features, 1024)), size.dtype)
    return [both, both, ShapeDtypeStruct((), size.dtype)]


def _of_choices(size: Size) -> list[ShapeDtypeStruct]:
    rows = size.batch // 2, 2, size.length
    return [*_head(size, *rows), _integers(*rows), _mask(*rows), _integers(size.batch // 2)]


METHODS = [
    Method("policy gradient", partial(_of_logits, "policy_gradient", "policy_loss"), held_policy, _of_policy),
    Method("preference", partial(_of_logits, "preference", "preference_loss"), held_preference, _of_pairs),
    Method("fine-tuning", lazy_fine_tuning, held_fine_tuning, _of_tokens),
    Method("token scaling", partial(_of_logits, "token_scaling", "scaled_loss"), held_scaled, _of_tokens),
    Method("top-k teacher", partial(_of_logits, "top_k_teacher", "top_k_loss"), held_top_k, _of_top_k),
    Method("multi-token, 2 heads", lazy_multi_token, held_multi_token, _of_heads),
    Method("contrastive", lazy_contrastive, held_contrastive, _of_both, argnums=(0, 1, 2)),
    Method("multiple choice, no gradient", lazy_score, held_score, _of_choices, argnums=()),
]

DEVICES: dict[str, tuple[Callable[[], Any], Size]] = {
    "CPU": (cpu, Size(8, 128, 256, 32768)),
    "TPU v5e": (v5e, Size(8, 1024, 4096, 152064, jnp.bfloat16)),
    "H100": (h100, Size(8, 1024, 4096, 152064, jnp.bfloat16)),
}
CPU_BLOCK = 2**23  # bytes; the defaults would hold all logits of the CPU's size
TINY = Size(2, 4, 8, 64)


def held_bytes(topology: Any, method: Method, loss: Callable[..., Any], arguments: list[Any]) -> int | None:
    """Temporaries of value, gradients and what is logged; None where they do not fit."""
    specs = [PartitionSpec()] * len(arguments)
    try:
        return temporaries(
            compile_step(mesh_of(topology, {"x": 1}), loss, arguments, specs, method.argnums, has_aux=True)
        )
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise


def rows_of(device: str, topology: Any, size: Size, block_bytes: int | None) -> Iterator[list[str]]:
    for method in tqdm(METHODS, desc=device):
        arguments = method.arguments(size)
        ways = {"recomputed": True, "in the forward pass": False}
        losses = {way: partial(method.lazy, block_bytes=block_bytes, recompute=ways[way]) for way in ways}
        held = [held_bytes(topology, method, loss, arguments) for loss in [*losses.values(), method.held]]
        texts = ["does not fit" if number is None else in_bytes(number) for number in held]
        yield [device, method.name, method.shape(size), *texts]


OPTIONS: dict[str, Any] = {"entropy": True, "argmax": True, "has_aux": True}


def plain_loss(hidden, kernel, tokens, rollout, mask, **options):
    return jaxce.cross_entropy(jaxce.LinearLogits(hidden, kernel, **options), tokens, where=mask), None


def custom_loss(hidden, kernel, tokens, rollout, mask, **options):
    """The policy's, and the accuracy."""

    def formula(summary, token):
        ratio = jnp.exp(-summary.nll - token["old_log_p"])
        gain = jnp.minimum(ratio * token["advantage"], jnp.clip(ratio, 0.8, 1.28) * token["advantage"])
        hit = summary.argmax == token["token"]
        return 1e-3 * summary.entropy - gain, {"accuracy": hit, "entropy": summary.entropy, "z": summary.log_z}

    logits = jaxce.LinearLogits(hidden, kernel, **options)
    return jaxce.custom_loss(formula, logits, tokens, rows={**rollout, "token": tokens}, where=mask, **OPTIONS)


def rows_beside_cross_entropy(device: str, topology: Any, size: Size) -> Iterator[list[str]]:
    """What entropy, argmax and what is logged cost beside the cross entropy of the same lazy logits."""
    method = METHODS[0]
    for recompute in (True, False):
        both = [
            held_bytes(topology, method, partial(loss, recompute=recompute), method.arguments(size))
            for loss in (plain_loss, custom_loss)
        ]
        texts = ["does not fit" if number is None else in_bytes(number) for number in both]
        more = f"{both[1] / both[0] - 1:+.1%}" if both[0] and both[1] else "–"
        yield [device, str(size), "recomputed" if recompute else "in the forward pass", *texts, more]


def report(smoke: bool) -> str:
    jax.config.update("jax_platforms", "cpu")  # no search for the devices themselves
    rows, beside, missing = [], [], []
    for device, (topology_of, size) in DEVICES.items():
        try:
            topology = topology_of()
        except (RuntimeError, ValueError) as error:  # no such platform
            missing.append(f"\n{device}: no compiler is installed ({type(error).__name__}).\n")
            continue
        block_bytes = CPU_BLOCK if device == "CPU" else None
        rows += rows_of(device, topology, TINY if smoke else size, 256 if smoke else block_bytes)
        if device != "CPU":
            beside += rows_beside_cross_entropy(device, topology, TINY if smoke else size._replace(classes=131072))
    return f"""## Compiled, not timed

Value, gradients and what is logged of the recipes, compiled for one device and not run: what the programs hold beside
arguments and results. The lazy logits go both ways, recomputed in blocks of classes, which is the default of bfloat16,
and with gradients made in the forward pass in blocks of rows. A CPU has float32 and blocks of {CPU_BLOCK // 2**20} MiB.
Beside them is the same formula on held logits that are cast to float32, as one writes it.

{table(["device", "recipe", "rows × features × classes", "recomputed", "in the forward pass", "held logits"], rows)}

`custom_loss` with entropy, argmax and three logged numbers, beside the cross entropy of the same lazy logits:

{table(["device", "head", "gradient", "cross_entropy", "custom_loss", "more"], beside)}
{"".join(missing)}"""
