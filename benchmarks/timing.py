"""How long loss and gradients take, as ratios of calls that were made in turn.

A machine's speed changes from minute to minute, so that absolute times of two runs say little about two programs. Here
all contenders are called once in every round, in an order that changes, and what is reported is a round's ratios: their
median and the middle half. Who disagrees with float64 is named and not timed.
"""

import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxce
from benchmarks.cases import OPTIONS, Case, arrays, reference, shapes
from benchmarks.contenders import CONTENDERS, JAX_LOSSES, Ready, results
from benchmarks.report import NOT_INSTALLED, in_bytes, table

# Of the loss, relative; of a gradient, against its largest entry. Some round the loss, or a head's logits, to bfloat16.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 5e-2)}


class Plan(NamedTuple):
    """How much to measure."""

    contenders: list[str]
    rounds: int
    seconds: float  # of a case; after them a round is the last


class Result(NamedTuple):
    case: Case
    contender: str
    note: str = ""  # why there are no numbers
    loss_error: float = 0.0
    gradient_error: float = 0.0
    temporaries: int | None = None


def in_turn(calls: dict[str, Callable[[], Any]], plan: Plan, before: Callable[[], Any]) -> dict[str, np.ndarray]:
    """Seconds of every call in every round. `before` each, outside of the time, comes the one or other preparation."""
    rng, names = np.random.default_rng(0), list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + plan.seconds
    for done in range(plan.rounds):
        if done >= 5 and time.perf_counter() > end:
            break
        for name in rng.permutation(names):
            before()
            start = time.perf_counter()
            result = calls[name]()
            seconds[name].append(time.perf_counter() - start)
            del result
    return {name: np.array(measured) for name, measured in seconds.items()}


def exp(logits: Any) -> jax.Array:
    return jnp.exp(logits.astype(jnp.float32))


def products(hidden: Any, kernel: Any) -> tuple[jax.Array, jax.Array]:
    """Three matrix multiplications, which the value and the gradients of a linear head need at least."""
    logits = hidden @ kernel
    return logits @ kernel.T, hidden.T @ logits


def floor(case: Case, data: list[np.ndarray]) -> Callable[[], Any]:
    """What no one gets below: one pass of exp, written out; of a head, its three matrix multiplications."""
    step = jax.jit(exp if case.features is None else products)
    placed = [jnp.asarray(data[i]) for i in case.argnums]
    return lambda: jax.block_until_ready(step(*placed))


def check(
    case: Case, contender: str, data: list[np.ndarray], exact: tuple[float, list[np.ndarray]]
) -> tuple[Result, Ready | None]:
    """Errors against float64, and what to call if they are in order."""
    try:
        make_ready = CONTENDERS[contender](case)
    except ImportError:
        return Result(case, contender, NOT_INSTALLED), None
    if make_ready is None:
        return Result(case, contender, "–"), None
    ready = make_ready(data)
    loss, gradients = results(ready)
    loss_error = abs(loss - exact[0]) / abs(exact[0])
    gradient_error = max(
        float(np.abs(value - true).max() / np.abs(true).max()) for value, true in zip(gradients, exact[1], strict=True)
    )
    right = all(np.less_equal((loss_error, gradient_error), TOLERANCES[case.dtype]))  # not if NaN
    note = "" if right else f"wrong: loss {loss:.4g} for {exact[0]:.4g}"
    return Result(case, contender, note, loss_error, gradient_error, ready.temporaries), ready if right else None


def measure(case: Case, plan: Plan) -> tuple[list[Result], dict[str, np.ndarray]]:
    """Every contender's result, and the seconds of those that were timed and of the floor."""
    data = arrays(case)
    exact = reference(case, data)
    checked = [check(case, contender, data, exact) for contender in plan.contenders]
    del exact
    calls = {result.contender: ready.call for result, ready in checked if ready is not None}
    calls["floor"] = floor(case, data)
    calls["floor"]()
    # A library's threads wait actively for a moment after a call, and would take cores from the next one's.
    return [result for result, _ in checked], in_turn(calls, plan, before=partial(time.sleep, 0.005))


def ratio(seconds: dict[str, np.ndarray], name: str, base: str) -> list[str]:
    """Median and middle half of the rounds' ratios."""
    if name not in seconds or base not in seconds:
        return ["–", "–"]
    low, median, high = np.quantile(seconds[name] / seconds[base], [0.25, 0.5, 0.75])
    return [f"{median:.2f}", f"{low:.2f}–{high:.2f}"]


def report(cases: list[Case], plan: Plan) -> str:
    from tqdm import tqdm  # which an accelerator's image may lack

    rows, medians = [], []
    for case in tqdm(cases, desc="timings"):
        measured, seconds = measure(case, plan)
        medians.append([str(case)])
        for result in measured:
            median, spread = ratio(seconds, result.contender, "jaxce")
            medians[-1].append(result.note.partition(":")[0] or median)
            if result.note in ("–", NOT_INSTALLED):
                continue
            temporaries = "–" if result.temporaries is None else in_bytes(result.temporaries)
            errors = [f"{result.loss_error:.1e}", f"{result.gradient_error:.1e}"]
            times = [result.note or median, spread, ratio(seconds, result.contender, "floor")[0]]
            rows.append(
                [
                    str(case) if result is measured[0] else "",
                    result.contender,
                    *times,
                    temporaries,
                    *errors,
                    str(len(seconds["floor"])),
                ]
            )
    header = ["case", "contender", "time ÷ jaxce", "middle half", "time ÷ floor", "temporaries", "loss error"]
    tolerances = " or ".join(f"{loss:g} and {gradient:g} ({dtype})" for dtype, (loss, gradient) in TOLERANCES.items())
    return f"""## Loss and gradient

The mean loss and its gradient by the logits, or by hidden and kernel (rows × features × classes), compiled beforehand.
Every option is class weights, ignore_index, smoothing 0.1 and z-loss 1e-4. In every round each contender is called
once, in a new order. A number is the median over rounds of its time divided by that of jaxce in the same round: above 1
is slower than jaxce. “–”: has no way to the case.

{table(["case", *plan.contenders], medians)}

The middle half is from the first to the third quartile of those ratios. The floor is exp of the same logits written out
in float32, and of a linear head its three matrix multiplications. Temporaries are what XLA's program holds beside
arguments and results; PyTorch does not say. Errors are against NumPy in float64, of the loss relative and of the
gradient relative to its largest entry. Beyond {tolerances}, a contender is wrong and is not timed.

{table([*header, "gradient error", "rounds"], rows)}
"""


def report_calls(plan: Plan) -> str:
    """What a call costs beside the arithmetic, and what it costs to compile it."""
    labels_case = Case("calls", (8, 10))
    logits, labels = (jnp.asarray(array) for array in arrays(labels_case))
    loss = {name: JAX_LOSSES[name](labels_case) or abs for name in ("jaxce", "optax")}

    def called(function):
        call = partial(_finished, function, logits, labels)
        call()
        return call

    calls = {
        "jaxce, not jitted": called(jaxce.cross_entropy),
        "jaxce, jitted": called(jax.jit(loss["jaxce"])),
        "optax, not jitted": called(loss["optax"]),
        "optax, jitted": called(jax.jit(loss["optax"])),
    }
    importlib.import_module("jax.experimental.checkify")
    calls["jaxce, jitted, checkify imported"] = called(jax.jit(lambda *data: loss["jaxce"](*data)))
    seconds = in_turn(calls, plan._replace(rounds=40 * plan.rounds), before=lambda: None)
    call_rows = [[name, *ratio(seconds, name, "optax, jitted")] for name in calls]
    compile_rows = []
    for name, case in {"labels": Case("", (128, 1000)), "every option": Case("", (128, 1000), **OPTIONS)}.items():
        calls = {library: partial(_compile, JAX_LOSSES[library](case), shapes(case)) for library in ("jaxce", "optax")}
        seconds = in_turn(calls, plan, before=jax.clear_caches)
        compile_rows.append([name, *ratio(seconds, "jaxce", "optax")])
    return f"""## One call

The mean loss of 8 × 10 logits, calls in turn, as ratios to optax's in `jax.jit`:

{table(["call", "time ÷ optax, jitted", "middle half"], call_rows)}

Tracing and compiling the gradient of 128 × 1000 logits with `jax.clear_caches()` before, in turn:

{table(["loss", "jaxce ÷ optax", "middle half"], compile_rows)}
"""


def _finished(function: Any, *inputs: Any) -> Any:
    return jax.block_until_ready(function(*inputs))


def _compile(loss: Any, inputs: list[jax.ShapeDtypeStruct]) -> Any:
    return jax.jit(lambda *data: jax.grad(loss)(*data)).lower(*inputs).compile()
