"""Held-out loss, perplexity, accuracy, entropy and log z of a language model: one forward pass, no array of logits."""

import jax
import jax.numpy as jnp
import optax

import jaxce


def metrics(hidden, kernel, tokens, mask):
    """A `MeanParts` of each number, to be added up over batches."""

    def formula(summary, token):
        numbers = {"accuracy": summary.argmax == token, "entropy": summary.entropy, "log_z": summary.log_z}
        return summary.nll, numbers | {"z_loss": 1e-4 * summary.log_z**2}

    options = {"where": mask, "argmax": True, "entropy": True, "has_aux": True, "reduction": "parts"}
    loss, others = jaxce.custom_loss(formula, jaxce.LinearLogits(hidden, kernel), tokens, rows=tokens, **options)
    return {"loss": loss, **others}


@jax.jit
def evaluate(kernel, batches):
    parts = jax.lax.map(lambda batch: metrics(batch[0], kernel, *batch[1:]), batches)
    means = {name: jax.tree.map(jnp.sum, of_name).mean() for name, of_name in parts.items()}
    return means | {"perplexity": jnp.exp(means["loss"])}


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, kernel = jax.random.normal(keys[0], (4, 8, 64, 32)), jax.random.normal(keys[1], (32, 8192)) / 2
    tokens = jax.random.categorical(keys[2], hidden @ kernel)  # the model's own: the loss is close to the entropy
    mask = jnp.arange(64) < jax.random.randint(keys[3], (4, 8, 1), 1, 65)  # sequences of any length
    program = evaluate.lower(kernel, (hidden, tokens, mask)).compile()
    logged = program(kernel, (hidden, tokens, mask))
    print(", ".join(f"{name} {value:.4f}" for name, value in sorted(logged.items())))
    by_optax = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, tokens).mean(where=mask)
    memory = program.memory_analysis()
    share = memory.temp_size_in_bytes / (4 * 8 * 64 * 8192) if memory else float("nan")
    print(f"loss by optax {by_optax:.4f}, which holds the logits; temporaries here {share:.2f} of a batch's logits")
