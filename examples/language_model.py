"""A small language model with tied embeddings and 32,768 tokens, trained with and without its logits in memory.

The text is Python's standard library, cut into tokens by a byte-level BPE that is trained on it. The same transformer
is trained twice, from the same weights and on the same batches: with `jaxce.cross_entropy` of the logits, and with
`jaxce.linear_cross_entropy`, which never holds them. The curves agree; the memory of the compiled steps does not.

    python examples/language_model.py                    # some minutes on two cores, draws language_model.png
    python examples/language_model.py --output out.png   # draws elsewhere
    python examples/language_model.py --smoke            # five steps and few tokens, to see that it runs
"""

import argparse
import math
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm

import jaxce

mpl.use("Agg")  # draws into a file, without a display
import matplotlib.pyplot as plt

LENGTH = 128
BATCH_SIZE = 8
FEATURES = 128
LAYERS = 2
HEADS = 4
LEARNING_RATE = 1e-3  # at 3e-3 the two runs have been seen to part by 1e-2 in 200 steps
HELD_OUT = 128  # windows at the end of the text
BLOCK_BYTES = 2**24  # a block of 4096 classes for 1024 rows; the default of 32 MiB would be a quarter of all logits


class Block(nnx.Module):
    """Causal attention and an MLP, each behind a layer norm and beside a residual connection."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.up = nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs)
        self.down = nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(hidden[..., 0])
        hidden += self.attention(self.norm1(hidden), mask=mask)
        return hidden + self.down(nnx.gelu(self.up(self.norm2(hidden))))


class Transformer(nnx.Module):
    """Returns the hidden states; `kernel` makes logits of them."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(vocabulary, FEATURES, embedding_init=normal, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, FEATURES, embedding_init=normal, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        hidden = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)

    @property
    def kernel(self) -> jax.Array:
        return self.embed.embedding[...].T  # (D, V), tied


def dense_loss(network: Transformer, windows: jax.Array) -> jax.Array:
    logits = network(windows[:, :-1]) @ network.kernel
    return jaxce.cross_entropy(logits, windows[:, 1:])


def linear_loss(network: Transformer, windows: jax.Array) -> jax.Array:
    hidden = network(windows[:, :-1])
    return jaxce.linear_cross_entropy(hidden, network.kernel, windows[:, 1:], block_bytes=BLOCK_BYTES, recompute=True)


def read(vocabulary: int, max_files: int | None) -> tuple[ByteLevelBPETokenizer, np.ndarray]:
    """The standard library as one stream of tokens."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    paths = sorted(path for path in library.rglob("*.py") if skipped.isdisjoint(path.relative_to(library).parts))
    np.random.default_rng(0).shuffle(paths)
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths[:max_files]]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    assert tokenizer.get_vocab_size() == vocabulary, "too little text for so many tokens"
    stream = np.concatenate([np.asarray(text.ids, np.int32) for text in tokenizer.encode_batch(texts)])
    print(f"{len(paths[:max_files])} files, {len(stream):,} tokens")
    return tokenizer, stream


def load(vocabulary: int, max_files: int | None) -> tuple[np.ndarray, jax.Array]:
    """Tokens to train on, and windows of the end of the text, which are held out."""
    _, stream = read(vocabulary, max_files)
    training, held_out = np.split(stream, [-HELD_OUT * (LENGTH + 1)])
    print(f"{len(training):,} to train on, {len(held_out):,} held out")
    return training, jnp.asarray(held_out.reshape(HELD_OUT, LENGTH + 1))


class Run(NamedTuple):
    losses: list[float]  # of every step
    held_out: float
    temporaries: float  # MB
    seconds: float


def train(
    loss_of: Callable[[Transformer, jax.Array], jax.Array], vocabulary: int, batches: jax.Array, held_out: jax.Array
) -> Run:
    steps = len(batches)
    network = Transformer(vocabulary, nnx.Rngs(0))
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, 1 + steps // 10, steps)
    optimizer = nnx.Optimizer(network, optax.adamw(schedule), wrt=nnx.Param)

    @nnx.jit(donate_argnames=("network", "optimizer"))
    def train_step(network: Transformer, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
        loss, gradients = nnx.value_and_grad(loss_of)(network, windows)
        optimizer.update(network, gradients)
        return loss

    compiled = train_step.lower(network, optimizer, batches[0]).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say what it allocates"
    start = time.perf_counter()
    losses = [
        float(compiled(network, optimizer, windows)) for windows in tqdm(batches, loss_of.__name__, unit=" steps")
    ]
    seconds = time.perf_counter() - start
    held_out_loss = float(nnx.jit(linear_loss)(network, held_out))  # all at once: as an array, the logits were 2 GB
    return Run(losses, held_out_loss, memory.temp_size_in_bytes / 1e6, seconds)


def draw(dense: Run, linear: Run, path: str) -> None:
    """Draws both training curves and the memory of both steps."""
    figure, (curves, memory) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(2, 1), layout="constrained")
    steps = np.arange(1, len(dense.losses) + 1)
    curves.plot(steps, dense.losses, "C0", lw=3, alpha=0.5, label="cross_entropy")
    curves.plot(steps, linear.losses, "C1--", lw=1.2, label="linear_cross_entropy")
    curves.set(xlabel="step", ylabel="cross entropy", title="Training loss")
    curves.legend(frameon=False)
    names, temporaries = ["cross_entropy", "linear_\ncross_entropy"], [dense.temporaries, linear.temporaries]
    memory.bar_label(memory.bar(names, temporaries, width=0.6, color=["C0", "C1"]), fmt="%.0f MB", padding=2)
    memory.set(ylabel="MB", title="Temporaries of the compiled step")
    for axes in (curves, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a language model with and without its logits in memory.")
    parser.add_argument("--output", default="language_model.png", help="where to draw (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="five steps and few tokens, to see that it runs")
    arguments = parser.parse_args()
    vocabulary, max_files, steps = (1000, 20, 5) if arguments.smoke else (32_768, None, 200)

    stream, held_out = load(vocabulary, max_files)
    starts = np.random.default_rng(0).integers(len(stream) - LENGTH, size=(steps, BATCH_SIZE, 1))
    batches = jnp.asarray(stream[starts + np.arange(LENGTH + 1)])  # random windows, the same for both
    runs = {loss_of.__name__: train(loss_of, vocabulary, batches, held_out) for loss_of in (dense_loss, linear_loss)}
    for name, run in runs.items():
        print(
            f"{name + ':':12} last loss {run.losses[-1]:.4f}, held-out loss {run.held_out:.4f} "
            f"(perplexity {math.exp(run.held_out):.1f}), temporaries {run.temporaries:.0f} MB, {run.seconds:.0f} s"
        )
    dense, linear = runs.values()
    difference = np.max(np.abs(np.subtract(dense.losses, linear.losses)))
    print(f"largest difference between the curves: {difference:.1e}")
    assert difference < 1e-2
    draw(dense, linear, arguments.output)


if __name__ == "__main__":
    main()
