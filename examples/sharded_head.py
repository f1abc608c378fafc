"""A small language model whose head is split over devices, trained in one process and in two, with the same losses.

The text is Python's standard library, cut into words. A mesh of 2 x 4 devices, all of them on the CPU, splits the rows
over "data" and the kernel of the head over "model". The vocabulary does not divide by 4: the kernel is padded, and
`num_classes` says how many of its columns are real. How hidden and kernel are split, `jaxce.linear_cross_entropy` reads
from their types.

The program trains in one process with 8 devices. Then it starts itself as two processes with 4 devices each, which meet
on 127.0.0.1, and compares the losses of both runs.

    python examples/sharded_head.py                     # half a minute on two cores
    python examples/sharded_head.py --smoke             # ten steps and few words, to see that it runs
    python examples/sharded_head.py --across data       # the axis that the two processes split, instead of "model"
    python examples/sharded_head.py --alone             # in one process only
    python examples/sharded_head.py --checkpoint DIR    # keeps the state in DIR, every 6 steps, and continues from it
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count="
os.environ["XLA_FLAGS"] += "4" if "--process-id" in sys.argv else "8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import P
from tqdm import tqdm

import jaxce

PROCESSES = 2
MESH = {"data": 2, "model": 4}
LENGTH = 64
BATCH_SIZE = 16
FEATURES = 64
HEADS = 4
OPTIMIZER = optax.adam(1e-3)
SAVE_EVERY = 6  # steps

# All in seconds. When a process dies its connections close, and the other ends with an error of JAX a few seconds
# later; one that hangs is noticed by its heartbeats.
INITIALIZATION_TIMEOUT = 60  # for the processes to meet
HEARTBEAT_TIMEOUT = 10  # after which a silent process counts as dead
SHUTDOWN_TIMEOUT = 10  # for a process that is done to wait for the other
RUN_TIMEOUT = 600  # after which both processes are killed


class State(NamedTuple):
    parameters: Any
    moments: optax.OptState


def load(vocabulary: int, max_files: int) -> np.ndarray:
    """The standard library as one stream of words, spaces and signs, each by its rank, or 0 for the rare."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    paths = sorted(path for path in library.rglob("*.py") if skipped.isdisjoint(path.relative_to(library).parts))
    np.random.default_rng(0).shuffle(paths)
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths[:max_files])
    words = re.findall(r"\w+|\s+|[^\w\s]", text)
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1), 1)}
    assert len(ranks) == vocabulary - 1, "too little text for so many words"
    return np.array([ranks.get(word, 0) for word in words], np.int32)


def initialize(vocabulary: int) -> State:
    """Every device holds all parameters but the head's kernel, of which it holds a slice of the padded columns."""
    slices = MESH["model"]
    shapes = {
        "embedding": (vocabulary, FEATURES),
        "positions": (LENGTH, FEATURES),
        "attention": (FEATURES, 3 * FEATURES),
        "up": (FEATURES, 4 * FEATURES),
        "down": (4 * FEATURES, FEATURES),
        "kernel": (FEATURES, -(-vocabulary // slices) * slices),
    }
    parameters = {
        name: 0.05 * jax.random.normal(key, shape, out_sharding=P(None, "model") if name == "kernel" else P())
        for key, (name, shape) in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes.items(), strict=True)
    }
    return State(parameters, OPTIMIZER.init(parameters))


def network(parameters: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """The hidden states, by causal attention and an MLP, each behind a norm and beside a residual connection."""
    hidden = parameters["embedding"].at[tokens].get(out_sharding=P("data")) + parameters["positions"]
    heads = (jax.nn.standardize(hidden) @ parameters["attention"]).reshape(*tokens.shape, 3 * HEADS, -1)
    hidden += jax.nn.dot_product_attention(*jnp.split(heads, 3, axis=-2), is_causal=True).reshape(hidden.shape)
    hidden += jax.nn.gelu(jax.nn.standardize(hidden) @ parameters["up"]) @ parameters["down"]
    return jax.nn.standardize(hidden)


@partial(jax.jit, static_argnames="vocabulary", donate_argnames="state")
def train_step(state: State, windows: jax.Array, vocabulary: int) -> tuple[State, jax.Array]:
    def loss_of(parameters: dict[str, jax.Array]) -> jax.Array:
        hidden = network(parameters, windows[:, :-1])
        kernel, targets = parameters["kernel"], windows[:, 1:]  # rare words are no targets
        return jaxce.linear_cross_entropy(hidden, kernel, targets, num_classes=vocabulary, ignore_index=0)

    loss, gradients = jax.value_and_grad(loss_of)(state.parameters)
    updates, moments = OPTIMIZER.update(gradients, state.moments)
    return State(optax.apply_updates(state.parameters, updates), moments), loss


def train(
    stream: np.ndarray, vocabulary: int, steps: int, across: str, directory: Path | None
) -> Iterator[tuple[int, float]]:
    """The loss of every step that is left, on a mesh of which the processes, where there are two, split `across`."""
    names = sorted(MESH, key=lambda name: name != across)
    mesh = jax.make_mesh([MESH[name] for name in names], names)
    starts = np.random.default_rng(0).integers(len(stream) - LENGTH, size=(steps, BATCH_SIZE, 1))
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=SAVE_EVERY, max_to_keep=1, enable_async_checkpointing=False
    )
    checkpoints = ocp.CheckpointManager(directory, options=options) if directory else nullcontext()
    with jax.set_mesh(mesh), checkpoints as manager:
        state = jax.jit(initialize, static_argnums=0)(vocabulary)
        done = manager.latest_step() if manager else None
        if manager and done:
            state = manager.restore(done, args=ocp.args.StandardRestore(state))
        for step in range(done or 0, steps):
            windows = stream[starts[step] + np.arange(LENGTH + 1)]
            batch = jax.make_array_from_callback(windows.shape, jax.NamedSharding(mesh, P("data")), windows.__getitem__)
            state, loss = train_step(state, batch, vocabulary)
            yield step + 1, float(loss)
            if manager:
                manager.save(step + 1, args=ocp.args.StandardSave(state))


def connect(coordinator: str, process_id: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        PROCESSES,
        process_id,
        coordinator_bind_address=coordinator,
        initialization_timeout=INITIALIZATION_TIMEOUT,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
    )


@contextmanager
def start_processes() -> Iterator[list[subprocess.Popen[str]]]:
    """This command again, once for every process; none outlives the block, however it ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = "{}:{}".format(*free.getsockname())
    command = [sys.executable, *sys.orig_argv[1:], "--coordinator", coordinator, "--process-id"]
    processes = []
    try:
        for number in range(PROCESSES):
            processes.append(subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train_in_processes() -> dict[int, float]:
    with start_processes() as processes:
        outputs = [process.communicate(timeout=RUN_TIMEOUT)[0] for process in processes]
    assert not any(process.returncode for process in processes), "a process failed, for the reason above"
    words = [[line.split() for line in output.splitlines() if line.startswith("step ")] for output in outputs]
    first, second = ({int(step): float(loss) for _, step, _, loss in lines} for lines in words)
    assert first == second, "the two processes print different losses"
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a language model whose head is split over devices.")
    parser.add_argument("--smoke", action="store_true", help="ten steps and few words, to see that it runs")
    parser.add_argument("--steps", type=int, help="how many steps (default: 100, or 10 with --smoke)")
    parser.add_argument("--across", choices=MESH, default="model", help="axis that two processes split (%(default)s)")
    parser.add_argument("--alone", action="store_true", help="in one process only")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="keep the state here, and continue from it")
    parser.add_argument("--coordinator", metavar="ADDRESS", help="where processes meet, for those the program starts")
    parser.add_argument("--process-id", type=int, metavar="NUMBER", help="which of them this one is")
    arguments = parser.parse_args()
    vocabulary, max_files, steps = (1001, 20, 10) if arguments.smoke else (10_001, 200, 100)

    if arguments.process_id is not None:
        connect(arguments.coordinator, arguments.process_id)
    directory = arguments.checkpoint and arguments.checkpoint.resolve() / f"processes-{jax.process_count()}"
    losses = train(load(vocabulary, max_files), vocabulary, arguments.steps or steps, arguments.across, directory)
    if arguments.alone or arguments.process_id is not None:
        for step, loss in losses:
            print(f"step {step} loss {loss!r}", flush=True)
        return

    one = dict(tqdm(losses, "one process", unit=" steps"))
    assert one, "no step is left"
    two = train_in_processes()
    print("step  one process  two processes")
    for step in list(one)[:: max(1, len(one) // 10)]:
        print(f"{step:4}  {one[step]:11.7f}  {two[step]:13.7f}")
    difference = max(abs(two[step] / loss - 1) for step, loss in one.items())
    print(f"largest relative difference: {difference:.1e}")
    assert difference < 1e-6


if __name__ == "__main__":
    main()
