"""Rare classes among debris: what class weights, a logit adjustment, a focal loss and priced mistakes do to it.

Four classes of 260, 10, 56 and 500 training images. The first three are rare objects, the fourth is debris, and where
the network is used nearly all is debris: a rare object must be found, and debris must not be taken for one. Every
setting of the loss trains the same networks on the same images, so that they can be compared seed by seed.

The images are scikit-learn's handwritten digits. The rare classes are 3 and 5; 8; 9, which people write much alike, and
debris is all other digits. Of about 180 images a digit this leaves 105, 164, 124 and 578 to hold out, half of them to
choose by (validation) and half to report (test). Every image gets Gaussian noise with a deviation of 0.3 of the range,
drawn anew whenever it is trained on: without it the network is right too often to show a trade-off.

Held-out debris counts for several images each, so that it is 90 % of what precision and F1 are made of, as `STREAM`
says. Recall and all rates within a class do not depend on it.

    python examples/rare_classes.py                # trains 18 settings × 20 seeds, prints and writes the results
    python examples/rare_classes.py --output out   # writes rare_classes.md and two pictures elsewhere
    python examples/rare_classes.py --smoke        # 2 seeds, 2 epochs, to see that it runs
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix, precision_recall_fscore_support
from tqdm import tqdm

import jaxce
from jaxce import imbalance

mpl.use("Agg")  # draws into files, without a display
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke

DIGITS = [(3, 5), (8,), (9,), (0, 1, 2, 4, 6, 7)]  # of every class
COUNTS = np.array([260, 10, 56, 500])  # to train on
TEST_SIZE = 486
NUM_CLASSES = len(COUNTS)
RARE, DEBRIS = slice(0, 3), 3
STREAM = 0.9  # share of debris where the network is used
NOISE = 0.3
WEIGHTS = np.array([0.8, 26.0, 4.0, 0.4])  # set by hand
DEBRIS_WEIGHTS = [0.1, 0.2, 0.4, 0.8, 1, 2, 4, 10]  # in place of the last one
DEBRIS_SHIFTS = [1, 2, 3, 4]  # added to the logit of debris after training
COSTS = [1, 4]  # of debris taken for a rare class
ADJUSTED, AFTERWARDS = "logit adjustment", "adjusted afterwards"
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # tell apart without red and green
LABELS = {  # single points, and how far from them their names are drawn
    "unweighted": (16, 8),
    "focal loss": (16, 8),
    "expected cost 1": (16, 8),
    "expected cost 4": (16, 8),
    "by hand, expected cost 4": (16, 58),
    "inverse sqrt": (24, 24),
    "effective number": (-44, 58),
    "balanced": (4, 34),
}

SEEDS = 20
EPOCHS = 100
BATCH_SIZE = 118  # divides the 826 images
HIDDEN = 32
LEARNING_RATE = 3e-3


class Images(NamedTuple):
    pixels: np.ndarray  # (N, 64), float32 from 0 to 1
    labels: np.ndarray  # (N,), int32


class Data(NamedTuple):
    training: Images
    validation: Images
    test: Images


class Loss(NamedTuple):
    """One loss for all settings. They differ in numbers alone, so that all are trained by one compiled program."""

    class_weights: jax.Array | np.ndarray = np.ones(NUM_CLASSES)
    gamma: jax.Array | float = 0.0  # at 0, focal loss is cross entropy
    adjustment: jax.Array | np.ndarray = np.zeros(NUM_CLASSES)
    costs: jax.Array | np.ndarray = np.zeros((NUM_CLASSES, NUM_CLASSES))

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        adjusted = logits + self.adjustment
        loss = jaxce.focal_loss(adjusted, labels, gamma=self.gamma, class_weights=self.class_weights)
        return loss + imbalance.expected_cost(logits, labels, self.costs)


class Scores(NamedTuple):
    """In percent, with the seeds along the first axis."""

    precision: np.ndarray  # (seeds, classes)
    recall: np.ndarray
    confusion: np.ndarray  # (seeds, true classes, predicted classes), of the true class
    macro_f1: np.ndarray  # (seeds,)
    debris_as_rare: np.ndarray
    rare_as_debris: np.ndarray  # mean over the rare classes
    rare_missed: np.ndarray


class Result(NamedTuple):
    validation: Scores
    test: Scores


def settings() -> dict[str, Loss]:
    """The losses that are compared, by name."""
    losses = {"unweighted": Loss()}
    for weight in DEBRIS_WEIGHTS:
        losses[by_hand(weight)] = Loss(class_weights=np.append(WEIGHTS[RARE], weight))
    for scheme in ("balanced", "median_frequency", "effective_number", "inverse_sqrt"):
        losses[scheme.replace("_", " ")] = Loss(class_weights=imbalance.class_weights(COUNTS, scheme=scheme))
    losses["focal loss"] = Loss(gamma=2.0)
    for cost in COSTS:
        losses[f"expected cost {cost}"] = Loss(costs=debris_costs(cost))
    losses["by hand, expected cost 4"] = Loss(class_weights=WEIGHTS, costs=debris_costs(4))
    losses[ADJUSTED] = Loss(adjustment=imbalance.logit_adjustment(COUNTS))
    return losses


def by_hand(debris_weight: float) -> str:
    return f"by hand, debris {debris_weight:g}"


def shifted(name: str, shift: float) -> str:
    return f"{name}, debris +{shift:g}"


def debris_costs(cost: float) -> np.ndarray:
    costs = np.zeros((NUM_CLASSES, NUM_CLASSES))
    costs[DEBRIS, RARE] = cost
    return costs


def draw_data(seed: int) -> Data:
    """The images of one seed: exactly `COUNTS` to train on, and half of the rest each to validate and to test."""
    rng = np.random.default_rng(seed)
    pixels, digits = load_digits(return_X_y=True)
    pixels = pixels.astype(np.float32) / 16
    noisy = pixels + NOISE * rng.standard_normal(pixels.shape, np.float32)
    parts = []
    for label, count in enumerate(COUNTS):
        rows = rng.permutation(np.flatnonzero(np.isin(digits, DIGITS[label])))
        parts.append(np.split(rows, [count, (count + len(rows)) // 2]))
    labels = np.select([np.isin(digits, members) for members in DIGITS], range(NUM_CLASSES)).astype(np.int32)
    training, validation, test = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    return Data(
        Images(pixels[training], labels[training]),
        Images(noisy[validation], labels[validation]),
        Images(noisy[test], labels[test]),
    )


class Network(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, NUM_CLASSES, rngs=rngs)

    def __call__(self, pixels: jax.typing.ArrayLike) -> jax.Array:
        return self.head(nnx.relu(self.hidden(jnp.asarray(pixels))))


@partial(jax.jit, static_argnames="epochs")
@partial(jax.vmap, in_axes=(None, 0, 0, None))
def train(loss: Loss, data: Data, key: jax.Array, epochs: int) -> tuple[jax.Array, jax.Array]:
    """Trains one network per seed, all seeds at once. Returns the logits of validation and test images."""
    definition, params = nnx.split(Network(nnx.Rngs(key)))
    optimizer = optax.adam(LEARNING_RATE)
    size = len(data.training.labels)

    def loss_of(params, pixels, labels):
        return loss(nnx.merge(definition, params)(pixels), labels)

    def step(state, batch):
        params, moments = state
        rows, key = batch
        pixels = data.training.pixels[rows]
        pixels += NOISE * jax.random.normal(key, pixels.shape)
        gradients = jax.grad(loss_of)(params, pixels, data.training.labels[rows])
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    order_key, noise_key = jax.random.split(key)
    order = jax.vmap(partial(jax.random.permutation, x=size))(jax.random.split(order_key, epochs))
    batches = order.reshape(-1, BATCH_SIZE)
    keys = jax.random.split(noise_key, len(batches))
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), (batches, keys))
    network = nnx.merge(definition, params)
    return network(data.validation.pixels), network(data.test.pixels)


def score(labels: np.ndarray, logits: np.ndarray) -> Scores:
    """Scores of the classes with the largest logits; labels and logits have the seeds along the first axis."""
    by_seed = []
    for truth, guesses in zip(labels, np.argmax(logits, axis=-1), strict=True):
        is_debris = truth == DEBRIS
        weight = STREAM / (1 - STREAM) * np.mean(~is_debris) / np.mean(is_debris)
        by_class = precision_recall_fscore_support(
            truth,
            guesses,
            labels=range(NUM_CLASSES),
            sample_weight=np.where(is_debris, weight, 1),
            zero_division=0,  # pyright: ignore[reportArgumentType]
        )
        precision, recall, f1 = map(np.asarray, by_class[:3])
        confusion = confusion_matrix(truth, guesses, labels=range(NUM_CLASSES), normalize="true")
        into_debris, missed = confusion[RARE, DEBRIS].mean(), 1 - recall[RARE].mean()
        by_seed.append([precision, recall, confusion, f1.mean(), 1 - recall[DEBRIS], into_debris, missed])
    return Scores(*(100 * np.array(values) for values in zip(*by_seed, strict=True)))


def study(seeds: int, epochs: int) -> dict[str, Result]:
    """The scores of every setting, and of two networks whose logits are changed after training."""
    data = jax.tree.map(lambda *arrays: np.stack(arrays), *map(draw_data, range(seeds)))
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    logits = {}
    for name, loss in tqdm(settings().items(), desc="training", unit=" settings"):
        logits[name] = [np.asarray(part) for part in train(loss, data, keys, epochs)]
    adjustment = np.asarray(imbalance.logit_adjustment(COUNTS))
    logits[AFTERWARDS] = [part - adjustment for part in logits["unweighted"]]
    for name in (ADJUSTED, AFTERWARDS):
        for shift in DEBRIS_SHIFTS:
            logits[shifted(name, shift)] = [part + shift * np.eye(NUM_CLASSES)[DEBRIS] for part in logits[name]]
    labels = data.validation.labels, data.test.labels
    return {name: Result(*map(score, labels, parts)) for name, parts in logits.items()}


def spread(values: np.ndarray, digits: int = 1) -> str:
    """Mean ± standard deviation over the seeds."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is readable as it stands."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def report(results: dict[str, Result]) -> str:
    """A page with what is mistaken for what, precision and recall of every class, and what follows."""
    seeds = len(results["unweighted"].test.macro_f1)
    mistakes, classes = [], []
    for name, (_, test) in results.items():
        scores = test.debris_as_rare, test.rare_as_debris, test.rare_missed, test.macro_f1
        mistakes.append([name, *map(spread, scores)])
        columns = np.stack([test.precision, test.recall], axis=2).reshape(seeds, -1).T
        classes.append([name, *(spread(column, digits=0) for column in columns)])
    names = [f"{kind} {label}" for label in range(1, NUM_CLASSES + 1) for kind in ("precision", "recall")]
    return "\n\n".join(
        [
            "# Rare classes among debris",
            "Written by `python examples/rare_classes.py`, which says what the settings are.",
            f"Test images, in percent: mean ± standard deviation over {seeds} seeds. Debris that is taken for any rare "
            "class; rare objects that are taken for debris, and for any other class (means of the rare classes); F1, "
            f"mean of the four classes, with {100 * STREAM:.0f} % debris.",
            table(["setting", "debris as rare", "rare as debris", "rare missed", "macro F1"], mistakes),
            "Precision and recall of every class; the fourth is debris. Precision is 0 where no image is taken for it.",
            table(["setting", *names], classes),
            "Differences of macro F1 over the same seeds, ± standard errors that allow for the images that seeds share "
            "(Nadeau and Bengio, 2003). Every seed chooses a weight, cost or shift on its own validation images; named "
            "is the most frequent choice.",
            table(["advice", "setting", "instead of", "macro F1", "borne out"], recommend(results)),
        ]
    )


class Choice(NamedTuple):
    name: str
    macro_f1: np.ndarray  # (seeds,), of the test images


def choose(results: dict[str, Result], names: list[str]) -> Choice:
    """Every seed takes the setting that is best on its own validation images."""
    validation, test = (np.stack([results[name][part].macro_f1 for name in names]) for part in range(2))
    chosen = np.argmax(validation, axis=0)
    frequency = np.bincount(chosen)
    often = "" if len(names) == 1 else f" ({np.max(frequency)} of {len(chosen)} seeds)"
    return Choice(names[np.argmax(frequency)] + often, np.take_along_axis(test, chosen[None], axis=0)[0])


def recommend(results: dict[str, Result]) -> list[list[str]]:
    """Advice is borne out if it gains more than two standard errors on the test images."""
    unweighted, counted, balanced, focal, priced = (
        choose(results, [name])
        for name in ("unweighted", by_hand(0.4), "balanced", "focal loss", "by hand, expected cost 4")
    )
    weighted = choose(results, [by_hand(weight) for weight in DEBRIS_WEIGHTS])
    costs = choose(results, [f"expected cost {cost}" for cost in COSTS])
    adjusted, afterwards = (
        choose(results, [shifted(name, shift) for shift in DEBRIS_SHIFTS]) for name in (ADJUSTED, AFTERWARDS)
    )
    candidates = [
        ("weigh the classes by their counts", balanced, unweighted),
        ("weigh debris more than by its count", weighted, counted),
        ("weigh the classes, and choose the weight of debris", weighted, unweighted),
        ("price mistakes, without class weights", costs, unweighted),
        ("price mistakes, beside class weights", priced, counted),
        ("price mistakes rather than weigh debris more", priced, weighted),
        ("use the focal loss", focal, unweighted),
        ("adjust the logits, and shift debris", adjusted, unweighted),
        ("adjust the logits rather than weigh the classes", adjusted, weighted),
        ("adjust afterwards rather than weigh the classes", afterwards, weighted),
        ("adjust in training rather than afterwards", adjusted, afterwards),
    ]
    lines = []
    for advice, better, other in candidates:
        gains = better.macro_f1 - other.macro_f1
        gain, error = np.mean(gains), np.std(gains, ddof=1) * np.sqrt(1 / len(gains) + TEST_SIZE / np.sum(COUNTS))
        verdict = "yes" if gain > 2 * error else "no"
        lines.append([advice, better.name, other.name, f"{gain:+.1f} ± {error:.1f}", verdict])
    return lines


def draw_tradeoff(results: dict[str, Result], path: Path) -> None:
    """Debris taken for a rare class against rare objects missed."""
    figure, axes = plt.subplots(figsize=(10, 6.5), layout="constrained")
    axes.set(xlabel="debris taken for a rare class / %", ylabel="rare objects missed / %, mean of the rare classes")
    axes.set(xscale="log", xlim=(0.2, 60), ylim=(10, 60))
    axes.set_xticks([0.3, 1, 3, 10, 30], labels=["0.3", "1", "3", "10", "30"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)

    def draw(names: list[str], texts: list[str], offset: tuple[float, float], color: str, **style) -> None:
        points = np.array([[results[name].test.debris_as_rare, results[name].test.rare_missed] for name in names])
        places, spreads = np.mean(points, axis=2), np.std(points, axis=2, ddof=1)
        axes.errorbar(*places.T, *spreads.T[::-1], fmt="none", ecolor=color, elinewidth=0.8, alpha=0.4)
        axes.plot(*places.T, color=color, ms=6, **style)
        line = {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 2, "shrinkB": 4} if len(names) == 1 else None
        halo = withStroke(linewidth=3, foreground="white")
        for text, place in zip(texts, places, strict=True):
            beside = {"xytext": offset, "textcoords": "offset points", "ha": "left", "va": "center"}
            axes.annotate(text, place, color=color, arrowprops=line, path_effects=[halo], zorder=4, **beside)

    weights = [f"{weight:g}" for weight in DEBRIS_WEIGHTS]
    label = "class weights by hand; numbers: the weight of debris"
    draw([by_hand(weight) for weight in DEBRIS_WEIGHTS], weights, (2, 10), BLUE, marker="o", label=label)
    shifts = [f"+{shift:g}" for shift in (0, *DEBRIS_SHIFTS)]
    adjusted, afterwards = (
        [name, *(shifted(name, shift) for shift in DEBRIS_SHIFTS)] for name in (ADJUSTED, AFTERWARDS)
    )
    label = "logit adjustment; numbers: added to the logit of debris after training"
    draw(adjusted, shifts, (-25, -8), ORANGE, marker="s", label=label)
    label = "the same, but trained unweighted and adjusted afterwards"
    draw(afterwards, [""] * len(shifts), (0, 0), GREEN, marker="^", ls="--", mfc="white", label=label)
    for name, offset in LABELS.items():
        text = "balanced, median frequency" if name == "balanced" else name
        draw([name], [text], offset, "black", marker="D")
    axes.legend(frameon=False, loc="upper right")
    axes.text(0.02, 0.02, "lower left is better", transform=axes.transAxes, color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_confusion(results: dict[str, Result], names: list[str], path: Path) -> None:
    """Confusion matrices, averaged over the seeds."""
    figure, panels = plt.subplots(2, 2, figsize=(8.5, 8), layout="constrained")
    classes = [", ".join(map(str, digits)) for digits in DIGITS[RARE]] + ["debris"]
    for axes, name in zip(panels.flat, names, strict=True):
        matrix = results[name].test.confusion.mean(axis=0)
        display = ConfusionMatrixDisplay(matrix, display_labels=classes)
        display.plot(ax=axes, cmap="Blues", colorbar=False, values_format=".1f", im_kw={"vmin": 0, "vmax": 100})
        axes.set(title=name, xlabel="predicted", ylabel="true, each row 100 %")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares losses for rare classes among debris.")
    parser.add_argument(
        "--output", type=Path, default=Path(), help="folder for table and pictures (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="2 seeds, 2 epochs, to see that it runs")
    arguments = parser.parse_args()

    results = study(*(2, 2) if arguments.smoke else (SEEDS, EPOCHS))
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw_tradeoff(results, arguments.output / "rare_classes_tradeoff.png")
    names = ["unweighted", by_hand(0.4), by_hand(4), shifted(ADJUSTED, 2)]
    draw_confusion(results, names, arguments.output / "rare_classes_confusion.png")
    text = report(results)
    (arguments.output / "rare_classes.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
