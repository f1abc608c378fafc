"""Distillation from the classes that a teacher kept, its top k: nobody holds a distribution over the vocabulary."""

import jax
import jax.numpy as jnp

import jaxce


def top_k_loss(logits, classes, log_masses, mask):
    """KL(teacher ‖ student) over the classes that were kept, (..., k), of which the masses need not sum to 1."""
    masses = jnp.exp(log_masses)
    cross = jaxce.cross_entropy(logits, jaxce.SparseTargets(classes, masses), where=mask)
    return cross + jaxce.reduce_losses((masses * log_masses).sum(axis=-1), where=mask)


@jax.jit
def step(hidden, kernel, *batch):
    def loss_of(hidden, kernel):
        return top_k_loss(jaxce.LinearLogits(hidden, kernel), *batch)

    return jax.value_and_grad(loss_of, argnums=(0, 1))(hidden, kernel)


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernel = jax.random.normal(keys[0], (4, 32, 16)), jax.random.normal(keys[1], (16, 4096))
    teacher = jax.nn.log_softmax(2 * (hidden @ kernel))
    log_masses, classes = jax.lax.top_k(teacher, 64)  # what is kept of the teacher
    mask = jnp.arange(32) < jnp.array([[32], [20], [7], [25]])
    loss, _ = step(hidden, kernel, classes, log_masses, mask)
    whole = jaxce.distillation_loss(hidden @ kernel, teacher, where=mask)
    print(f"loss {loss:.4f}, of all classes {whole:.4f}; the top 64 have {jnp.exp(log_masses).sum(-1).mean():.3f}")
