"""A training step in Flax Linen: a TrainState that goes through a jitted step and is donated."""

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

import jaxce


@jax.jit(donate_argnames="state")
def train_step(state, pixels, labels):
    def loss_of(params):
        return jaxce.cross_entropy(state.apply_fn(params, pixels), labels, label_smoothing=0.1)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=gradients), loss


pixels, labels = load_digits(return_X_y=True)
pixels = (pixels / 16).astype(np.float32)
training, held_out = train_test_split(np.arange(len(labels)), stratify=labels, random_state=0)

network = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
params = network.init(jax.random.key(0), pixels)
state = TrainState.create(apply_fn=network.apply, params=params, tx=optax.adam(1e-2))

rng, losses = np.random.default_rng(0), []
for _ in range(200):
    rows = rng.choice(training, size=128, replace=False)
    state, loss = train_step(state, pixels[rows], labels[rows])
    losses.append(loss)

guesses = np.argmax(state.apply_fn(state.params, pixels[held_out]), axis=-1)
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}, held-out accuracy {accuracy_score(labels[held_out], guesses):.3f}")
