"""Rare classes among debris: what class weights, a logit adjustment, a focal loss and priced mistakes do to it.

Four classes of 260, 10, 56 and 500 training images. The first three are rare objects, the fourth is debris, and where
the network is used nearly all is debris: a rare object must be found, and debris must not be taken for one. Every
setting of the loss trains the same networks on the same images, so that they can be compared seed by seed. Other
settings change what a trained network decides: by adjusted logits, or by the least expected cost.

The images are scikit-learn's handwritten digits. The rare classes are 3 and 5; 8; 9, which people write much alike, and
debris is all other digits. Of about 180 images a digit this leaves 105, 164, 124 and 578 to hold out, half of them to
choose by (validation) and half to report (test). Every image gets Gaussian noise with a deviation of 0.3 of the range,
drawn anew whenever it is trained on: without it the network is right too often to show a trade-off.

Precision and F1 depend on how frequent the classes are where the network is used. Two streams are reported, both with
90 % debris: in one the rare classes are alike, in the other they are mixed as in training. Held-out images are weighted
to make up either. Recall and all rates within a class do not depend on it.

    python examples/rare_classes.py                # trains 22 settings × 20 seeds, prints and writes the results
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
NUM_CLASSES = len(COUNTS)
RARE, DEBRIS = slice(0, 3), 3
STREAMS = {  # shares of the classes where the network is used
    "rare alike": np.array([1, 1, 1, 27]) / 30,
    "rare as trained": np.append(0.1 * COUNTS[RARE] / np.sum(COUNTS[RARE]), 0.9),
}
NOISE = 0.3
WEIGHTS = np.array([0.8, 26.0, 4.0, 0.4])  # set by hand
BESIDE = {"": np.ones(NUM_CLASSES), "by hand, ": WEIGHTS}  # class weights beside costs
DEBRIS_WEIGHTS = [0.1, 0.2, 0.4, 0.8, 1, 2, 4, 10]  # in place of the last one
DEBRIS_SHIFTS = [0, 1, 2, 3, 4]  # added to the logit of debris after training
DEBRIS_AS_RARE = np.outer([0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0])  # costs of 1 for this mistake alone
COSTS = [1, 2, 4, 8]  # of debris taken for a rare class, beside what any mistake costs
ADJUSTED, AFTERWARDS, KNOWN = "logit adjustment", "adjusted afterwards", "adjusted to the stream"
ADVICE = [  # what, by which setting, instead of which
    ("weigh the classes by their counts", "balanced", "unweighted"),
    ("the same by a milder scheme", "inverse sqrt", "unweighted"),
    ("choose the weight of debris", "by hand, chosen", "by hand, debris 0.4"),
    ("weigh at all, and choose the weight of debris", "by hand, chosen", "unweighted"),
    ("use the focal loss", "focal loss", "unweighted"),
    ("price mistakes in training", "expected cost, chosen", "unweighted"),
    ("price mistakes in the decision", "least cost, chosen", "unweighted"),
    ("price mistakes, beside class weights", "by hand, expected cost, chosen", "by hand, chosen"),
    ("the same weights and prices, in the decision", "by hand, least cost, chosen", "by hand, chosen"),
    ("price in the decision rather than in training", "least cost, chosen", "expected cost, chosen"),
    ("adjust the logits, and shift debris", f"{ADJUSTED}, chosen", "unweighted"),
    ("adjust the logits rather than weigh", f"{ADJUSTED}, chosen", "by hand, chosen"),
    ("adjust afterwards rather than weigh", f"{AFTERWARDS}, chosen", "by hand, chosen"),
    ("adjust in training rather than afterwards", f"{ADJUSTED}, chosen", f"{AFTERWARDS}, chosen"),
    ("adjust to known shares, choosing nothing", KNOWN, "unweighted"),
    ("adjust to known shares rather than weigh", KNOWN, "by hand, chosen"),
]
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # tell apart without red and green
LABELS = {  # single points, and how far from them their names are drawn
    "unweighted": (16, 8),
    "focal loss": (16, 8),
    "expected cost 4": (16, 8),
    "least cost 4": (-64, 22),
    "inverse sqrt": (24, 24),
    "balanced": (4, 40),
}
NUDGED = {"2": (-12, 9), "0.4": (4, 16)}  # numbers that would be drawn on other points

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

    recall: np.ndarray  # (seeds, classes)
    precision: np.ndarray  # (seeds, streams, classes)
    macro_f1: np.ndarray  # (seeds, streams)
    confusion: np.ndarray  # (seeds, true classes, predicted classes), of the true class
    debris_as_rare: np.ndarray  # (seeds,)
    rare_as_debris: np.ndarray  # mean over the rare classes
    rare_missed: np.ndarray
    images: int  # that were scored, of every seed


class Result(NamedTuple):
    validation: Scores
    test: Scores


def settings() -> dict[str, Loss]:
    """The losses that are compared, by name."""
    losses = {"unweighted": Loss()}
    for weight in DEBRIS_WEIGHTS:
        losses[by_hand(weight)] = Loss(class_weights=np.append(WEIGHTS[RARE], weight))
    for scheme in ("balanced", "effective_number", "inverse_sqrt"):
        losses[scheme.replace("_", " ")] = Loss(class_weights=imbalance.class_weights(COUNTS, scheme=scheme))
    losses["focal loss"] = Loss(gamma=2.0)
    for beside, weights in BESIDE.items():
        for cost in COSTS:
            losses[f"{beside}expected cost {cost}"] = Loss(class_weights=weights, costs=cost * DEBRIS_AS_RARE)
    losses[ADJUSTED] = Loss(adjustment=imbalance.logit_adjustment(COUNTS))
    return losses


def by_hand(debris_weight: float) -> str:
    return f"by hand, debris {debris_weight:g}"


def shifted(name: str, shift: float) -> str:
    return f"{name}, debris +{shift:g}" if shift else name


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
        confusion = confusion_matrix(truth, guesses, labels=range(NUM_CLASSES), normalize="true")
        recall = np.diag(confusion)
        by_stream = []
        for shares in STREAMS.values():
            weights = (shares / np.bincount(truth))[truth]
            scores = precision_recall_fscore_support(truth, guesses, sample_weight=weights, zero_division=0)  # pyright: ignore[reportArgumentType]
            by_stream.append(scores)
        precision, _, f1, _ = map(np.stack, zip(*by_stream, strict=True))
        mistakes = 1 - recall[DEBRIS], confusion[RARE, DEBRIS].mean(), 1 - recall[RARE].mean()
        by_seed.append([recall, precision, f1.mean(axis=1), confusion, *mistakes])
    return Scores(*(100 * np.array(values) for values in zip(*by_seed, strict=True)), images=labels.shape[1])


def study(seeds: int, epochs: int) -> dict[str, Result]:
    """The scores of every setting, and of two networks whose logits are changed after training."""
    data = jax.tree.map(lambda *arrays: np.stack(arrays), *map(draw_data, range(seeds)))
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    logits = {}
    for name, loss in tqdm(settings().items(), desc="training", unit=" settings"):
        logits[name] = [np.asarray(part) for part in train(loss, data, keys, epochs)]
    logits |= without_training(logits["unweighted"], logits[ADJUSTED])
    labels = data.validation.labels, data.test.labels
    return {name: Result(*map(score, labels, parts)) for name, parts in logits.items()}


def without_training(unweighted: list[np.ndarray], adjusted: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """What becomes of two trained networks if only the decision is changed: its logits, by name."""
    afterwards = [part - np.asarray(imbalance.logit_adjustment(COUNTS)) for part in unweighted]
    logits = {}
    for name, parts in ((ADJUSTED, adjusted), (AFTERWARDS, afterwards)):
        for shift in DEBRIS_SHIFTS:
            logits[shifted(name, shift)] = [part + shift * np.eye(NUM_CLASSES)[DEBRIS] for part in parts]
    for stream, shares in STREAMS.items():
        logits[f"adjusted to {stream}"] = [part + np.log(shares) for part in afterwards]
    for beside, weights in BESIDE.items():
        for cost in COSTS:  # the decision of least expected cost
            costs = weights[:, None] * (1 - np.eye(NUM_CLASSES)) + cost * DEBRIS_AS_RARE
            logits[f"{beside}least cost {cost}"] = [-np.asarray(jax.nn.softmax(part)) @ costs for part in unweighted]
    return logits


def spread(values: np.ndarray, digits: int = 1) -> str:
    """Mean ± standard deviation over the seeds."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is readable as it stands."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def report(results: dict[str, Result]) -> str:
    """A page with what is mistaken for what, recall and precision of every class, and what follows."""
    seeds = len(results["unweighted"].test.recall)
    mistakes, classes = [], []
    for name, (_, test) in results.items():
        scores = test.debris_as_rare, test.rare_as_debris, test.rare_missed, *test.macro_f1.T
        mistakes.append([name, *map(spread, scores)])
        columns = np.concatenate([test.recall, test.precision.reshape(seeds, -1)], axis=1).T
        classes.append([name, *(spread(column, digits=0) for column in columns)])
    f1, chosen = [f"F1, {stream}" for stream in STREAMS], [choose(results, index) for index in range(len(STREAMS))]
    choices = [[family, *(by_stream[family][0] for by_stream in chosen)] for family in chosen[0]]
    advice, kinds = recommend(results, chosen), ("recall", "alike", "trained")
    return "\n\n".join(
        [
            "# Rare classes among debris",
            "Written by `python examples/rare_classes.py`, which says what the settings and the two streams are.",
            f"Test images, in percent: mean ± standard deviation over {seeds} seeds. Debris that is taken for any rare "
            "class; rare objects that are taken for debris, and for any other class (means of the rare classes); F1, "
            "mean of the four classes, in either stream.",
            table(["setting", "debris as rare", "rare as debris", "rare missed", *f1], mistakes),
            "Recall of every class, and its precision in the streams with rare classes alike and as trained; class 4 "
            "is debris. Precision is 0 where no image is taken for the class.",
            table(["setting", *(f"{kind} {n}" for kind in kinds for n in range(1, NUM_CLASSES + 1))], classes),
            "Every seed chooses a weight, a cost or a shift by F1 on its own validation images, for either stream. "
            "Named is the most frequent choice.",
            table(["chosen", *STREAMS], choices),
            "Differences of F1 on test images over the same seeds, ± standard errors that allow for the images that "
            "seeds share (Nadeau and Bengio, 2003). Borne out is what gains more than two of them.",
            table(["advice", "setting", "instead of", f1[0], "borne out", f1[1], "borne out"], advice),
        ]
    )


def choose(results: dict[str, Result], stream: int) -> dict[str, tuple[str, np.ndarray]]:
    """Of every family, what most seeds choose by the F1 on validation images, and every seed's F1 on test images."""
    kinds = [f"{beside}{kind} cost" for kind in ("expected", "least") for beside in BESIDE]
    families = {"by hand": [by_hand(weight) for weight in DEBRIS_WEIGHTS]}
    families |= {kind: [f"{kind} {cost}" for cost in COSTS] for kind in kinds}
    families |= {name: [shifted(name, shift) for shift in DEBRIS_SHIFTS] for name in (ADJUSTED, AFTERWARDS)}
    choices = {}
    for family, names in families.items():
        validation, test = (np.stack([results[name][part].macro_f1[:, stream] for name in names]) for part in range(2))
        chosen = np.argmax(validation, axis=0)
        frequency = np.bincount(chosen)
        often = f"{names[np.argmax(frequency)]} ({np.max(frequency)} of {len(chosen)} seeds)"
        choices[f"{family}, chosen"] = often, np.take_along_axis(test, chosen[None], axis=0)[0]
    return choices


def recommend(results: dict[str, Result], chosen: list[dict[str, tuple[str, np.ndarray]]]) -> list[list[str]]:
    """What every advice gains on the test images, in either stream."""
    share = results["unweighted"].test.images / np.sum(COUNTS)
    lines = [list(advice) for advice in ADVICE]
    for index, stream in enumerate(STREAMS):
        f1 = {name: result.test.macro_f1[:, index] for name, result in results.items()}
        f1 |= {family: of_choices for family, (_, of_choices) in chosen[index].items()}
        f1[KNOWN] = f1[f"adjusted to {stream}"]
        for line in lines:
            gains = f1[line[1]] - f1[line[2]]
            gain, error = np.mean(gains), np.std(gains, ddof=1) * np.sqrt(1 / len(gains) + share)
            verdict = "yes" if gain > 2 * error else "the opposite" if gain < -2 * error else "no"
            line += [f"{gain:+.1f} ± {error:.1f}", verdict]
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
            beside = {"xytext": NUDGED.get(text, offset), "textcoords": "offset points", "ha": "left", "va": "center"}
            axes.annotate(text, place, color=color, arrowprops=line, path_effects=[halo], zorder=4, **beside)

    weights = [f"{weight:g}" for weight in DEBRIS_WEIGHTS]
    label = "class weights by hand; numbers: the weight of debris"
    draw([by_hand(weight) for weight in DEBRIS_WEIGHTS], weights, (2, 10), BLUE, marker="o", label=label)
    shifts = [f"+{shift:g}" for shift in DEBRIS_SHIFTS]
    adjusted, afterwards = ([shifted(name, shift) for shift in DEBRIS_SHIFTS] for name in (ADJUSTED, AFTERWARDS))
    label = "logit adjustment; numbers: added to the logit of debris after training"
    draw(adjusted, shifts, (-25, -8), ORANGE, marker="s", label=label)
    label = "the same, but trained unweighted and adjusted afterwards"
    draw(afterwards, [""] * len(shifts), (0, 0), GREEN, marker="^", ls="--", mfc="white", label=label)
    for name, offset in LABELS.items():
        draw([name], [name], offset, "black", marker="D")
    axes.legend(frameon=False, loc="upper right")
    axes.text(0.02, 0.02, "lower left is better", transform=axes.transAxes, color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


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
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares losses for rare classes among debris.")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the results (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="2 seeds, 2 epochs, to see that it runs")
    arguments = parser.parse_args()

    results = study(*(2, 2) if arguments.smoke else (SEEDS, EPOCHS))
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw_tradeoff(results, arguments.output / "rare_classes_tradeoff.png")
    names = ["unweighted", by_hand(0.4), by_hand(4), shifted(ADJUSTED, 2)]
    draw_confusion(results, names, arguments.output / "rare_classes_confusion.png")
    text = report(results)
    path = arguments.output / "rare_classes.md"
    path.write_text(text + "\n")
    print(f"wrote {path}\n\n{text}")


if __name__ == "__main__":
    main()
