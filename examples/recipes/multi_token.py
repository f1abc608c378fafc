"""Multi-token prediction: several heads on one hidden state, each for a token further on."""

import jax
import jax.numpy as jnp

import jaxce


def multi_token_loss(hidden, kernels, tokens, **options):
    """Kernels are (heads, features, vocabulary): the first predicts the next token, the second the one after it."""
    length = tokens.shape[-1]

    def of_head(kernel, ahead):
        known = jnp.broadcast_to(jnp.arange(length) < length - ahead, tokens.shape)
        logits = jaxce.LinearLogits(hidden, kernel, **options)
        return jaxce.cross_entropy(logits, jnp.roll(tokens, -ahead, axis=-1), where=known)

    losses = jax.vmap(of_head)(kernels, jnp.arange(1, len(kernels) + 1))
    return losses.mean(), losses


@jax.jit
def step(hidden, kernels, tokens):
    return jax.value_and_grad(multi_token_loss, argnums=(0, 1), has_aux=True)(hidden, kernels, tokens)


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernels = jax.random.normal(keys[0], (4, 32, 16)), jax.random.normal(keys[1], (3, 16, 4096)) / 4
    tokens = jax.random.randint(keys[2], (4, 32), 0, 4096)
    (loss, losses), gradients = step(hidden, kernels, tokens)
    print(f"loss {loss:.4f}, of the heads {losses[0]:.4f}, {losses[1]:.4f}, {losses[2]:.4f}")
