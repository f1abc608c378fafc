"""Thousands of labels of which an example has a few: independent yes/no outputs, and a yes that weighs more."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import average_precision_score, recall_score

import jaxce

rng = np.random.default_rng(0)
inputs = rng.normal(size=(1500, 32)).astype(np.float32)
scores = inputs @ rng.normal(size=(32, 2000)) + rng.normal(-11, 1, 2000) + rng.logistic(size=(1500, 2000))
(inputs, held_out), (targets, truth) = np.split(inputs, [1000]), np.split((scores > 0).astype(np.float32), [1000])
frequency = (targets.sum(axis=0) + 1) / (len(targets) + 2)  # of yes, for each label; never 0
optimizer = optax.adam(3e-2)


def loss_of(params, pos_weight):
    return jaxce.binary_cross_entropy(inputs @ params["kernel"] + params["bias"], targets, pos_weight=pos_weight)


@jax.jit
def train(pos_weight):
    def step(_, state):
        updates, opt_state = optimizer.update(jax.grad(loss_of)(state[0], pos_weight), state[1])
        return optax.apply_updates(state[0], updates), opt_state

    start = {"kernel": jnp.zeros((32, 2000)), "bias": jax.scipy.special.logit(frequency)}
    return jax.lax.fori_loop(0, 60, step, (start, optimizer.init(start)))[0]


rare = np.argsort(np.where(truth.any(axis=0), frequency, 1))[:200]  # of the labels that occur in the held-out rows
for name, pos_weight in ("plain", 1.0), ("weighted", np.sqrt(1 / frequency - 1)):
    params = train(pos_weight)
    logits = np.asarray(held_out @ params["kernel"] + params["bias"])
    recall = recall_score(truth, logits > 0, average="micro")
    micro = average_precision_score(truth, logits, average="micro")
    macro = average_precision_score(truth[:, rare], logits[:, rare], average="macro")
    print(f"{name}: recall {recall:.3f}, average precision micro {micro:.3f}, macro of the rare {macro:.3f}")
