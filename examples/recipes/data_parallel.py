"""Data parallel: rows are split over devices, parameters are on all of them, the loss is that of the whole batch."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # 8 devices where a CPU is all there is

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxce

mesh = jax.make_mesh((jax.device_count(),), ("data",))
split, everywhere = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
optimizer = optax.adam(1e-2)


def loss_of(params, pixels, labels):
    return jaxce.cross_entropy(pixels @ params["kernel"] + params["bias"], labels, ignore_index=-1)


@jax.jit(donate_argnames=("params", "opt_state"))
def train_step(params, opt_state, batch):
    loss, gradients = jax.value_and_grad(loss_of)(params, *batch)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


pixels, labels = load_digits(return_X_y=True)
labels[np.random.default_rng(0).random(1797) < np.linspace(0, 1, 1797)] = -1  # the later, the fewer have a label
batch = (pixels[:1792] / 16).astype(np.float32), labels[:1792]
shards = jax.device_put(batch, split)
params = jax.device_put({"kernel": np.zeros((64, 10), np.float32), "bias": np.zeros(10, np.float32)}, everywhere)
opt_state = optimizer.init(params)
for _ in range(20):
    params, opt_state, loss = train_step(params, opt_state, shards)
loss, alone = loss_of(params, *shards), loss_of(jax.device_get(params), *batch)
counts = (batch[1] >= 0).reshape(mesh.size, -1).sum(axis=1)
print(f"{mesh.size} devices, {counts.min()} to {counts.max()} labels each: loss {loss:.4f}, on one device {alone:.4f}")
