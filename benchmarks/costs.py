"""What a linear head costs, and what entropy and argmax cost beside a loss: two tables, and a picture of each.

python -m benchmarks costs                                                # measures, writes and draws
python -m benchmarks.costs benchmarks/results/amd-epyc-2-cores-costs.md  # draws written tables again
"""

import importlib
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxce
from benchmarks.cases import Case, arrays
from benchmarks.report import in_bytes, read, table
from benchmarks.timing import Plan, in_turn, ratio

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]  # of hidden, kernel and labels, or of logits and labels
Row = dict[str, str]  # of a table

SIZES = [2**k for k in range(12, 18)]  # classes of the sweep
SUMMARY_SIZE = 2**15
ROWS, FEATURES = 1024, 256
SMOKE = Case("costs", (4, 8), features=4)

HEAD, SUMMARY = "A linear head", "Entropy and argmax"  # the headings
NOTHING, BY_SUMMARY, BY_JAX = "–", "summarize", "plain JAX"
LOSS_ALONE = f"{NOTHING}, {BY_SUMMARY}"
STYLES: dict[str, dict[str, Any]] = {
    "held logits, jaxce": {"color": "black", "marker": "s"},
    "held logits, optax": {"color": "#d55e00", "marker": "x", "ls": ":", "mew": 2.5, "ms": 9},
    "linear_cross_entropy": {"color": "#0072b2", "marker": "o"},
    "linear_cross_entropy, recompute=True": {"color": "#009e73", "marker": "^", "ls": "--"},
}
BARS = {BY_SUMMARY: "#0072b2", BY_JAX: "#e69f00"}
FONT: dict[Any, Any] = {"font.size": 14, "axes.spines.top": False, "axes.spines.right": False}


def head_losses() -> dict[str, Loss]:
    optax: Any = importlib.import_module("optax")

    def held(hidden, kernel, labels):
        return jaxce.cross_entropy(hidden @ kernel, labels), {}

    def held_by_optax(hidden, kernel, labels):
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels).mean(), {}

    def linear(hidden, kernel, labels, recompute=None):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, recompute=recompute), {}

    return dict(zip(STYLES, [held, held_by_optax, linear, partial(linear, recompute=True)], strict=True))


def summary_losses(is_lazy: bool) -> dict[str, Loss]:
    """The mean `nll` of a summary, by what is computed beside it, and by whom: "entropy, plain JAX"."""

    def loss_of(beside: list[str], by_summary: bool) -> Loss:
        def loss(*data):
            *inputs, labels = data
            asked: Any = {name: True for name in beside if by_summary}
            summary = jaxce.summarize(jaxce.LinearLogits(*inputs) if is_lazy else inputs[0], labels, **asked)
            if by_summary:
                numbers = {name: getattr(summary, name) for name in beside}
            else:
                logits = jax.lax.stop_gradient(inputs[0] @ inputs[1] if is_lazy else inputs[0])
                numbers = {name: PLAIN[name](logits) for name in beside}
            return summary.nll.mean(), numbers

        return loss

    losses = {LOSS_ALONE: loss_of([], by_summary=True)}
    for beside in (["argmax"], ["entropy"], ["argmax", "entropy"]):
        for by in (BY_SUMMARY, BY_JAX):
            losses[f"{' and '.join(beside)}, {by}"] = loss_of(beside, by_summary=by == BY_SUMMARY)
    return losses


def plain_entropy(logits: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {"argmax": partial(jnp.argmax, axis=-1), "entropy": plain_entropy}


def measure(losses: dict[str, Loss], case: Case, plan: Plan) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Seconds of value and gradients in every round, and temporaries. Whoever disagrees with the first is an error."""
    placed = [jnp.asarray(array) for array in arrays(case)]
    calls: dict[str, Callable[[], Any]] = {}
    temporaries: dict[str, str] = {}
    first: Any = None
    for name, loss in losses.items():
        step = jax.jit(jax.value_and_grad(loss, case.argnums, has_aux=True)).lower(*placed).compile()
        analysis: Any = step.memory_analysis()
        temporaries[name] = in_bytes(analysis.temp_size_in_bytes)
        calls[name] = partial(_finished, step, placed)
        (value, numbers), gradients = calls[name]()
        first = first or (value, gradients)
        np.testing.assert_allclose(value, first[0], rtol=1e-5)
        for gradient, expected in zip(gradients, first[1], strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * float(jnp.abs(expected).max()))
        logits = placed[0] if case.features is None else placed[0] @ placed[1]
        for number in numbers:
            np.testing.assert_allclose(numbers[number], PLAIN[number](logits), rtol=1e-4)
    return in_turn(calls, plan, before=partial(time.sleep, 0.005)), temporaries


def _finished(step: Any, placed: list[jax.Array]) -> Any:
    return jax.block_until_ready(step(*placed))


def head_rows(cases: Iterable[Case], plan: Plan) -> list[list[str]]:
    rows = []
    for case in tqdm(cases, desc=HEAD):
        seconds, temporaries = measure(head_losses(), case, plan)
        for name, measured in seconds.items():
            low, median, high = np.quantile(1e3 * measured, [0.25, 0.5, 0.75])
            rows.append([str(case.classes), name, f"{median:.4g}", f"{low:.4g}–{high:.4g}", temporaries[name]])
    return rows


def summary_rows(case: Case, plan: Plan) -> list[list[str]]:
    rows = []
    for logits in tqdm(["held logits", "LinearLogits"], desc=SUMMARY):
        is_lazy = logits == "LinearLogits"
        here = case if is_lazy else Case(case.model, case.shape)
        seconds, temporaries = measure(summary_losses(is_lazy), here, plan)
        for name in seconds:
            rows.append([logits, *name.split(", "), *ratio(seconds, name, LOSS_ALONE), temporaries[name]])
    return rows


def report(plan: Plan, smoke: bool, output: Path | None, name: str) -> str:
    """Measures, draws, and says where the pictures are. Some three minutes on two cores."""
    plan = plan._replace(rounds=min(plan.rounds, 15), seconds=min(plan.seconds, 10.0))
    cases = [SMOKE] if smoke else [Case("costs", (ROWS, size), features=FEATURES) for size in SIZES]
    summary_case = SMOKE if smoke else Case("costs", (ROWS, SUMMARY_SIZE), features=FEATURES)
    head_header = ["classes", "loss", "time in ms", "middle half", "temporaries"]
    summary_header = ["logits", "beside the loss", "by", "time ÷ loss alone", "middle half", "temporaries"]
    sections = [
        f"""## {HEAD}

Value and both gradients of the mean loss, {cases[0].shape[0]} rows of {cases[0].features} features in float32. Time
is the median of calls in turn, temporaries are what XLA's program holds beside arguments and results.

{table(head_header, head_rows(cases, plan))}
""",
        f"""## {SUMMARY}

Value and gradients of the mean `nll` of `summarize`, {" × ".join(map(str, summary_case.shape))} logits in float32,
of {summary_case.features} features where they are lazy, with numbers beside it: of the same summary, or in the same
jitted function by plain JAX, `jnp.argmax` and `log_softmax` of the logits. Time is the median over rounds of the time
divided by that of the loss alone.

{table(summary_header, summary_rows(summary_case, plan))}
""",
    ]
    text = "\n".join(sections)
    if output is None:
        draw(text, None)
        return text
    return f"{text}\n" + "\n\n".join(f"![{alt}]({file.name})" for alt, file in draw(text, output / name)) + "\n"


def draw(text: str, stem: Path | None) -> list[tuple[str, Path]]:
    """Draws the tables of a report, and says what is in which file."""
    tables = read(text)
    with mpl.rc_context(FONT):
        figures = {"head": draw_head(tables[HEAD]), "summary": draw_summary(tables[SUMMARY])}
        if stem is None:
            return []
        files = {kind: stem.with_name(f"{stem.name}-{kind}.png") for kind in figures}
        for kind, figure in figures.items():
            figure.savefig(files[kind], dpi=110)
    return [
        ("Temporaries and time of a linear head and of held logits against the classes", files["head"]),
        ("Time of a loss with entropy and argmax, by summarize and by plain JAX", files["summary"]),
    ]


def draw_head(rows: list[Row]) -> Figure:
    """Temporaries and time against the classes."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    panels: dict[str, Axes] = dict(zip(["temporaries", "time in ms"], figure.subplots(1, 2), strict=True))
    for column, axes in panels.items():
        for name, style in STYLES.items():
            mine = [row for row in rows if row["loss"] == name]
            sizes = [int(row["classes"]) for row in mine]
            axes.plot(sizes, [_plain(row[column]) for row in mine], label=name, lw=2, **style)
        sizes = sorted({int(row["classes"]) for row in rows})
        ticks = sizes[::2]
        axes.set(xscale="log", yscale="log", xlabel="classes", xticks=ticks, xticklabels=map(str, ticks))
        axes.minorticks_off()
        axes.grid(True, alpha=0.35)
    panels["temporaries"].set_title("temporaries in MB")
    panels["time in ms"].set_title("time in ms")
    figure.legend(
        *panels["temporaries"].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    return figure


def draw_summary(rows: list[Row]) -> Figure:
    """Time with numbers beside the loss, over that of the loss alone."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, logits in zip(panels, ["held logits", "LinearLogits"], strict=True):
        mine = [row for row in rows if row["logits"] == logits and row["beside the loss"] != NOTHING]
        for shift, (by, color) in zip([-0.2, 0.2], BARS.items(), strict=True):
            bars = [row for row in mine if row["by"] == by]
            places = np.arange(len(bars)) + shift
            heights = [float(row["time ÷ loss alone"]) for row in bars]
            ends = np.array([[float(end) for end in row["middle half"].split("–")] for row in bars])
            axes.bar(places, heights, 0.38, color=color, label=f"by {by}")
            axes.vlines(places, *ends.T, color="black", lw=1.5)
            for place, height, end in zip(places, heights, ends[:, 1], strict=True):
                axes.annotate(
                    f"{height:.2f}", (place, max(height, end)), (0, 3), textcoords="offset points", ha="center"
                )
        axes.axhline(1, color="black", lw=1.5, ls="--")
        axes.set_xticks(range(3), ["argmax", "entropy", "both"])
        axes.set_title(logits)
    panels[0].set_ylabel("time ÷ loss alone")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _plain(cell: str) -> float:
    """302.1 MB → 302.1, 81.9 kB → 0.0819."""
    number, _, unit = cell.partition(" ")
    return float(number) / (1e3 if unit == "kB" else 1)


if __name__ == "__main__":
    written = Path(sys.argv[1])
    draw(written.read_text(), written.with_suffix(""))
