"""Policy gradient with clipping, an entropy bonus and a penalty for leaving a reference model, as in GRPO."""

import jax
import jax.numpy as jnp

import jaxce


def policy_loss(logits, tokens, rollout, mask, low=0.2, high=0.28, penalty=0.04, bonus=1e-3):
    def formula(summary, token):
        log_p, advantage = -summary.nll, token["advantage"]
        ratio = jnp.exp(log_p - token["old_log_p"])
        gain, clipped = ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage
        behind = token["reference_log_p"] - log_p
        kl = jnp.expm1(behind) - behind  # estimates KL(policy ‖ reference) and is never negative: "k3"
        loss = -jnp.minimum(gain, clipped) + penalty * kl - bonus * summary.entropy
        return loss, {"clip_fraction": clipped < gain, "entropy": summary.entropy, "kl": kl}

    return jaxce.custom_loss(formula, logits, tokens, rows=rollout, where=mask, entropy=True, has_aux=True)


@jax.jit
def step(hidden, kernel, *batch):
    def loss_of(hidden, kernel):
        return policy_loss(jaxce.LinearLogits(hidden, kernel), *batch)

    return jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(hidden, kernel)


if __name__ == "__main__":
    keys = iter(jax.random.split(jax.random.key(0), 6))
    hidden, kernel = jax.random.normal(next(keys), (4, 32, 16)), jax.random.normal(next(keys), (16, 4096)) / 4
    tokens = jax.random.randint(next(keys), (4, 32), 0, 4096)  # four answers to one prompt
    advantage = jnp.broadcast_to(jax.nn.standardize(jax.random.uniform(next(keys), (4, 1)), axis=0), (4, 32))  # rewards
    log_p = -jaxce.summarize(jaxce.LinearLogits(hidden, kernel), tokens).nll  # of the model that sampled them
    moved = [log_p + 0.2 * jax.random.normal(next(keys), log_p.shape) for _ in range(2)]
    rollout = {"advantage": advantage, "old_log_p": moved[0], "reference_log_p": moved[1]}
    mask = jnp.arange(32) < jnp.array([[32], [20], [7], [25]])
    (loss, logged), _ = step(hidden, kernel, tokens, rollout, mask)
    print(f"loss {loss:.4f},", ", ".join(f"{name} {value:.4f}" for name, value in sorted(logged.items())))
