"""Label smoothing with class weights, on digits of which two are rare, and what the mean divides by."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import recall_score
from sklearn.model_selection import train_test_split

import jaxce

pixels, labels = load_digits(return_X_y=True)
pixels = (pixels / 16).astype(np.float32)
training, held_out = train_test_split(np.arange(len(labels)), stratify=labels, random_state=0)
training = training[(labels[training] < 8) | (np.arange(len(training)) % 10 == 0)]  # a tenth of the eights and nines
inputs, targets = pixels[training], labels[training]


def loss_of(kernel, class_weights):
    return jaxce.cross_entropy(inputs @ kernel, targets, class_weights=class_weights, label_smoothing=0.1)


@jax.jit
def train(class_weights):
    def step(_, kernel):
        return kernel - 0.5 * jax.grad(loss_of)(kernel, class_weights)

    return jax.lax.fori_loop(0, 200, step, jnp.zeros((64, 10)))


class_weights = jaxce.imbalance.class_weights(jaxce.imbalance.class_counts(targets, 10))
kernels = train(None), train(class_weights)
guesses = [np.argmax(pixels[held_out] @ kernel, axis=-1) for kernel in kernels]
plain, weighted = (recall_score(labels[held_out], guess, labels=[8, 9], average="macro") for guess in guesses)

losses = -class_weights * jax.nn.log_softmax(inputs @ kernels[1])
losses = 0.9 * losses[np.arange(len(targets)), targets] + 0.1 * losses.mean(axis=-1)
by_hand = losses.sum() / class_weights[targets].sum()
loss = loss_of(kernels[1], class_weights)
print(f"recall of the rare {plain:.2f}, with class weights {weighted:.2f}; loss {loss:.4f}, by hand {by_hand:.4f}")
