"""Contrastive loss of images and texts, as in CLIP, over devices: nobody holds the square of similarities."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # 8 devices where a CPU is all there is

import jax
import jax.numpy as jnp

import jaxce


def contrastive_loss(images, texts, temperature, **options):
    pairs = jnp.arange(len(images))  # images and texts are (pairs, features), of length 1

    def one_way(rows, classes):
        return jaxce.cross_entropy(jaxce.LinearLogits(rows, classes.T, temperature=temperature, **options), pairs)

    return (one_way(images, texts) + one_way(texts, images)) / 2


def step(images, texts, temperature):
    def loss_of(*arguments):
        return contrastive_loss(*arguments, block_bytes=2**18, recompute=True)  # 128 of 4096 classes at a time

    return jax.value_and_grad(loss_of, argnums=(0, 1, 2))(images, texts, temperature)


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0))
    images, texts = (jax.nn.standardize(jax.random.normal(key, (4096, 16))) / 4 for key in keys)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split = [jax.device_put(array, jax.NamedSharding(mesh, jax.P("data"))) for array in (images, texts)]
    with jax.set_mesh(mesh):
        on_all = jax.jit(step).lower(*split, 0.07).compile()
        loss, _ = on_all(*split, 0.07)
    alone, _ = jax.jit(step)(images, texts, 0.07)
    memory = on_all.memory_analysis()
    share = memory.temp_size_in_bytes / (4 * 4096**2 / mesh.size) if memory else float("nan")
    print(f"{mesh.size} devices: loss {loss:.4f}, on one {alone:.4f}; temporaries {share:.2f} of a device's square")
