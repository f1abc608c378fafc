"""What a loss penalises, drawn: over two logits, and over the margin between them.

It draws `loss_surfaces.png`, squared error against cross entropy over the activations of the correct class and of the
other one, and `loss_margins.png`, six losses and their derivatives. Every value and gradient is that of jaxce's own
functions, for one row at a time, mapped over a grid with `jax.vmap`.

    python examples/loss_surfaces.py                # draws both into the current directory
    python examples/loss_surfaces.py --output DIR   # draws elsewhere
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

import jaxce

mpl.use("Agg")  # draws into files, without a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from mpl_toolkits.mplot3d import Axes3D

Loss = Callable[[jax.Array], jax.Array]  # of two logits: of the correct class, of the other

CORRECT = np.array(0)
REACH = 4.0  # logits from -REACH to REACH
LEVELS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
POINTS = {"right": (3.0, -3.0), "right, both high": (3.0, 2.0), "wrong": (-0.5, 0.5)}
ACCENT = "#c1440e"


def cross_entropy(logits: jax.Array) -> jax.Array:
    return jaxce.cross_entropy(logits, CORRECT)


def squared_error(logits: jax.Array) -> jax.Array:
    """Squared error against a one-hot target of ±1, summed over the two outputs."""
    return jaxce.mse_loss(logits, np.array([1.0, -1.0], np.float32), reduction="sum")


def focal(gamma: float) -> Loss:
    return lambda logits: jaxce.focal_loss(logits, CORRECT, gamma=gamma)


def poly(logits: jax.Array) -> jax.Array:
    return jaxce.poly_loss(logits, CORRECT)


def hinge(logits: jax.Array) -> jax.Array:
    return jaxce.multi_margin_loss(logits, CORRECT)


SURFACES: dict[str, Loss] = {"squared error, targets (1, −1)": squared_error, "cross entropy": cross_entropy}
CURVES: list[tuple[str, Loss, dict[str, Any]]] = [
    ("cross_entropy", cross_entropy, {"color": "black", "lw": 2.8}),
    ("poly_loss, ε = 1", poly, {"color": "#0072b2", "ls": "--"}),
    ("focal_loss, γ = 2", focal(2.0), {"color": "#009e73"}),
    ("focal_loss, γ = 5", focal(5.0), {"color": "#009e73", "ls": "-."}),
    ("multi_margin_loss", hinge, {"color": "#cc79a7", "ls": (0, (6, 1))}),
    ("mse_loss, targets ±1", squared_error, {"color": ACCENT}),
]


def on_grid(loss: Loss, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A square of logits, (size, size, 2), their losses, (size, size), and gradients, (size, size, 2)."""
    ticks = np.linspace(-REACH, REACH, size, dtype=np.float32)
    logits = np.stack(np.meshgrid(ticks, ticks), axis=-1)
    losses, gradients = jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(loss))))(logits)
    return logits, np.asarray(losses), np.asarray(gradients)


def draw_contours(axes: Axes, loss: Loss, colors: dict[str, Any]) -> None:
    """The loss from above, the steps against its gradient, and where they go back towards the wrong side."""
    logits, losses, gradients = on_grid(loss, size=161)
    x, y = np.moveaxis(logits, -1, 0)
    is_right = x > y
    is_pushed_back = is_right & (gradients[..., 0] > gradients[..., 1])  # a step makes the margin smaller
    axes.contourf(x, y, losses, LEVELS, **colors)
    axes.contour(x, y, losses, LEVELS, colors="white", linewidths=1)
    axes.contourf(x, y, is_pushed_back, [0.5, 1.5], colors="none", hatches=["//"])
    axes.plot([-REACH, REACH], [-REACH, REACH], color=ACCENT, lw=2.5)

    logits, _, gradients = on_grid(loss, size=9)
    longest = np.linalg.norm(gradients, axis=-1).max()
    x, y = np.moveaxis(logits, -1, 0)
    u, v = np.moveaxis(-gradients, -1, 0)
    axes.quiver(x, y, u, v, angles="xy", scale_units="xy", scale=longest / 1.1, width=0.007, color="0.15")
    ticks = [-4, -2, 0, 2, 4]
    axes.set(xlabel="activation of the correct class", ylabel="activation of the other class", aspect="equal")
    axes.set(xticks=ticks, yticks=ticks)
    share = is_pushed_back.sum() / is_right.sum()
    axes.set_title(f"hatched: right, and a step makes\nit less so, {share:.0%} of the right side")
    box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.9}
    side = {"color": ACCENT, "rotation": 45, "rotation_mode": "anchor", "ha": "center", "bbox": box}
    axes.text(-2.7, -2.4, "wrong side", va="bottom", **side)
    axes.text(-2.4, -2.7, "right side", va="top", **side)
    for name, point in POINTS.items():
        axes.plot(*point, "o", color=ACCENT, mec="white", ms=9)
        label = f"{name}: {loss(jnp.array(point)):.2g}"
        axes.annotate(label, point, xytext=(12, 10), textcoords="offset points", ha="right", bbox=box)


def draw_surface(axes: Axes3D, loss: Loss, colors: dict[str, Any]) -> None:
    """The loss as a height over the logits, with the line where the two classes tie."""
    logits, losses, _ = on_grid(loss, size=161)
    x, y = np.moveaxis(logits, -1, 0)
    axes.plot_surface(x, y, losses, rcount=161, ccount=161, antialiased=False, **colors)
    axes.plot(np.diagonal(x), np.diagonal(y), np.diagonal(losses), color=ACCENT, lw=2.5, zorder=10)
    axes.set(xlabel="correct", ylabel="other")
    axes.locator_params(nbins=5)
    axes.view_init(elev=25, azim=-60)


def draw_surfaces(path: Path) -> None:
    shades = mpl.colormaps["Blues"](np.linspace(0, 0.7, len(LEVELS) - 1))
    colors = {"cmap": ListedColormap(shades), "norm": BoundaryNorm(LEVELS, len(shades))}
    figure = plt.figure(figsize=(9, 9.4), layout="constrained")
    for column, (name, loss) in enumerate(SURFACES.items(), start=1):
        draw_surface(figure.add_subplot(2, 2, column, projection="3d", title=name), loss, colors)
        draw_contours(figure.add_subplot(2, 2, column + 2), loss, colors)
    scale = ScalarMappable(**colors)
    figure.colorbar(scale, ax=figure.axes, location="bottom", aspect=50, label="loss, in all four", format="%g")
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})
    plt.close(figure)
    print(f"wrote {path}")


def on_margins(loss: Loss, margins: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Losses and derivatives at margins between two logits, one half on either side of 0."""

    def at_margin(margin: jax.Array) -> jax.Array:
        return loss(jnp.stack([margin, -margin]) / 2)

    return jax.jit(jax.vmap(jax.value_and_grad(at_margin)))(margins)


def draw_margins(path: Path) -> None:
    """Losses and derivatives against the margin, the logit of the correct class less that of the other."""
    margins = np.linspace(-4, 8, 601, dtype=np.float32)
    figure, (values, slopes, tails) = plt.subplots(1, 3, figsize=(12.5, 5), layout="constrained")
    for name, loss, style in CURVES:
        losses, derivatives = on_margins(loss, margins)
        values.plot(margins, losses, label=name, **style)
        slopes.plot(margins, derivatives, **style)
        tails.semilogy(margins, np.where(derivatives == 0, np.nan, np.abs(derivatives)), **style)
    values.set(title="loss", ylim=(0, 5))
    slopes.set(title="derivative", ylim=(-2, 2))
    tails.set(title="size of the derivative", ylim=(1e-6, 10))
    for axes in (values, slopes, tails):
        axes.set(xlabel="margin: correct logit − other logit", xlim=(-4, 8))
        axes.axvline(0, color="0.6", lw=1, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    slopes.axhline(0, color="0.6", lw=1, zorder=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws what losses penalise.")
    parser.add_argument(
        "--output", type=Path, default=Path(), help="the directory to draw in (default: the current one)"
    )
    directory = parser.parse_args().output
    directory.mkdir(parents=True, exist_ok=True)

    plt.rcParams.update({"font.size": 13, "lines.linewidth": 2, "hatch.linewidth": 0.5})
    draw_surfaces(directory / "loss_surfaces.png")
    draw_margins(directory / "loss_margins.png")
    for name, loss in SURFACES.items():
        for point in POINTS.values():
            value, gradient = jax.value_and_grad(loss)(jnp.array(point))
            print(f"{name} at {point}: loss {value:.4g}, gradient ({gradient[0]:.4g}, {gradient[1]:.4g})")


if __name__ == "__main__":
    main()
