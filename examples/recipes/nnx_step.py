"""A training step in Flax NNX: jitted, with network and optimizer donated."""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

import jaxce


@nnx.jit(donate_argnames=("network", "optimizer"))
def train_step(network, optimizer, pixels, labels):
    def loss_of(network):
        return jaxce.cross_entropy(network(pixels), labels, label_smoothing=0.1)

    loss, gradients = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, gradients)
    return loss


pixels, labels = load_digits(return_X_y=True)
pixels = (pixels / 16).astype(np.float32)
training, held_out = train_test_split(np.arange(len(labels)), stratify=labels, random_state=0)

rngs = nnx.Rngs(0)
network = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 10, rngs=rngs))
optimizer = nnx.Optimizer(network, optax.adam(1e-2), wrt=nnx.Param)

rng, losses = np.random.default_rng(0), []
for _ in range(200):
    rows = rng.choice(training, size=128, replace=False)
    losses.append(train_step(network, optimizer, pixels[rows], labels[rows]))

guesses = np.argmax(network(pixels[held_out]), axis=-1)
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}, held-out accuracy {accuracy_score(labels[held_out], guesses):.3f}")
