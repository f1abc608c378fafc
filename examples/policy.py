"""A small language model learns by trial what is rewarded, with and without its logits in memory.

The text is Python's standard library, and the transformer that of `language_model.py`. First it learns the text. Then,
in every round, it continues prompts, each several times. A continuation is rewarded with the share of its characters
that are vowels. The clipped policy loss of `recipes/policy_gradient.py` makes likelier what was rewarded more than the
other continuations of the same prompt. Two copies learn from the same continuations, which the first one samples: one
holds its logits, the other has `LinearLogits`. The curves agree; the memory of the compiled steps does not.

    python examples/policy.py                   # a minute on two cores, draws policy.png
    python examples/policy.py --output DIR      # draws there
    python examples/policy.py --smoke           # few steps and tokens, to see that it runs
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from language_model import Transformer, read
from recipes.policy_gradient import policy_loss
from tqdm import tqdm

import jaxce

mpl.use("Agg")  # draws into a file, without a display
import matplotlib.pyplot as plt

PROMPT = 8  # tokens
CONTINUATION = 16
PROMPTS = 16  # of a round
SAMPLES = 4  # of a prompt, which are compared with one another
UPDATES = 2  # on the same continuations: from the second on the ratio of old and new probability is not 1
LAZY = {"recompute": True, "block_bytes": 2**20}  # a block of 256 classes for the 1024 tokens of a round
LOGITS: dict[str, Callable[..., Any]] = {
    "held logits": jnp.matmul,
    "LinearLogits": partial(jaxce.LinearLogits, **LAZY),
}
TEXT = optax.adam(2e-3)
# Adam's epsilon keeps it from making a whole step of a gradient that is nothing but rounding.
REWARDS = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-4, eps=1e-4))


class Learner(NamedTuple):
    parameters: Any
    moments: Any


def hidden_of(graph: Any, parameters: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The hidden states, and the kernel that makes logits of them."""
    network = nnx.merge(graph, parameters)
    return network(tokens), network.kernel


@partial(jax.jit, static_argnames="graph")
def learn_text(graph: Any, learner: Learner, windows: jax.Array) -> tuple[Learner, jax.Array]:
    def loss_of(parameters: Any) -> jax.Array:
        hidden, kernel = hidden_of(graph, parameters, windows[:, :-1])
        return jaxce.linear_cross_entropy(hidden, kernel, windows[:, 1:])

    loss, gradients = jax.value_and_grad(loss_of)(learner.parameters)
    return update(TEXT, learner, gradients), loss


def update(optimizer: optax.GradientTransformation, learner: Learner, gradients: Any) -> Learner:
    updates, moments = optimizer.update(gradients, learner.moments)
    return Learner(optax.apply_updates(learner.parameters, updates), moments)


@partial(jax.jit, static_argnames="graph")
def sample(graph: Any, parameters: Any, prompts: jax.Array, key: jax.Array) -> jax.Array:
    """Prompts with their continuations, the samples of a prompt next to each other."""
    tokens = jnp.repeat(prompts, SAMPLES, axis=0)
    tokens = jnp.pad(tokens, ((0, 0), (0, CONTINUATION)))

    def append(tokens: jax.Array, place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        position, key = place
        hidden, kernel = hidden_of(graph, parameters, tokens)  # causal: what is not yet there is not seen
        chosen = jax.random.categorical(key, hidden[:, position - 1] @ kernel)
        return tokens.at[:, position].set(chosen.astype(tokens.dtype)), None

    positions = jnp.arange(PROMPT, PROMPT + CONTINUATION)
    return jax.lax.scan(append, tokens, (positions, jax.random.split(key, CONTINUATION)))[0]


@partial(jax.jit, static_argnames="graph")
def log_p_of(graph: Any, parameters: Any, tokens: jax.Array) -> jax.Array:
    """Of the tokens of the continuations."""
    hidden, kernel = hidden_of(graph, parameters, tokens[:, :-1])
    logits = jaxce.LinearLogits(hidden[:, PROMPT - 1 :], kernel, **LAZY)
    return -jaxce.summarize(logits, tokens[:, PROMPT:]).nll


@partial(jax.jit, static_argnames=("graph", "name"))
def learn_policy(
    graph: Any, name: str, learner: Learner, tokens: jax.Array, rollout: dict[str, jax.Array]
) -> tuple[Learner, jax.Array, dict[str, jax.Array]]:
    def loss_of(parameters: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden, kernel = hidden_of(graph, parameters, tokens[:, :-1])
        logits = LOGITS[name](hidden[:, PROMPT - 1 :], kernel)
        return policy_loss(logits, tokens[:, PROMPT:], rollout, None)

    (loss, logged), gradients = jax.value_and_grad(loss_of, has_aux=True)(learner.parameters)
    return update(REWARDS, learner, gradients), loss, logged


class Reward(NamedTuple):
    """The share of vowels, from what is known of every token."""

    vowels: jax.Array
    characters: jax.Array

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.vowels[tokens].sum(axis=-1) / self.characters[tokens].sum(axis=-1)


def reward_of(tokenizer: Any) -> Reward:
    texts = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
    vowels = [sum(letter in "aeiouAEIOU" for letter in text) for text in texts]
    return Reward(jnp.array(vowels, jnp.float32), jnp.array([max(1, len(text)) for text in texts], jnp.float32))


def draw(rewards: list[float], curves: dict[str, np.ndarray], temporaries: dict[str, float], path: Path) -> None:
    """Draws the reward of the rounds, the curves of both, and the memory of both steps."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.2), width_ratios=(3, 3, 3, 2), layout="constrained")
    axes[0].plot(np.arange(1, len(rewards) + 1), rewards, "C2")
    axes[0].set(xlabel="round", title="Share of vowels in the continuations")
    for column, title in ((1, "Loss"), (2, "Entropy in nats")):
        for (name, values), style in zip(curves.items(), ("C0", "C1--"), strict=True):
            width, alpha = (3, 0.5) if style == "C0" else (1.2, 1)
            axes[column].plot(values[:, column - 1], style, lw=width, alpha=alpha, label=name)
        axes[column].set(xlabel="update", title=title)
        axes[column].legend(frameon=False)
    names = ["held\nlogits", "Linear-\nLogits"]
    bars = axes[3].bar(names, list(temporaries.values()), width=0.6, color=["C0", "C1"])
    axes[3].bar_label(bars, fmt="%.0f MB", padding=2)
    axes[3].set(ylabel="MB", title="Temporaries of the step")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a language model by rewards, with and without its logits.")
    parser.add_argument(
        "--output", type=Path, default=Path(), help="the directory to draw in (default: the current one)"
    )
    parser.add_argument("--smoke", action="store_true", help="few steps and tokens, to see that it runs")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    vocabulary, max_files, steps, rounds = (1000, 20, 5, 3) if arguments.smoke else (4096, 200, 300, 30)

    tokenizer, stream = read(vocabulary, max_files)
    rng, length = np.random.default_rng(0), PROMPT + CONTINUATION
    graph, parameters = nnx.split(Transformer(vocabulary, nnx.Rngs(0)))
    learner = Learner(parameters, TEXT.init(parameters))
    start = time.perf_counter()
    loss = jnp.zeros(())
    for _ in tqdm(range(steps), "the text", unit=" steps"):
        windows = stream[rng.integers(len(stream) - length, size=(32, 1)) + np.arange(length + 1)]
        learner, loss = learn_text(graph, learner, jnp.asarray(windows))
    print(f"the text: last loss {loss:.4f}, {time.perf_counter() - start:.0f} s")

    reference, reward = learner.parameters, reward_of(tokenizer)
    learners = {name: Learner(reference, REWARDS.init(reference)) for name in LOGITS}
    rewards: list[float] = []
    curves: dict[str, list[list[float]]] = {name: [] for name in LOGITS}
    tokens, rollout = jnp.zeros(()), {}
    start = time.perf_counter()
    for key in tqdm(jax.random.split(jax.random.key(0), rounds), "rewards", unit=" rounds"):
        prompts = stream[rng.integers(len(stream) - length, size=(PROMPTS, 1)) + np.arange(PROMPT)]
        sampler = learners["held logits"].parameters
        tokens = sample(graph, sampler, jnp.asarray(prompts), key)
        earned = reward(tokens[:, PROMPT:])
        rewards.append(float(earned.mean()))
        advantage = jax.nn.standardize(earned.reshape(PROMPTS, SAMPLES), epsilon=1e-6).reshape(-1, 1)
        rollout = {
            "advantage": jnp.broadcast_to(advantage, (len(tokens), CONTINUATION)),
            "old_log_p": log_p_of(graph, sampler, tokens),
            "reference_log_p": log_p_of(graph, reference, tokens),
        }
        for name in LOGITS:
            for _ in range(UPDATES):
                learners[name], loss, logged = learn_policy(graph, name, learners[name], tokens, rollout)
                curves[name].append([float(loss), float(logged["entropy"]), float(logged["kl"])])
    seconds = time.perf_counter() - start

    temporaries = {}
    for name in LOGITS:
        memory = learn_policy.lower(graph, name, learners[name], tokens, rollout).compile().memory_analysis()
        assert memory is not None, "this backend does not say what it allocates"
        temporaries[name] = memory.temp_size_in_bytes / 1e6
    held, lazy = (np.array(curve) for curve in curves.values())
    print(f"share of vowels {rewards[0]:.3f} to {np.mean(rewards[-3:]):.3f}, {seconds:.0f} s")
    print(f"temporaries {temporaries['held logits']:.0f} MB, {temporaries['LinearLogits']:.0f} MB")
    difference = np.max(np.abs(held - lazy))
    print(f"largest difference between the curves: {difference:.1e}")
    assert difference < 1e-5
    draw(rewards, {"held logits": held, "LinearLogits": lazy}, temporaries, arguments.output / "policy.png")


if __name__ == "__main__":
    main()
