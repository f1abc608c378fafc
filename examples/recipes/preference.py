"""Preference of one answer to another, as in DPO: two sums of log-probabilities meet in one loss."""

import jax
import jax.numpy as jnp

import jaxce


def sequence_log_p(logits, tokens, mask):
    return -jaxce.summarize(logits, tokens, where=mask).nll.sum(axis=-1)


def preference_loss(logits, tokens, mask, reference_log_p, beta=0.1):
    """All but the last are (2, pairs, length): the answers that were chosen, and those that were rejected."""
    gain = sequence_log_p(logits, tokens, mask) - reference_log_p
    margin = beta * (gain[0] - gain[1])
    loss = jaxce.binary_cross_entropy(margin, jnp.ones_like(margin))  # the mean of −log σ(margin)
    return loss, {"margin": margin.mean(), "accuracy": (margin > 0).mean()}


@jax.jit
def step(hidden, kernel, *batch):
    def loss_of(hidden, kernel):
        return preference_loss(jaxce.LinearLogits(hidden, kernel), *batch)

    return jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(hidden, kernel)


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, kernel = jax.random.normal(keys[0], (2, 8, 32, 16)), jax.random.normal(keys[1], (16, 4096)) / 4
    tokens = jax.random.randint(keys[2], (2, 8, 32), 0, 4096)
    mask = jnp.arange(32) < jax.random.randint(keys[3], (2, 8, 1), 5, 32)
    reference_log_p = jax.jit(sequence_log_p)(jaxce.LinearLogits(hidden, kernel), tokens, mask)  # at the start: itself
    (first, _), gradient = step(hidden, kernel, tokens, mask, reference_log_p)
    (second, logged), _ = step(hidden, kernel - 10 * gradient[1], tokens, mask, reference_log_p)
    print(f"loss {first:.4f} to {second:.4f}, accuracy {logged['accuracy']:.2f}")
