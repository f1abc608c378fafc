"""Gradient accumulation over micro-batches in which different numbers of rows count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxce


def loss_of(params, pixels, labels, **options):
    logits = pixels @ params["kernel"] + params["bias"]
    return jaxce.cross_entropy(logits, labels, ignore_index=-1, **options)


@jax.jit
def accumulate(params, micro_batches):
    def total_of(params, micro_batch):
        parts = loss_of(params, *micro_batch, reduction="parts")
        return parts.total, parts

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, jax.grad(total_of, has_aux=True)(params, micro_batch)), None

    zeros = jax.tree.map(jnp.zeros_like, params), jaxce.MeanParts(jnp.zeros(()), jnp.zeros(()))
    (gradients, parts), _ = jax.lax.scan(add, zeros, micro_batches)
    return parts.mean(), jax.tree.map(lambda total: jaxce.MeanParts(total, parts.weight).mean(), gradients)


pixels, labels = load_digits(return_X_y=True)
labels[np.random.default_rng(0).random(1797) < np.linspace(0, 1, 1797)] = -1  # the later, the fewer have a label
micro_batches = (pixels[:1792] / 16).astype(np.float32).reshape(16, 112, 64), labels[:1792].reshape(16, 112)
params = {"kernel": jax.random.normal(jax.random.key(0), (64, 10)), "bias": jnp.zeros(10)}

whole_loss, whole_gradients = jax.value_and_grad(loss_of)(params, *micro_batches)  # rows may have any rank
loss, gradients = accumulate(params, micro_batches)
error = optax.tree.norm(optax.tree.sub(gradients, whole_gradients)) / optax.tree.norm(whole_gradients)
mean = np.mean([loss_of(params, *micro_batch) for micro_batch in zip(*micro_batches, strict=True)])
print(f"loss {whole_loss:.4f}, accumulated {loss:.4f}, gradient off by {error:.0e}; mean of means {mean:.4f}")
