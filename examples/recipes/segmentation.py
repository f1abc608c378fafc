"""Segmentation: a class for every pixel, edges that belong to no class, and rare classes that weigh more."""

import numpy as np
import optax
from flax import nnx
from sklearn.metrics import jaccard_score

import jaxce

rng, void = np.random.default_rng(0), 255
grid, center, radius = np.indices((24, 24)), rng.uniform(6, 18, (320, 2, 1, 1)), rng.uniform(2, 5, (320, 1, 1))
outside = np.linalg.norm(grid - center, axis=1) - radius  # how far a pixel is from the disc of its image
kind = rng.integers(1, 3, (320, 1, 1))  # the stripes of class 1 lie, those of class 2 stand
ink = np.where(outside < 0, np.where(kind == 1, *grid) // 2 % 2, 0.5)
images = rng.normal(ink, 0.2)[..., None].astype(np.float32)
labels = np.where(abs(outside) < 0.7, void, np.where(outside < 0, kind, 0))  # class 0 is the background

counts = jaxce.imbalance.class_counts(labels[:256], 3, where=labels[:256] != void)
class_weights = jaxce.imbalance.class_weights(counts, scheme="inverse_sqrt")


@nnx.jit(donate_argnames=("network", "optimizer"))
def train_step(network, optimizer, images, labels):
    def loss_of(network):  # logits of (N, H, W, C); where they are (N, C, H, W), `axis=1`
        return jaxce.cross_entropy(network(images), labels, ignore_index=void, class_weights=class_weights)

    loss, gradients = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, gradients)
    return loss


rngs = nnx.Rngs(0)
layers = nnx.Conv(1, 16, (5, 5), rngs=rngs), nnx.relu, nnx.Conv(16, 16, (5, 5), rngs=rngs), nnx.relu
network = nnx.Sequential(*layers, nnx.Linear(16, 3, rngs=rngs))
optimizer = nnx.Optimizer(network, optax.adam(1e-2), wrt=nnx.Param)
batches = [rng.choice(256, size=32, replace=False) for _ in range(40)]
losses = [train_step(network, optimizer, images[batch], labels[batch]) for batch in batches]
guesses, truth = np.argmax(network(images[256:]), axis=-1), labels[256:]
iou = jaccard_score(truth[truth != void], guesses[truth != void], average="macro")
print(f"{np.mean(truth == void):.1%} void, loss {losses[0]:.2f} to {losses[-1]:.2f}, held-out mean IoU {iou:.3f}")
