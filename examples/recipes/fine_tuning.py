"""Supervised fine-tuning in micro-batches: loss, perplexity, accuracy and the z-loss part, all from one pass."""

import jax
import jax.numpy as jnp

import jaxce


def fine_tuning_loss(logits, tokens, mask, z_loss=1e-4):
    def formula(summary, token):
        z_part = z_loss * summary.log_z**2
        return summary.nll + z_part, {"nll": summary.nll, "z_part": z_part, "accuracy": summary.argmax == token}

    options = {"where": mask, "argmax": True, "has_aux": True, "reduction": "parts"}
    return jaxce.custom_loss(formula, logits, tokens, rows=tokens, **options)


@jax.jit
def step(kernel, micro_batches):
    def total(kernel, hidden, tokens, mask):
        loss, logged = fine_tuning_loss(jaxce.LinearLogits(hidden, kernel), tokens, mask)
        return loss.total, {"loss": loss, **logged}

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, jax.grad(total, has_aux=True)(kernel, *micro_batch)), None

    zero = jaxce.MeanParts(jnp.zeros(()), jnp.zeros(()))
    sums = jnp.zeros_like(kernel), dict.fromkeys(["loss", "nll", "z_part", "accuracy"], zero)
    (gradient, parts), _ = jax.lax.scan(add, sums, micro_batches)
    means = {name: of_name.mean() for name, of_name in parts.items()}
    return jaxce.MeanParts(gradient, parts["loss"].weight).mean(), means | {"perplexity": jnp.exp(means["nll"])}


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, kernel = jax.random.normal(keys[0], (4, 8, 32, 16)), jax.random.normal(keys[1], (16, 4096))
    tokens = jax.random.categorical(keys[2], hidden @ kernel)
    mask = jnp.arange(32) < jax.random.randint(keys[3], (4, 8, 1), 1, 32)  # no two micro-batches of one size
    _, logged = step(kernel, (hidden, tokens, mask))
    print(", ".join(f"{name} {value:.4f}" for name, value in logged.items()))
