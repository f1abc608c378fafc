"""Programs compiled for a TPU v5e or an H100, not run: their memory and what their devices tell each other.

Needs the packages of the extra `accelerators`, and no accelerator.
"""

import os
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


def v5e(name: str = "2x2") -> Any:
    """A slice of TPU v5e chips, such as "2x4" or "16x16"."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    return topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{name}")


def h100() -> Any:
    return topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")


def mesh_of(topology: Any, axes: dict[str, int]) -> Mesh:
    """An Auto mesh of the first devices of a topology; `axes` has the sizes by the names."""
    devices = np.array(topology.devices[: int(np.prod(list(axes.values())))]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def cpu() -> Any:
    """The one that is here, as if it were a topology."""
    return SimpleNamespace(devices=jax.devices("cpu"))


def compile_step(mesh: Mesh, loss: Any, shapes: Any, specs: Any, argnums: Any, has_aux: bool = False) -> Any:
    """Value and gradients of a loss, compiled; arguments and gradients are split over the mesh by the specs.

    With no `argnums` at all the value alone. An argument may be a pytree, of which all arrays are split by its spec.
    """
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    placed = [
        jax.tree.map(lambda array, to=sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=to), shape)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    gradients = shardings[argnums] if isinstance(argnums, int) else tuple(shardings[i] for i in argnums)
    with jax.set_mesh(mesh):
        if argnums == ():
            step = jax.jit(loss)
        else:
            step = jax.jit(jax.value_and_grad(loss, argnums, has_aux=has_aux), out_shardings=(None, gradients))
        return step.lower(*placed).compile()


def temporaries(compiled: Any) -> int:
    """Bytes per device beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def collectives(compiled: Any) -> Counter:
    """How often the devices of a compiled program communicate: by operation and the shapes of its results."""
    counts = Counter()
    pattern = r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for shapes, operation in re.findall(pattern, compiled.as_text()):
        counts[operation, tuple(re.findall(r"\w+\[[\d,]*\]", shapes))] += 1
    return counts
