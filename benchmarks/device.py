"""What is open about an accelerator, answered by one command on the machine that has it, within nine minutes.

Every program is compiled, called and then timed in turn with the others of its table. One that does not fit, that fails
or that is not reached in time has that word in the place of its numbers. The answers at the end are read from the
tables. On a CPU all sizes are smaller, and only show that it runs.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxce
from benchmarks import device_checks
from benchmarks.cases import Case, shapes
from benchmarks.compiled import temporaries
from benchmarks.contenders import CONTENDERS, JAX_LOSSES, TRANSPOSED, Loss, tokamax_loss
from benchmarks.device_reading import DENSE, HEAD, OTHERS, PARTS, WAYS, answers
from benchmarks.report import accelerator, device, in_bytes, table
from benchmarks.timing import Plan, in_turn, products

SECONDS = 440.0  # for all tables; what is being compiled when they are over still ends
LEAST = 0.02  # seconds of calls from one look at the clock to the next, in which dispatch does not count; not on a CPU
DEFAULT = "default"
PEERS = {name: loss_of for name, loss_of in JAX_LOSSES.items() if name not in ("jaxce", "optax", "plain JAX")}
PEERS["tokamax"] = tokamax_loss(None)


class Sizes(NamedTuple):
    head: Case
    other_heads: list[Case]
    dense: tuple[int, int]
    block_bytes: list[int]


def sizes(smoke: bool) -> Sizes:
    if smoke:
        rows, features, classes, few, unit = 64, 16, 512, (12, 200), 2**12
    elif not accelerator():
        rows, features, classes, few, unit = 256, 64, 4096, (48, 1571), 2**16
    else:
        rows, features, classes, few, unit = 8192, 4096, 131072, (768, 50257), 2**24
    head = Case("head", (rows, classes), "bfloat16", features=features)
    wide = Case("head", (rows, classes), "float32", features=features)
    others = [wide, Case("head", (rows, few[1]), "bfloat16", features=few[0])]
    multiples = [4, 16, 64, 1] if unit == 2**24 else [4, 16]  # in the order of what is left out last
    return Sizes(head, others, (rows, classes // 4), [multiple * unit for multiple in multiples])


class Program(NamedTuple):
    call: Callable[[], Any]
    temporaries: int | None


class Measured(NamedTuple):
    note: str  # why there are no numbers
    temporaries: int | None = None
    errors: tuple[float, ...] = ()
    seconds: float | None = None

    def cells(self, *per: float) -> list[str]:
        """The time, and how many times as long it is as others."""
        if self.seconds is None:
            return [self.note, *["–"] * len(per)]
        return [f"{self.seconds * 1e3:.3g} ms", *("–" if np.isnan(one) else f"{self.seconds / one:.2f}" for one in per)]

    def bytes(self) -> str:
        return "–" if self.temporaries is None else in_bytes(self.temporaries)

    def errors_of(self, count: int) -> list[str]:
        return [f"{error:.1e}" for error in self.errors] or ["–"] * count


class Bench:
    """Programs that are compiled one after another and timed in turn, all before a deadline."""

    def __init__(self, seconds: float):
        self.compiling = time.perf_counter() + 0.8 * seconds
        self.end = time.perf_counter() + seconds
        self.calls: dict[str, Callable[[], Any]] = {}
        self.repeats: dict[str, int] = {}
        self.measured: dict[str, Measured] = {}
        self.round = 0.0

    def add(
        self, name: str, make: Callable[[], Program | None], errors: Callable[[Any], tuple[float, ...]] | None = None
    ) -> None:
        """`make` compiles; `errors` are of what the call returns."""
        if time.perf_counter() > self.compiling:
            self.measured[name] = Measured("not reached")
            return
        try:
            program = make()
            if program is None:
                return
            found = errors(program.call()) if errors else ()
            jax.block_until_ready(program.call())
            start = time.perf_counter()
            jax.block_until_ready(program.call())
            single = time.perf_counter() - start
            repeats = int(np.clip(LEAST / single, 1, 64)) if accelerator() else 1
            _repeated(program.call, repeats)
        except ImportError:
            return
        except Exception as failure:  # whatever a peer or a driver raises: the other rows are wanted
            is_large = "RESOURCE_EXHAUSTED" in str(failure) or "out of memory" in str(failure)
            self.measured[name] = Measured("too large" if is_large else f"fails: {type(failure).__name__}")
            print(f"{name}: {str(failure)[:300]}", file=sys.stderr, flush=True)
            return
        self.measured[name] = Measured("", program.temporaries, found)
        self.repeats[name] = repeats
        self.calls[name] = partial(_repeated, program.call, repeats)
        self.round += single * repeats
        print(f"{name}: {single * 1e3:.3g} ms", file=sys.stderr, flush=True)

    def time(self, rounds: int) -> None:
        left = self.end - time.perf_counter()
        plan = Plan([], int(np.clip(left / max(self.round, 1e-9), 1, rounds)), left)
        for name, seconds in in_turn(self.calls, plan, before=lambda: None).items():
            median = float(np.median(seconds)) / self.repeats[name]
            self.measured[name] = self.measured[name]._replace(seconds=median)

    def seconds(self, name: str) -> float:
        """NaN where there are none."""
        return self.measured[name].seconds or float("nan")


def _repeated(call: Callable[[], Any], count: int) -> None:
    """One after another on the device, which is waited for once."""
    for _ in range(count - 1):
        call()
    jax.block_until_ready(call())


def compiled(function: Any, arrays: list[Any]) -> Program:
    step: Any = jax.jit(function).lower(*arrays).compile()
    return Program(partial(step, *arrays), temporaries(step))


def arrays_of(case: Case) -> list[Any]:
    """As in `cases`, made where they are needed."""
    keys = jax.random.split(jax.random.key(0), 3)
    spreads = [2.0] if case.features is None else [1.0, 2 / case.features**0.5]
    *inputs, labels = shapes(case)
    made = [
        jax.jit(lambda key, shape=struct, by=spread: by * jax.random.normal(key, shape.shape, shape.dtype))(key)
        for key, struct, spread in zip(keys, inputs, spreads, strict=False)
    ]
    return [*made, jax.random.randint(keys[2], labels.shape, 0, case.classes)]


def written_out(case: Case) -> dict[str, Any]:
    """The losses of logits that are held and cast to float32; without optax if it is not installed."""
    has_optax = find_spec("optax") is not None
    return {name: JAX_LOSSES[name](case) for name in ("optax", "plain JAX") if has_optax or name != "optax"}


def errors_against(case: Case, arrays: list[Any]) -> Callable[[Any], tuple[float, ...]] | None:
    """Of the loss, relative, and of the gradients, against the largest entry: to plain JAX, all in float32."""
    loss: Any = JAX_LOSSES["plain JAX"](case)
    wide = [array.astype(jnp.float32) for array in arrays[:-1]]
    try:
        with jax.default_matmul_precision("highest"):
            exact = jax.block_until_ready(jax.jit(jax.value_and_grad(loss, case.argnums))(*wide, arrays[-1]))
    except jax.errors.JaxRuntimeError:  # too large
        return None

    @jax.jit
    def furthest(value: Any, true: Any) -> jax.Array:
        return jnp.abs(value.astype(jnp.float32) - true).max() / jnp.abs(true).max()

    def errors(result: Any) -> tuple[float, ...]:
        loss, *gradients = (float(error) for error in jax.tree.leaves(jax.tree.map(furthest, result, exact)))
        return loss, float(np.max(gradients))

    return errors


def _size(case: Case) -> str:
    """Without the name, and what all of them have."""
    return str(case).partition(", ")[2].removesuffix(", labels")


# A head: both ways, by blocks, beside logits that are held.


def head_loss(way: str, block_bytes: int | None) -> Loss:
    return partial(jaxce.linear_cross_entropy, block_bytes=block_bytes, recompute=WAYS[way])


def _held(hidden: Any, kernel: Any, labels: Any) -> jax.Array:
    return jaxce.cross_entropy(hidden @ kernel, labels)


def in_block(case: Case, way: str, block_bytes: int | None) -> int:
    """How many classes, or rows, a block has."""
    rows, classes = case.shape
    if way == "class blocks":
        return int(np.clip((block_bytes or max(2**25, 4 * rows * 512)) // (4 * rows), 1, classes))
    return int(np.clip((block_bytes or 2**29) // (4 * classes), 1, rows))


def matmuls_in_blocks(way: str, size: int, hidden: Any, kernel: Any) -> Any:
    """What the head multiplies in such blocks, without anything between: four times by classes, three times by rows.

    The logits are behind a barrier, so that no one multiplies less for it. A remainder of the blocks is left out.
    """
    narrow, wide = hidden.dtype, jnp.float32

    def by_rows(d_kernel, rows):
        logits = lax.optimization_barrier(rows @ kernel)
        return d_kernel + jnp.matmul(rows.T, logits, preferred_element_type=wide), logits @ kernel.T

    if way == "row blocks":
        blocks = hidden[: len(hidden) // size * size].reshape(-1, size, hidden.shape[1])
        d_kernel, d_hidden = lax.scan(by_rows, jnp.zeros(kernel.shape, wide), blocks)
        return d_kernel.astype(narrow), d_hidden
    starts = size * jnp.arange(kernel.shape[1] // size)

    def block(start):
        part = lax.dynamic_slice_in_dim(kernel, start, size, 1)
        return part, lax.optimization_barrier(hidden @ part)

    def forward(total, start):
        return total + block(start)[1][:, 0], None

    def backward(carry, start):
        (d_hidden, d_kernel), (part, logits) = carry, block(start)
        d_hidden += jnp.matmul(logits, part.T, preferred_element_type=wide)
        return (d_hidden, lax.dynamic_update_slice_in_dim(d_kernel, hidden.T @ logits, start, 1)), None

    total, _ = lax.scan(forward, jnp.zeros(len(hidden), narrow), starts)
    (d_hidden, d_kernel), _ = lax.scan(backward, (jnp.zeros(hidden.shape, wide), jnp.zeros_like(kernel)), starts)
    return total, d_hidden.astype(narrow), d_kernel


def arithmetic_in_blocks(shape: tuple[int, int], count: int, block: Any, labels: Any) -> Any:
    """The softmax of so many blocks of float32 logits, and their gradient in bfloat16, without any multiplication."""
    classes = lax.broadcasted_iota(jnp.int32, shape, 1)

    def step(carry, number):
        logits = block + number
        offset = logits.max(-1, keepdims=True)
        log_z = offset + jnp.log(jnp.exp(logits - offset).sum(-1, keepdims=True))
        gradient = jnp.exp(logits - log_z) - (classes == labels[:, None])
        return (carry[0] + log_z, lax.optimization_barrier(gradient.astype(jnp.bfloat16))), None

    start = jnp.zeros((shape[0], 1)), jnp.zeros(shape, jnp.bfloat16)
    return lax.scan(step, start, jnp.arange(count, dtype=jnp.float32))[0]


def arithmetic(case: Case, way: str, size: int, labels: Any) -> Program:
    rows, classes = case.shape
    shape, count = ((rows, size), classes // size) if way == "class blocks" else ((size, classes), rows // size)
    logits = jax.random.normal(jax.random.key(0), shape)
    return compiled(partial(arithmetic_in_blocks, shape, count), [logits, labels[: shape[0]] % shape[1]])


def add_products(bench: Bench, arrays: list[Any]) -> None:
    bench.add("three matmuls", lambda: compiled(products, arrays[:2]))
    bench.add("one matmul", lambda: compiled(jnp.matmul, arrays[:2]))


def head(case: Case, block_bytes: list[int], seconds: float, rounds: int, with_parts: bool) -> tuple[Any, Any]:
    """Rows of the table, and of the one that says where the time goes."""
    bench = Bench(seconds)
    arrays = arrays_of(case)
    errors = errors_against(case, arrays)
    add_products(bench, arrays)
    blocks = {DEFAULT: None} | {f"{size / 2**20:g} MiB": size for size in block_bytes}
    lazy = {f"jaxce {way}|{block}": (way, size) for block, size in blocks.items() for way in WAYS}
    losses: dict[str, Any] = {name: head_loss(way, size) for name, (way, size) in lazy.items()}
    held = {"jaxce held logits|–": _held}
    held |= {f"{name}|–": loss for name, loss in written_out(case).items()}
    losses = dict(list(losses.items())[:2]) | held | losses  # the defaults first
    for name, loss in losses.items():
        bench.add(name, lambda loss=loss: compiled(jax.value_and_grad(loss, (0, 1)), arrays), errors)
        bench.add(f"{name}|forward", lambda loss=loss: compiled(loss, arrays))
    for name, (way, size) in lazy.items() if with_parts else ():
        count = in_block(case, way, size)
        bench.add(f"{name}|matmuls", lambda way=way, n=count: compiled(partial(matmuls_in_blocks, way, n), arrays[:2]))
        bench.add(f"{name}|arithmetic", lambda way=way, n=count: arithmetic(case, way, n, arrays[-1]))
    del errors  # and the gradients in it
    bench.time(rounds)
    three, one = bench.seconds("three matmuls"), bench.seconds("one matmul")
    work = 6e-12 * case.shape[0] * case.shape[1] * (case.features or 0)
    rows: list[list[str]] = []
    pairs = {"bare matmuls|–": ("three matmuls", "one matmul")} | {name: (name, f"{name}|forward") for name in losses}
    for name, keys in pairs.items():
        both, forward = (bench.measured[key] for key in keys)
        rate = f"{work / both.seconds:.3g}" if both.seconds else "–"
        cells = [*both.cells(three), rate, both.bytes(), *both.errors_of(2), *forward.cells(one), forward.bytes()]
        rows.append([_size(case), *name.split("|"), *cells])
    parts = []
    for name, (way, size) in lazy.items() if with_parts else ():
        spent = [bench.seconds(key) / three for key in (name, f"{name}|matmuls", f"{name}|arithmetic")]
        spent.append(spent[0] - spent[1] - spent[2])
        cells = ["not reached" if np.isnan(number) else f"{number:.2f}" for number in spent]
        parts.append([*name.split("|"), str(in_block(case, way, size)), *cells])
    return rows, parts


# Logits that are held.


def one_read(logits: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    """The mean loss, and log_z of every row, from one reduction over pairs of a maximum and a sum."""
    logits = logits.astype(jnp.float32)

    def merge(left, right):
        less = jnp.exp(-jnp.abs(left[0] - right[0]))
        sums = jnp.where(left[0] >= right[0], left[1] + less * right[1], less * left[1] + right[1])
        return jnp.maximum(left[0], right[0]), sums

    start = np.finfo(np.float32).min, np.float32(0)
    maximum, total = lax.reduce((logits, jnp.ones_like(logits)), start, merge, (1,))
    log_z = maximum + jnp.log(total)
    return jnp.mean(log_z - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]), log_z


def one_read_gradient(logits: Any, labels: Any) -> tuple[jax.Array, tuple[jax.Array]]:
    loss, log_z = one_read(logits, labels)
    is_label = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == labels[:, None]
    gradient = (jnp.exp(logits.astype(jnp.float32) - log_z[:, None]) - is_label) / len(labels)
    return loss, (gradient.astype(logits.dtype),)


def dense(case: Case, seconds: float, rounds: int) -> list[list[str]]:
    bench = Bench(seconds)
    arrays = arrays_of(case)
    errors = errors_against(case, arrays)
    bench.add("copy", lambda: compiled(jnp.negative, arrays[:1]))  # an identity would not be called
    steps: dict[str, Any] = {"one read": (lambda *data: one_read(*data)[0], one_read_gradient)}
    losses: dict[str, Any] = {"jaxce": JAX_LOSSES["jaxce"](case), **written_out(case)}
    steps |= {name: (loss, jax.value_and_grad(loss, (0,))) for name, loss in losses.items()}
    for name, (forward, both) in steps.items():
        bench.add(f"{name}|forward", lambda forward=forward: compiled(forward, arrays))
        bench.add(name, lambda both=both: compiled(both, arrays), errors)
    bench.time(rounds)
    one_pass = bench.seconds("copy") / 2
    gigabytes = arrays[0].nbytes / 1e9
    copied = [
        *bench.measured["copy"].cells(one_pass),
        "–" if np.isnan(one_pass) else f"{gigabytes / one_pass:.4g} GB/s",
    ]
    rows = [[_size(case), "copy", "–", "–", "–", *copied, "–", "–", "–"]]
    for name in steps:
        cells: list[str] = []
        for key, least in ((f"{name}|forward", 1), (name, 2)):
            passes = bench.seconds(key) / one_pass
            cells += [
                *bench.measured[key].cells(one_pass),
                "–" if np.isnan(passes) else f"{100 * least / passes:.0f} %",
            ]
        rows.append([_size(case), name, *cells, bench.measured[name].bytes(), *bench.measured[name].errors_of(2)])
    return rows


# Whoever else is installed.


def others(case: Case, seconds: float, rounds: int) -> list[list[str]]:
    bench = Bench(seconds)
    arrays = arrays_of(case)
    errors = errors_against(case, arrays)
    add_products(bench, arrays)

    def on_jax(name: str, loss_of: Any) -> Program | None:
        loss = loss_of(case)
        placed = [arrays[0], arrays[1].T, arrays[2]] if name in TRANSPOSED else arrays
        return loss and compiled(jax.value_and_grad(loss, (0, 1)), placed)

    def errors_of_transposed(result: Any) -> tuple[float, ...]:
        loss, (d_hidden, d_kernel) = result
        return errors((loss, (d_hidden, d_kernel.T))) if errors else ()

    def on_torch(name: str) -> Program | None:
        ready = CONTENDERS[name](case)
        return ready and Program(ready([np.asarray(array) for array in arrays]).call, None)

    def errors_of_torch(result: Any) -> tuple[float, ...]:
        loss, gradients = result
        loss, *placed = (jnp.asarray(tensor.float().cpu().numpy()) for tensor in (loss, *gradients))
        return errors_of_transposed((loss, tuple(placed)))

    for name, loss_of in {"jaxce": JAX_LOSSES["jaxce"], **PEERS}.items():
        bench.add(name, partial(on_jax, name, loss_of), errors_of_transposed if name in TRANSPOSED else errors)
    for name in ("PyTorch", "PyTorch linear"):
        bench.add(name, partial(on_torch, name), errors_of_torch)
    bench.time(rounds)
    three = bench.seconds("three matmuls")
    rows = bench.measured.items()
    return [[name, *of.cells(three), of.bytes(), *of.errors_of(2)] for name, of in rows if name != "one matmul"]


# The report.


def report(rounds: int, smoke: bool) -> str:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # the rest is PyTorch's
    end = time.perf_counter() + SECONDS
    size = sizes(smoke)

    def seconds(share: float) -> float:
        """So much of what is left."""
        return share * (end - time.perf_counter())

    until = time.perf_counter() + seconds(0.35)
    checks = list(device_checks.rows(lambda: time.perf_counter() < until, smoke))
    head_rows, part_rows = head(size.head, size.block_bytes, seconds(0.55), rounds, with_parts=True)
    dense_rows = [
        row
        for share, dtype in ((0.2, "bfloat16"), (0.25, "float32"))
        for row in dense(Case("dense", size.dense, dtype), seconds(share), rounds)
    ]
    other_rows = [
        row
        for share, case in zip((0.35, 0.5), size.other_heads, strict=True)
        for row in head(case, size.block_bytes[1:2], seconds(share), rounds, with_parts=False)[0]
    ]
    peers = others(size.head, seconds(0.9), rounds)
    text = f"""Device: {device()}.

## Checks

Losses on the device against their formulas in float64, differentiated by all arrays: the largest difference, against
the largest entry. Matrix multiplications have the highest precision.

{table(["loss", *device_checks.MODES, "result"], checks)}

## A head

Rows × features × classes. Times are medians of calls in turn, beside the bare matrix multiplications of the same size.
Held logits of optax and plain JAX are cast to float32. Temporaries are what the program holds beside arguments and
results. Errors are against plain JAX in float32, of a gradient relative to its largest entry.

{table(HEAD, head_rows)}

## Where its time goes

Of the first head, as parts of its three bare matmuls: the same matmuls in blocks and nothing else, four by classes and
three by rows; the softmax and its gradient on as many blocks and nothing else; and what is left of the head's time.

{table(PARTS, part_rows)}

## Logits that are held

A pass is half of the time of a copy of the logits, which reads and writes them. “Of a copy” is the bandwidth of the
least that has to be moved, one read forward and a read and a write with the gradient, in parts of the copy's. “One
read” is a candidate: a single reduction over pairs of a maximum and a sum.

{table(DENSE, dense_rows)}

## Other heads

{table(HEAD, other_rows)}

## Others

At the first head, whoever is installed, with their defaults.

{table(OTHERS, peers)}
"""
    lines = "\n".join(f"- {answer}" for answer in answers(text))
    return f"{text}\n## Answers\n\n{lines}\n"
