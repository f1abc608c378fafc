"""FSDP: the devices that split the rows split the parameters too, with their gradients and the optimizer's state."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # 8 devices where a CPU is all there is

import jax
import optax
from jax import P

import jaxce

mesh = jax.make_mesh((2, jax.device_count() // 2), ("data", "fsdp"))  # Explicit: the types say how arrays are split
optimizer = optax.adam(1e-2)


def loss_of(params, inputs, labels):
    body = jax.reshard(params["body"], P())  # this layer is gathered whole, and of the kernel 256 classes at a time
    hidden = jax.nn.standardize(inputs @ body)
    return jaxce.linear_cross_entropy(hidden, params["kernel"], labels, block_bytes=2**17)


@jax.jit(donate_argnames=("params", "opt_state"))
def train_step(params, opt_state, inputs, labels):
    loss, gradients = jax.value_and_grad(loss_of)(params, inputs, labels)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, gradients


keys, rows = jax.random.split(jax.random.key(0), 4), P(("data", "fsdp"))
with jax.set_mesh(mesh):
    params = {"body": jax.random.normal(keys[0], (64, 256), out_sharding=P("fsdp")) / 8}
    params["kernel"] = jax.random.normal(keys[1], (256, 8192), out_sharding=P("fsdp")) / 8
    inputs = jax.random.normal(keys[2], (1024, 64), out_sharding=rows)
    labels = jax.random.randint(keys[3], (1024,), 0, 8192, out_sharding=rows)
    alone = loss_of(*jax.device_get((params, inputs, labels)))
    params, opt_state, loss, gradients = train_step(params, optimizer.init(params), inputs, labels)
types = [jax.typeof(tree["kernel"]) for tree in (params, gradients, opt_state[0].mu)]
print("kernel {}, its gradient {}, its moment {}; ".format(*types), end="")
print(f"loss {loss:.4f}, on one device {alone:.4f}")
