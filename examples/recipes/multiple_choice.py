"""Evaluation: which choice has the largest log-likelihood, with a last batch that is not full."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxce


def score(logits, tokens, mask, answers):
    """Logits and tokens are (questions, choices, length); a question or a choice without a token is none."""
    log_p = -jaxce.summarize(logits, tokens, where=mask).nll.sum(axis=-1)
    choices = mask.any(axis=-1)
    chosen = jnp.where(choices, log_p, -jnp.inf).argmax(axis=-1)
    right = jnp.take_along_axis(log_p, answers[:, None], axis=-1)[:, 0]
    numbers = {"accuracy": (chosen == answers).astype(log_p.dtype), "log_p": right}
    where = choices.any(axis=-1)
    return {name: jaxce.reduce_losses(number, where=where, reduction="parts") for name, number in numbers.items()}


@jax.jit
def score_batch(hidden, kernel, *batch):
    return score(jaxce.LinearLogits(hidden, kernel), *batch)


if __name__ == "__main__":
    rng, size = np.random.default_rng(0), 8
    hidden, kernel = rng.normal(size=(20, 4, 6, 16)).astype("f"), rng.normal(size=(16, 4096)).astype("f")
    tokens, answers = rng.integers(0, 4096, (20, 4, 6)), rng.integers(0, 4, 20)
    hidden[np.arange(20), answers] = kernel.T[tokens[np.arange(20), answers]] / 2  # the right one is likely
    mask = np.arange(6) < rng.integers(1, 7, (20, 4, 1))
    totals = {name: jaxce.MeanParts(jnp.zeros(()), jnp.zeros(())) for name in ("accuracy", "log_p")}
    for start in range(0, 20, size):
        batch = [array[start : start + size] for array in (hidden, tokens, mask, answers)]
        pad = size - len(batch[0])  # questions without a token fill the last batch: one program for all
        hidden_, *rest = (np.pad(array, [(0, pad)] + [(0, 0)] * (array.ndim - 1)) for array in batch)
        scores = score_batch(hidden_, kernel, *rest)
        totals = {name: total + scores[name] for name, total in totals.items()}
    print(f"{totals['log_p'].weight:.0f} questions, ", end="")
    print(f"accuracy {totals['accuracy'].mean():.2f}, log-likelihood {totals['log_p'].mean():.1f}")
