"""The linear head over meshes of 8, 64 and 256 TPU v5e chips, compiled and not run, as a table.

python -m benchmarks.meshes
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import jaxce
from benchmarks.compiled import collectives, compile_step, mesh_of, temporaries, v5e

ROWS, FEATURES, CLASSES = 8192, 4096, 131072  # the rows of one device
MESHES = [
    ("2x4", {"data": 8}),
    ("2x4", {"data": 2, "model": 4}),
    ("8x8", {"data": 16, "model": 4}),
    ("8x8", {"data": 4, "seq": 4, "model": 4}),
    ("16x16", {"data": 64, "model": 4}),
    ("16x16", {"data": 32, "model": 8}),
]


def step(topology, axes, loss=jaxce.linear_cross_entropy, **options):
    """Value and gradients of hidden and kernel, for 8192 rows on every device along the rows' axes."""
    rows = P(*(name for name in axes if name != "model"))
    classes = "model" if "model" in axes else None
    row_shape = (ROWS // (16 if len(rows) > 1 else 1) * axes["data"],) + ((16 * axes["seq"],) if "seq" in axes else ())
    shapes = [
        jax.ShapeDtypeStruct((*row_shape, FEATURES), jnp.bfloat16),
        jax.ShapeDtypeStruct((FEATURES, CLASSES), jnp.bfloat16),
        jax.ShapeDtypeStruct(row_shape, jnp.int32),
    ]

    def of_arrays(hidden, kernel, labels):
        return loss(hidden, kernel, labels, class_axis_name=classes, batch_axis_name=rows, **options)

    return compile_step(mesh_of(v5e(topology), axes), of_arrays, shapes, [rows, P(None, classes), rows], (0, 1))


def local_gradients(axes):
    """Bytes of the gradients of hidden and kernel on one device, before they are added up."""
    return 2 * FEATURES * (ROWS + CLASSES // axes.get("model", 1))


def main():
    print(
        "| chips | mesh | temporaries beside the gradients | row statistics | hidden's gradient | kernel's gradient |"
    )
    print("|---|---|---|---|---|---|")
    for topology, axes in MESHES:
        compiled = step(topology, axes, recompute=True)
        communicated = collectives(compiled)
        assert {operation for operation, _ in communicated} == {"all-reduce"}
        kernel_shape = f"bf16[{FEATURES},{CLASSES // axes.get('model', 1)}]"
        sent = {"rows": 0, "hidden": 0, "kernel": 0}
        for (_, shapes), count in communicated.items():
            for shape in shapes:
                kind = "kernel" if shape == kernel_shape else "hidden" if shape.startswith("bf16") else "rows"
                size = math.prod(int(n) for n in shape.partition("[")[2].rstrip("]").split(",") if n)
                sent[kind] += count * size * (4 if shape.startswith("f32") else 2)
        mesh = " × ".join(f"{name} {size}" for name, size in axes.items())
        beside = temporaries(compiled) - local_gradients(axes)
        cells = [
            f"{beside / 1e6:.0f} MB",
            *(f"{sent[kind] / 1e6:.1f} MB" if sent[kind] > 100 else "–" for kind in sent),
        ]
        print(f"| {math.prod(axes.values())} | {mesh} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
