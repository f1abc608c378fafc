"""Handwritten digits from end to end: a small Flax NNX network, trained with `jaxce.cross_entropy`.

It shows label smoothing, a compiled training step whose state is donated, and one compiled shape for all mini-batches:
the last one is filled up with rows labelled `IGNORE`, and the loss is the mean over the others.

    python examples/digits.py                    # trains, prints the held-out accuracy, draws digits.png
    python examples/digits.py --output out.png   # draws elsewhere
    python examples/digits.py --smoke            # one epoch, to see that it runs
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxce

mpl.use("Agg")  # draws into a file, without a display
import matplotlib.pyplot as plt

NUM_CLASSES = 10
SMOOTHING = 0.1
IGNORE = -1
EPOCHS = 30
BATCH_SIZE = 128
LEARNING_RATE = 3e-3


class Digits(NamedTuple):
    images: np.ndarray  # (N, 8, 8, 1), float32 from 0 to 1
    labels: np.ndarray  # (N,), int32


class Network(nnx.Module):
    """Two convolutions and a linear head, for images of 8 × 8 pixels."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 32, NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.typing.ArrayLike) -> jax.Array:
        hidden = nnx.relu(self.conv1(jnp.asarray(images)))
        hidden = nnx.relu(self.conv2(hidden))
        return self.head(hidden.reshape(hidden.shape[0], -1))


def load() -> tuple[Digits, Digits]:
    """Three quarters of the digits to train on, one quarter held out."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    rows = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    training, held_out = (Digits(images[part], labels[part].astype(np.int32)) for part in rows)
    return training, held_out


def loss_of(network: Network, digits: Digits) -> jax.Array:
    return jaxce.cross_entropy(network(digits.images), digits.labels, ignore_index=IGNORE, label_smoothing=SMOOTHING)


@nnx.jit(donate_argnames=("network", "optimizer"))
def train_step(network: Network, optimizer: nnx.Optimizer, digits: Digits) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_of)(network, digits)
    optimizer.update(network, gradients)
    return loss


@nnx.jit
def evaluate(network: Network, digits: Digits) -> tuple[jax.Array, jax.Array]:
    return loss_of(network, digits), jnp.argmax(network(digits.images), axis=-1)


def mini_batches(digits: Digits, rng: np.random.Generator) -> Iterator[Digits]:
    """Shuffled mini-batches of one shape: the last is filled up with rows that do not count."""
    order = rng.permutation(len(digits.labels))
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        missing = BATCH_SIZE - len(rows)
        images = np.pad(digits.images[rows], [(0, missing), (0, 0), (0, 0), (0, 0)])
        yield Digits(images, np.pad(digits.labels[rows], (0, missing), constant_values=IGNORE))


def train(network: Network, training: Digits, held_out: Digits, epochs: int) -> tuple[list[float], list[float]]:
    """Returns the training loss of every step and the held-out loss after every epoch."""
    optimizer = nnx.Optimizer(network, optax.adam(LEARNING_RATE), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    training_losses, held_out_losses = [], []
    progress = tqdm(range(epochs), desc="training", unit=" epochs")
    for _ in progress:
        losses = [train_step(network, optimizer, batch) for batch in mini_batches(training, rng)]
        training_losses += map(float, losses)
        held_out_losses.append(float(evaluate(network, held_out)[0]))
        progress.set_postfix(loss=f"{training_losses[-1]:.3f}", held_out=f"{held_out_losses[-1]:.3f}")
    return training_losses, held_out_losses


def draw(
    training_losses: list[float], held_out_losses: list[float], labels: np.ndarray, guesses: np.ndarray, path: str
) -> None:
    """Draws the training curve and the confusion matrix."""
    figure, (curve, matrix) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")

    steps_per_epoch = len(training_losses) // len(held_out_losses)
    epochs = np.arange(1, len(held_out_losses) + 1)
    target = np.full(NUM_CLASSES, SMOOTHING / NUM_CLASSES)
    target[0] += 1 - SMOOTHING
    least = -np.sum(target * np.log(target))  # the entropy of a smoothed label
    curve.plot(np.arange(1, len(training_losses) + 1) / steps_per_epoch, training_losses, "C0", lw=1, label="training")
    curve.plot(epochs, held_out_losses, "C1o-", ms=4, label="held out")
    curve.axhline(least, color="0.5", ls="--", lw=1, label=f"least possible, {least:.2f}")
    curve.set(xlabel="epoch", ylabel="cross entropy", title=f"Loss, label smoothing {SMOOTHING}", ylim=(0, None))
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.spines[["top", "right"]].set_visible(False)
    curve.legend(frameon=False)

    ConfusionMatrixDisplay.from_predictions(labels, guesses, ax=matrix, cmap="Blues", colorbar=False)
    for text in matrix.texts:
        text.set_visible(text.get_text() != "0")
    matrix.set_title(f"Held-out digits, {np.sum(guesses == labels)} of {len(labels)} right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains on handwritten digits with jaxce.cross_entropy.")
    parser.add_argument("--output", default="digits.png", help="where to draw (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one epoch, to see that it runs")
    arguments = parser.parse_args()

    training, held_out = load()
    network = Network(nnx.Rngs(0))
    losses = train(network, training, held_out, epochs=1 if arguments.smoke else EPOCHS)
    guesses = np.asarray(evaluate(network, held_out)[1])
    draw(*losses, held_out.labels, guesses, arguments.output)
    print(f"held-out accuracy: {accuracy_score(held_out.labels, guesses):.4f}")


if __name__ == "__main__":
    main()
