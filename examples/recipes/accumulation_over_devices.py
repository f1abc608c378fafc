"""Gradient accumulation and data parallelism in one step: every device scans its rows, one sum over devices follows."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # 8 devices where a CPU is all there is

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

import jaxce

mesh, split = jax.make_mesh((jax.device_count(),), ("data",)), P(None, "data")  # micro-batches, rows


def total_of(kernel, pixels, labels):
    parts = jaxce.cross_entropy(pixels @ kernel, labels, ignore_index=-1, reduction="parts")
    return parts.total, parts


@jax.jit
@jax.shard_map(mesh=mesh, in_specs=(P(), split), out_specs=P())
def accumulate(kernel, micro_batches):
    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, jax.grad(total_of, has_aux=True)(own_kernel, *micro_batch)), None

    zeros = jnp.zeros_like(kernel), jaxce.MeanParts(jnp.zeros(()), jnp.zeros(()))
    own_kernel, zeros = jax.lax.pcast((kernel, zeros), "data", to="varying")  # so no sum over devices yet
    (gradient, parts), _ = jax.lax.scan(add, zeros, micro_batches)
    return parts.psum("data").mean(), jaxce.MeanParts(gradient, parts.weight).psum("data").mean()


rng, kernel = np.random.default_rng(0), jax.random.normal(jax.random.key(0), (64, 10))
labels = np.where(rng.random((16, 112)) < np.linspace(0, 1, 112), -1, rng.integers(0, 10, (16, 112)))
batch = rng.random((16, 112, 64), np.float32), labels  # 16 micro-batches; the later a row, the rarer it has a label
loss, gradient = accumulate(kernel, jax.device_put(batch, jax.NamedSharding(mesh, split)))
whole, exact = jax.value_and_grad(lambda kernel: total_of(kernel, *batch)[1].mean())(kernel)
error = np.linalg.norm(gradient - exact) / np.linalg.norm(exact)
print(f"{mesh.size} devices: loss {loss:.4f}, of all rows at once {whole:.4f}, gradient off by {error:.0e}")
