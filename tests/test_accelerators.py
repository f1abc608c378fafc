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


# One test: two processes that compile for a TPU at once stop each other.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("topology", "limit"), [(_v5e, 1e6), (_h100, 20e6)], ids=["v5e", "h100"])
def test_temporaries_of_value_and_gradient(topology, limit):
    mesh = Mesh(np.array(topology().devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def placed(shape, dtype):
        return ShapeDtypeStruct(shape, dtype, sharding=sharding)

    for call, (names, loss) in CALLS.items():
        arrays = [placed(SHAPES[name].shape, SHAPES[name].dtype) for name in names]
        step = jax.jit(jax.value_and_grad(loss)).lower(placed((N, C), jnp.bfloat16), *arrays).compile()
        temporaries = step.memory_analysis().temp_size_in_bytes
        print(f"{call}: {temporaries / 1e6:.2f} MB")
        assert temporaries <= limit, call
