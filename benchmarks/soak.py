"""20,000 training steps through every loss, in float32 and bfloat16: what only a long run shows.

python -m benchmarks.soak [--steps N]    # exits with 1 on a NaN, a second trace or memory that grows
"""

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import trange

import jaxce
from benchmarks.report import machine

ROWS, FEATURES, CLASSES, BATCHES = 32, 8, 10, 16
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-4}


def logits_of(params, batch):
    """NaN in the rows that do not count."""
    return jnp.where(batch["where"][:, None], batch["inputs"] @ params, jnp.nan)


def dense(loss, params, batch, **options):
    return loss(logits_of(params, batch), batch["labels"], where=batch["where"], weights=batch["weights"], **options)


def by_distribution(params, batch):
    targets = jax.nn.one_hot(batch["labels"], CLASSES, dtype=params.dtype)
    return jaxce.cross_entropy(logits_of(params, batch), targets, where=batch["where"], **OPTIONS)


def by_log_probs(params, batch):
    log_probs = jax.nn.log_softmax(logits_of(params, batch))
    return jaxce.nll_loss(log_probs, batch["labels"], where=batch["where"])


def by_element(loss, params, batch, **options):
    logits = logits_of(params, batch)
    targets = jax.nn.one_hot(batch["labels"], CLASSES, dtype=params.dtype)
    return loss(logits, targets, where=jnp.broadcast_to(batch["where"][:, None], logits.shape), **options)


def by_teacher(params, batch):
    teacher = jax.lax.stop_gradient(logits_of(jnp.roll(params, 1), batch))
    return jaxce.distillation_loss(logits_of(params, batch), teacher, temperature=2.0, where=batch["where"])


def lazily(loss, params, batch, recompute=None, **options):
    logits = jaxce.LinearLogits(batch["hidden"], params, block_bytes=4 * ROWS * 3, recompute=recompute)
    return loss(logits, batch["labels"], where=batch["where"], **options)


def lazily_by_teacher(params, batch):
    teacher = jax.lax.stop_gradient(jnp.roll(params, 1))
    student, teacher = (jaxce.LinearLogits(batch["hidden"], kernel) for kernel in (params, teacher))
    return jaxce.distillation_loss(student, teacher, where=batch["where"])


LOSSES = {
    "cross_entropy": partial(dense, jaxce.cross_entropy, **OPTIONS),
    "cross_entropy of distributions": by_distribution,
    "focal_loss": partial(dense, jaxce.focal_loss),
    "poly_loss": partial(dense, jaxce.poly_loss),
    "multi_margin_loss": partial(dense, jaxce.multi_margin_loss),
    "nll_loss": by_log_probs,
    "binary_cross_entropy": partial(by_element, jaxce.binary_cross_entropy, label_smoothing=0.1),
    "binary_focal_loss": partial(by_element, jaxce.binary_focal_loss, alpha=0.25),
    "mse_loss": partial(by_element, jaxce.mse_loss),
    "l1_loss": partial(by_element, jaxce.l1_loss),
    "distillation_loss": by_teacher,
    "lazy cross_entropy, recompute": partial(lazily, jaxce.cross_entropy, recompute=True, **OPTIONS),
    "lazy cross_entropy, in the forward pass": partial(lazily, jaxce.cross_entropy, recompute=False),
    "lazy focal_loss": partial(lazily, jaxce.focal_loss),
    "lazy poly_loss": partial(lazily, jaxce.poly_loss),
    "lazy distillation_loss": lazily_by_teacher,
}


def make_step(name, loss, optimizer, traces):
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, is_finite, batch):
        traces[name] += 1
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state)
        is_finite &= jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient))
        return optax.apply_updates(params, updates), state, is_finite

    return step


def make_batches(dtype):
    """Batches with rows that do not count and hold NaN, and one batch where none counts."""
    rng = np.random.default_rng(0)
    for number in range(BATCHES):
        where = (rng.random(ROWS) < 0.8) & (number > 0)
        where[0] = False
        inputs = rng.normal(0, 1, (ROWS, FEATURES))
        hidden = np.where(where[:, None], inputs, np.nan)
        arrays = {"inputs": inputs.astype(dtype), "hidden": hidden.astype(dtype), "where": where}
        arrays |= {"labels": rng.integers(0, CLASSES, ROWS, np.int32)}
        yield jax.device_put(arrays | {"weights": rng.uniform(0.5, 2, ROWS).astype(np.float32)})


def resident():
    """Bytes of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    optimizer, traces, states, batches = optax.adam(1e-2), Counter(), {}, {}
    for dtype in (jnp.float32, jnp.bfloat16):
        batches[dtype] = list(make_batches(dtype))
        for name, loss in LOSSES.items():
            params = jax.random.normal(jax.random.key(0), (FEATURES, CLASSES), dtype)
            of_dtype = f"{name}, {dtype.__name__}"
            step = make_step(of_dtype, loss, optimizer, traces)
            states[of_dtype] = (dtype, step, (params, optimizer.init(params), jnp.array(True)))
    early = 0
    for number in trange(steps):
        for name, (dtype, step, state) in states.items():
            states[name] = (dtype, step, step(*state, batches[dtype][number % BATCHES]))
        if number == steps // 10:
            jax.block_until_ready([state for _, _, state in states.values()])
            early = resident()
    not_finite = [name for name, (_, _, (_, _, is_finite)) in states.items() if not is_finite]
    traced_again = [name for name, count in traces.items() if count > 1]
    growth = (resident() - early) / 1e6
    print(f"Machine: {machine()}.")
    print(f"{steps} steps of {len(states)} losses; not finite: {not_finite}; traced again: {traced_again}")
    print(f"resident memory: {early / 1e6:.0f} MB after a tenth, {growth:+.1f} MB since")
    sys.exit(bool(not_finite or traced_again or growth > 20))


if __name__ == "__main__":
    main()
