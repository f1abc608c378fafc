"""One training step in Flax Linen: `TrainState`, `jax.jit` with a donated state, `jaxce.cross_entropy`.

python examples/linen_step.py    # a few hundred steps on handwritten digits, some seconds
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

import jaxce


class Network(nn.Module):
    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        hidden = nn.relu(nn.Dense(64)(pixels))
        return nn.Dense(10)(hidden)


@partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, pixels: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_of(params):
        return jaxce.cross_entropy(state.apply_fn({"params": params}, pixels), labels, label_smoothing=0.1)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=gradients), loss


def main() -> None:
    pixels, labels = load_digits(return_X_y=True)
    data = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    training, held_out = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)

    network = Network()
    params = network.init(jax.random.key(0), data[0][:1])["params"]
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optax.adam(1e-2))

    rng = np.random.default_rng(0)
    for step in range(201):
        rows = rng.choice(training, size=128, replace=False)
        state, loss = train_step(state, data[0][rows], data[1][rows])
        if step % 50 == 0:
            print(f"step {step:3}  loss {loss:.4f}")

    guesses = jnp.argmax(state.apply_fn({"params": state.params}, data[0][held_out]), axis=-1)
    print(f"held-out accuracy: {accuracy_score(labels[held_out], guesses):.4f}")


if __name__ == "__main__":
    main()
