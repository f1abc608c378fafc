"""How time and memory grow with the classes and with the rows, as pictures.

Absolute milliseconds of one machine, so that slopes can be read; for who is faster there are the ratios of `timing`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.cases import Case
from benchmarks.report import cores, cpu
from benchmarks.timing import Plan, measure

MARKERS = {"jaxce": "o", "optax": "s", "plain JAX": "^", "PyTorch": "D", "PyTorch linear": "v"}
COLORS = ["#2f8fd8", "#e07b28", "#35a352", "#b565c9", "#d9534f"]
GREY = "#808080"  # readable on white and on black, since the background is transparent
BASES = {
    "dense": Case("dense logits", (256, 32768), "bfloat16"),
    "linear": Case("a linear head", (256, 32768), features=256),
}
SWEEPS = {"classes": [2**k for k in range(10, 18)], "rows": [2**k for k in range(4, 11)]}
SMOKE = {"classes": [8], "rows": [4]}


def sweep(base: Case, name: str, size: int) -> Case:
    rows, classes = base.shape
    return replace(base, shape=(rows, size) if name == "classes" else (size, classes))


def measured(base: Case, name: str, sizes: list[int], plan: Plan) -> dict[str, np.ndarray]:
    """By contender, for every size: median milliseconds and megabytes of temporaries."""
    points = {}
    for size in tqdm(sizes, desc=f"{base.model}, {name}"):
        results, seconds = measure(sweep(base, name, size), plan)
        for result in results:
            if result.contender in seconds:
                memory = np.nan if result.temporaries is None else result.temporaries / 1e6
                point = [1e3 * np.median(seconds[result.contender]), memory]
                points.setdefault(result.contender, {})[size] = point
    return {name: np.array([by_size.get(size, [np.nan] * 2) for size in sizes]) for name, by_size in points.items()}


def draw(base: Case, sweeps: dict[str, list[int]], plan: Plan) -> Figure:
    """Time above memory, against classes and against rows."""
    grey = dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], GREY)
    style: dict[Any, Any] = {**grey, "font.size": 11, "grid.color": GREY, "grid.alpha": 0.35, "axes.facecolor": "none"}
    fixed = {"classes": f"{base.shape[0]} rows", "rows": f"{base.shape[1]} classes"}
    beside = "" if base.features is None else f", {base.features} features"
    with mpl.rc_context(style):
        figure = Figure(figsize=(10, 7.5), layout="constrained", facecolor="none")
        axes = figure.subplots(2, 2, sharex="col", sharey="row", squeeze=False)
        for column, (name, sizes) in enumerate(sweeps.items()):
            points = measured(base, name, sizes, plan)
            for (contender, marker), color in zip(MARKERS.items(), COLORS, strict=True):
                for row, values in enumerate(points.get(contender, np.empty((0, 0))).T):
                    if not np.isnan(values).all():
                        axes[row, column].plot(sizes, values, marker=marker, color=color, label=contender, lw=2)
            axes[0, column].set_title(f"{fixed[name]}{beside}, {base.dtype}")
            axes[1, column].set(xscale="log", xlabel=name, xticks=sizes[::2], xticklabels=map(str, sizes[::2]))
            axes[1, column].minorticks_off()
        for panel, label in zip(axes[:, 0], ["time / ms", "temporaries / MB"], strict=True):
            panel.set_ylabel(label)
        for panel in axes.flat:
            panel.set(yscale="log")
            panel.grid(True)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        figure.suptitle(f"Loss and gradient of {base.model}: {cpu()}, cores: {cores()}")
    return figure


def report(plan: Plan, smoke: bool, output: Path | None, name: str) -> str:
    """Draws, and says where the pictures are."""
    lines = []
    contenders = [contender for contender in plan.contenders if contender in MARKERS]
    plan = plan._replace(contenders=contenders, rounds=min(plan.rounds, 9))
    for kind, base in BASES.items():
        base = replace(base, shape=(4, 8), features=base.features and 4) if smoke else base
        figure = draw(base, SMOKE if smoke else SWEEPS, plan)
        if output is not None:
            file = f"{name}-{kind}.png"
            figure.savefig(output / file, dpi=110, transparent=True)
            lines.append(f"![Time and temporaries of {base.model} against classes and rows]({file})")
    return "\n\n".join(["## Scaling", *(lines or ["Drawn, and not written."])]) + "\n"
