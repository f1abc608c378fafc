"""Dynamic fine-tuning: the loss of a token is scaled by its own probability, through which no gradient flows."""

import jax
import jax.numpy as jnp

import jaxce


def scaled_loss(logits, tokens, mask):
    def formula(summary):
        return jax.lax.stop_gradient(jnp.exp(-summary.nll)) * summary.nll, {"nll": summary.nll}

    return jaxce.custom_loss(formula, logits, tokens, where=mask, has_aux=True)


@jax.jit
def step(hidden, kernel, tokens, mask):
    def loss_of(hidden, kernel):
        return scaled_loss(jaxce.LinearLogits(hidden, kernel), tokens, mask)

    return jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(hidden, kernel)


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernel = jax.random.normal(keys[0], (4, 32, 16)), jax.random.normal(keys[1], (16, 4096))
    tokens = jax.random.categorical(keys[2], hidden @ kernel)
    mask = jnp.arange(32) < jnp.array([[32], [20], [7], [25]])
    (loss, logged), _ = step(hidden, kernel, tokens, mask)
    print(f"loss {loss:.4f}, nll {logged['nll']:.4f}")
