"""Evaluation with a last batch that is not full: it is padded, so one program serves all, and the means are exact."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, log_loss
from sklearn.utils import gen_batches

import jaxce


@jax.jit
def evaluate(kernel, pixels, labels, where):
    compiled_for.append(pixels.shape)  # this line runs when JAX compiles, and not after

    def formula(summary, label):
        return summary.nll, summary.argmax == label

    options = {"where": where, "argmax": True, "has_aux": True, "reduction": "parts"}
    return jaxce.custom_loss(formula, pixels @ kernel, labels, rows=labels, **options)


pixels, labels = load_digits(return_X_y=True)
(inputs, pixels), (targets, labels) = np.split((pixels / 16).astype("f"), [1347]), np.split(labels, [1347])
gradient = jax.grad(lambda kernel: jaxce.cross_entropy(inputs @ kernel, targets))
kernel = jax.lax.fori_loop(0, 100, lambda _, kernel: kernel - 0.5 * gradient(kernel), jnp.zeros((64, 10)))

compiled_for, batches, size = [], [], 128
for rows in gen_batches(len(labels), size):
    padding = size - len(labels[rows])
    batch = np.pad(pixels[rows], [(0, padding), (0, 0)]), np.pad(labels[rows], (0, padding))
    batches.append(evaluate(kernel, *batch, np.arange(size) < size - padding))
loss, accuracy = jax.tree.map(lambda *sums: sum(sums), *batches)
mean = np.mean([loss.mean() for loss, _ in batches])
print(f"{len(labels)} rows, compiled {len(compiled_for)} time: loss {loss.mean():.4f}, ", end="")
print(f"accuracy {accuracy.mean():.4f}; mean of means {mean:.4f}")
masses = np.asarray(jax.nn.softmax(pixels @ kernel))
print(f"scikit-learn, all at once: {log_loss(labels, masses):.4f}, {accuracy_score(labels, masses.argmax(axis=1)):.4f}")
