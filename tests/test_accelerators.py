"""The same programs compiled, not run, for a TPU v5e and an H100: with the packages of the extra `accelerators`."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_memory import CALLS, SHAPES, C, N

import jaxce

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


def _v5e():
    pytest.importorskip("libtpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")


def _h100():
    pytest.importorskip("jax_plugins.xla_cuda13")
    return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")


def _temporaries(topology, loss, *shapes, argnums=0):
    """Of value and gradient, compiled for one device."""
    sharding = NamedSharding(Mesh(np.array(topology().devices[:1]), ("x",)), PartitionSpec())
    placed = [ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding) for shape in shapes]
    step = jax.jit(jax.value_and_grad(loss, argnums)).lower(*placed).compile()
    return step.memory_analysis().temp_size_in_bytes


def _dense_temporaries(topology, limit):
    for call, (names, loss) in CALLS.items():
        arrays = [SHAPES[name] for name in names]
        temporaries = _temporaries(topology, loss, ShapeDtypeStruct((N, C), jnp.bfloat16), *arrays)
        print(f"{call}: {temporaries / 1e6:.2f} MB")
        assert temporaries <= limit, call


D = 4096  # of the linear head, beside the same 8192 rows


def _head_temporaries(topology, limit, ragged_limit):
    def measure(name, limit, num_classes, *, recompute, options=False, tied=False):
        def loss(hidden, kernel, labels, *rest):
            if options:
                bias, class_weights, weights, where = rest
                rest = {"bias": bias, "class_weights": class_weights, "weights": weights, "where": where}
                rest |= {"softcap": 30.0, "ignore_index": -100, "label_smoothing": 0.1, "z_loss": 1e-4}
            kernel = kernel.T if tied else kernel
            return jaxce.linear_cross_entropy(hidden, kernel, labels, recompute=recompute, **dict(rest))

        shapes = [
            ShapeDtypeStruct((N, D), jnp.bfloat16),
            ShapeDtypeStruct((num_classes, D) if tied else (D, num_classes), jnp.bfloat16),
            SHAPES["labels"],
        ]
        if options:
            per_class = [ShapeDtypeStruct((num_classes,), dtype) for dtype in (jnp.bfloat16, jnp.float32)]
            shapes += [*per_class, SHAPES["weights"], SHAPES["where"]]
        temporaries = _temporaries(topology, loss, *shapes, argnums=(0, 1))
        print(f"linear head, {num_classes} classes, {name}: {temporaries / 1e6:.1f} MB")
        assert temporaries <= limit, name
        return temporaries

    plain = measure("recomputed", limit, 131072, recompute=True)
    measure("recomputed, all options", 1.1 * plain, 131072, recompute=True, options=True)
    measure("recomputed", 1.01 * plain, 32768, recompute=True)
    measure("recomputed", 1.01 * plain, 262144, recompute=True)
    measure("recomputed", ragged_limit, 50257, recompute=True)
    measure("recomputed, tied", ragged_limit, 50257, recompute=True, tied=True)
    plain = measure("forward gradients", 2.7e9, 131072, recompute=False)
    measure("forward gradients, all options", 1.1 * plain, 131072, recompute=False, options=True)


# One test for a device: two processes that compile for a TPU at once stop each other.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("topology", "dense", "head", "ragged_head"),
    [(_v5e, 1e6, 250e6, 250e6), (_h100, 20e6, 350e6, 350e6)],
    ids=["v5e", "h100"],
)
def test_temporaries_of_value_and_gradient(topology, dense, head, ragged_head):
    _dense_temporaries(topology, dense)
    _head_temporaries(topology, head, ragged_head)
