"""The same programs compiled, not run, for a TPU v5e and an H100: with the packages of the extra `accelerators`."""

from collections import Counter

import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import PartitionSpec
from marks import needs
from test_memory import CALLS, SHAPES, C, N

import jaxce
from benchmarks import compiled, meshes


def _v5e():
    needs("libtpu")
    return compiled.v5e()


def _h100():
    needs("jax_plugins.xla_cuda13")
    return compiled.h100()


def _temporaries(topology, loss, *shapes, argnums=0):
    """Of value and gradient, compiled for one device."""
    mesh = compiled.mesh_of(topology(), {"x": 1})
    step = compiled.compile_step(mesh, loss, shapes, [PartitionSpec()] * len(shapes), argnums)
    return compiled.temporaries(step)


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
    # Of rows of which some do not count a tile of hidden is brought together.
    measure("recomputed, all options", 1.15 * plain, 131072, recompute=True, options=True)
    measure("recomputed", 1.01 * plain, 32768, recompute=True)
    measure("recomputed", 1.01 * plain, 262144, recompute=True)
    measure("recomputed", ragged_limit, 50257, recompute=True)
    measure("recomputed, tied", ragged_limit, 50257, recompute=True, tied=True)
    plain = measure("forward gradients", 2.7e9, 131072, recompute=False)
    measure("forward gradients, all options", 1.1 * plain, 131072, recompute=False, options=True)


def _flat_temporaries(topology):
    """A block is bounded in rows too: what is held beside a float32 hidden does not grow with them."""
    for num_rows in (32768, 524288):
        shapes = [ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((num_rows, 64), (64, 32768))]
        labels = ShapeDtypeStruct((num_rows,), jnp.int32)
        temporaries = _temporaries(topology, jaxce.linear_cross_entropy, *shapes, labels, argnums=(0, 1))
        beside_hidden = temporaries - 4 * num_rows * 64
        print(f"linear head, {num_rows} rows: {beside_hidden / 1e6:.1f} MB beside a float32 hidden")
        assert beside_hidden <= 150e6


def _communication_of_meshes():
    """Per step: the statistics of the rows over the classes' axis, one sum for each gradient, and the scalars."""
    rows, local_kernel = f"f32[{meshes.ROWS}]", f"bf16[{meshes.FEATURES},{meshes.CLASSES // 4}]"
    wanted = Counter(
        {
            ("all-reduce", (rows,)): 1,
            ("all-reduce", (rows,) * 4): 1,
            ("all-reduce", (f"bf16[{meshes.ROWS},{meshes.FEATURES}]",)): 1,
            ("all-reduce", (local_kernel,)): 1,
            ("all-reduce", ("f32[]", "f32[]")): 1,
        }
    )
    sizes = []
    for topology, data in (("2x4", 2), ("8x8", 16), ("16x16", 64)):
        axes = {"data": data, "model": 4}
        step = meshes.step(topology, axes, recompute=True)
        assert compiled.collectives(step) == wanted
        sizes.append(compiled.temporaries(step) - meshes.local_gradients(axes))
        print(f"{topology}: {sizes[-1] / 1e6:.1f} MB beside the gradients of a device")
    assert max(sizes) <= 250e6
    assert max(sizes) <= 1.01 * min(sizes)


def _features_over_a_mesh():
    """A block of the kernel is gathered in either pass, and its gradient scattered; nothing holds the kernel whole."""
    step = meshes.step("2x4", {"fsdp": 8}, recompute=True)
    block = meshes.CLASSES // 128
    assert compiled.collectives(step) == Counter(
        {
            ("all-gather", (f"bf16[{meshes.FEATURES},{block}]",)): 2,
            ("reduce-scatter", (f"f32[{meshes.FEATURES // 8},{block}]",)): 1,
            ("all-reduce", ("f32[]", "f32[]")): 1,
        }
    )
    one_block = 2 * meshes.FEATURES * block
    print(f"features over 8 devices: {compiled.temporaries(step) / 1e6:.1f} MB")
    assert compiled.temporaries(step) <= 150e6 + one_block


# One test for a device: two processes that compile for a TPU at once stop each other.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("topology", "dense", "head", "ragged_head"),
    [(_v5e, 1e6, 150e6, 210e6), (_h100, 20e6, 210e6, 230e6)],
    ids=["v5e", "h100"],
)
def test_temporaries_of_value_and_gradient(topology, dense, head, ragged_head):
    _dense_temporaries(topology, dense)
    _head_temporaries(topology, head, ragged_head)
    _flat_temporaries(topology)
    if topology is _v5e:
        _communication_of_meshes()
        _features_over_a_mesh()
