"""Per-pixel classification: which digit does every pixel of a scene belong to?

Three handwritten digits are painted beside and over each other in scenes of 32 × 48 pixels. Their faint edges belong to
no class: they are labelled `VOID`, which is the loss's `ignore_index`. Most pixels are background, so the classes are
weighted by how many pixels they have; without the weights the mean IoU is 0.89 as well. The logits have the classes on
axis 1. No digit of a held-out scene is in a scene that is trained on.

    python examples/segmentation.py                # trains, prints the held-out IoU, draws segmentation.png
    python examples/segmentation.py --output DIR   # draws elsewhere
    python examples/segmentation.py --smoke        # few scenes and steps, to see that it runs
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from scipy.ndimage import zoom
from sklearn.datasets import load_digits
from sklearn.metrics import jaccard_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxce
from jaxce.imbalance import class_counts, class_weights

mpl.use("Agg")  # draws into a file, without a display
import matplotlib.pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap

BACKGROUND = 10  # after the ten digits
NUM_CLASSES = 11
VOID = 255
HEIGHT, WIDTH = 32, 48
SIDE = 16  # of a digit
FAINT, SOLID = 0.15, 0.4  # ink between them is void
TRAINING_SCENES = 3200
HELD_OUT_SCENES = 256
BATCH_SIZE = 16
EPOCHS = 3
LEARNING_RATE = 1e-2
NAMES = [*"0123456789", "background", "void"]
COLORS = [  # ten of Paul Tol's, chosen for the colour-blind; background; void
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#661100", "#cc6677", "#882255", "#aa4499"),
    "white",
    "0.75",
]


class Scenes(NamedTuple):
    images: np.ndarray  # (N, 32, 48, 1), float32
    labels: np.ndarray  # (N, 32, 48), uint8


class Block(nnx.Module):
    def __init__(self, features_in: int, features: int, rngs: nnx.Rngs, strides: int = 1):
        self.conv = nnx.Conv(features_in, features, (3, 3), strides=strides, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(hidden)))


class Network(nnx.Module):
    """A small U-Net: down to a quarter of the resolution, and up again beside what was seen on the way down."""

    def __init__(self, rngs: nnx.Rngs):
        self.full = Block(1, 16, rngs)
        self.half = Block(16, 32, rngs, strides=2)
        self.quarter = Block(32, 96, rngs, strides=2)
        self.deep1 = Block(96, 96, rngs)
        self.deep2 = Block(96, 96, rngs)
        self.up_half = Block(96 + 32, 32, rngs)
        self.up_full = Block(32 + 16, 16, rngs)
        self.head = nnx.Linear(16, NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.typing.ArrayLike) -> jax.Array:
        """Logits of (N, C, H, W)."""
        full = self.full(jnp.asarray(images))
        half = self.half(full)
        quarter = self.deep1(self.quarter(half))
        hidden = quarter + self.deep2(quarter)
        hidden = self.up_half(jnp.concatenate([double(hidden), half], axis=-1))
        hidden = self.up_full(jnp.concatenate([double(hidden), full], axis=-1))
        return jnp.moveaxis(self.head(hidden), -1, 1)


def double(images: jax.Array) -> jax.Array:
    """Twice as many pixels along both sides."""
    return images.repeat(2, axis=1).repeat(2, axis=2)


def paint(digits: np.ndarray, classes: np.ndarray, num_scenes: int, rng: np.random.Generator) -> Scenes:
    """Scenes of three random digits beside each other and in part over each other."""
    images = np.zeros((num_scenes, HEIGHT, WIDTH), np.float32)
    labels = np.full((num_scenes, HEIGHT, WIDTH), BACKGROUND, np.uint8)
    for image, label in zip(images, labels, strict=True):
        for third in rng.permutation(3):
            digit = rng.integers(len(digits))
            top = rng.integers(HEIGHT - SIDE + 1)
            left = np.clip(third * SIDE + rng.integers(-SIDE // 2, SIDE // 2 + 1), 0, WIDTH - SIDE)
            place = slice(top, top + SIDE), slice(left, left + SIDE)
            ink = digits[digit]
            image[place] += ink * (rng.uniform(0.6, 1) - image[place])
            label[place][ink > FAINT] = VOID
            label[place][ink > SOLID] = classes[digit]
    images += rng.normal(0, 0.05, images.shape)
    return Scenes(images[..., None], labels)


def load(num_training: int, num_held_out: int) -> tuple[Scenes, Scenes]:
    """Scenes to train on and scenes held out, of different digits."""
    pixels, classes = load_digits(return_X_y=True)
    digits = np.asarray(zoom(pixels.reshape(-1, 8, 8) / 16, (1, 2, 2), order=1))  # 16 × 16 pixels
    rows = train_test_split(np.arange(len(classes)), test_size=0.25, stratify=classes, random_state=0)
    rng = np.random.default_rng(0)
    training, held_out = (
        paint(digits[np.asarray(part)], classes[np.asarray(part)], num_scenes, rng)
        for part, num_scenes in zip(rows, (num_training, num_held_out), strict=True)
    )
    return training, held_out


def loss_of_logits(logits: jax.Array, labels: jax.Array | np.ndarray, weights: jax.Array) -> jax.Array:
    return jaxce.cross_entropy(logits, labels, axis=1, ignore_index=VOID, class_weights=weights)


@nnx.jit(donate_argnames=("network", "optimizer"))
def train_step(network: Network, optimizer: nnx.Optimizer, scenes: Scenes, weights: jax.Array) -> jax.Array:
    def loss_of(network: Network) -> jax.Array:
        return loss_of_logits(network(scenes.images), scenes.labels, weights)

    loss, gradients = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, gradients)
    return loss


def train(network: Network, scenes: Scenes, weights: jax.Array, epochs: int) -> None:
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(scenes.labels)) for _ in range(epochs)]
    batches = np.concatenate(orders).reshape(-1, BATCH_SIZE)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, len(batches))
    optimizer = nnx.Optimizer(network, optax.adam(schedule), wrt=nnx.Param)
    network.train()
    progress = tqdm(batches, desc="training", unit=" steps")
    for rows in progress:
        loss = train_step(network, optimizer, Scenes(scenes.images[rows], scenes.labels[rows]), weights)
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    network.eval()


def show_void(logits: jax.Array, labels: np.ndarray, weights: jax.Array) -> None:
    """Prints that void pixels are not read and cost nothing: their logits may as well be NaN."""
    is_void = labels[:, None] == VOID
    loss_and_gradient = jax.jit(jax.value_and_grad(loss_of_logits))
    loss, gradient = loss_and_gradient(logits, labels, weights)
    spoiled_loss, spoiled_gradient = loss_and_gradient(jnp.where(is_void, jnp.nan, logits), labels, weights)
    largest = jnp.max(jnp.abs(spoiled_gradient), initial=0, where=is_void)
    is_same = jnp.array_equal(gradient, spoiled_gradient)
    print(f"void: {is_void.mean():.1%} of the pixels, where the largest gradient is {largest:.4g}")
    print(f"loss: {loss:.4f}, with NaN for the logits of void pixels {spoiled_loss:.4f}; same gradient: {is_same}")


def draw(scenes: Scenes, guesses: np.ndarray, path: Path) -> None:
    """Draws some scenes, their labels with the void in grey, and the predictions."""
    colors = {"cmap": ListedColormap(COLORS), "norm": BoundaryNorm(np.arange(-0.5, len(COLORS)), len(COLORS))}
    figure, grid = plt.subplots(3, 4, figsize=(11, 6.8), layout="constrained")
    truth = np.where(scenes.labels == VOID, NAMES.index("void"), scenes.labels)
    for column in range(4):
        grid[0, column].imshow(scenes.images[column, ..., 0], cmap="gray")
        grid[1, column].imshow(truth[column], **colors)
        grid[2, column].imshow(guesses[column], **colors)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[:, 0], ("image", "labels", "prediction"), strict=True):
        axes.set_ylabel(name, fontsize=14)
    scale = figure.colorbar(ScalarMappable(**colors), ax=grid, location="bottom", ticks=range(len(NAMES)), aspect=40)
    scale.ax.set_xticklabels(NAMES, fontsize=14)
    scale.ax.tick_params(length=0)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a segmentation of handwritten digits.")
    parser.add_argument(
        "--output", type=Path, default=Path(), help="the directory to draw in (default: the current one)"
    )
    parser.add_argument("--smoke", action="store_true", help="few scenes and steps, to see that it runs")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    training, held_out = load(64, 64) if arguments.smoke else load(TRAINING_SCENES, HELD_OUT_SCENES)
    counts = class_counts(training.labels, NUM_CLASSES, where=training.labels != VOID)
    weights = class_weights(counts, scheme="median_frequency")
    network = Network(nnx.Rngs(0))
    train(network, training, weights, epochs=1 if arguments.smoke else EPOCHS)

    logits = nnx.jit(Network.__call__)(network, held_out.images)
    show_void(logits, held_out.labels, weights)
    guesses = np.asarray(jnp.argmax(logits, axis=1))
    counted = held_out.labels != VOID
    scores = [
        jaccard_score(held_out.labels[counted] == label, guesses[counted] == label) for label in range(NUM_CLASSES)
    ]
    print("IoU:", ", ".join(f"{NAMES[label]} {score:.3f}" for label, score in enumerate(scores)))
    print(f"held-out mean IoU: {np.mean(scores):.4f}")
    draw(held_out, guesses, arguments.output / "segmentation.png")


if __name__ == "__main__":
    main()
