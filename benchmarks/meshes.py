"""The linear head over meshes of 8, 64 and 256 TPU v5e chips, compiled and not run, as a table.

Along "fsdp" the rows and the features of the kernel are split, along "model" the classes.

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
    ("2x4", {"fsdp": 8}),
    ("2x4", {"fsdp": 4, "model": 2}),
    ("8x8", {"data": 4, "fsdp": 16}),
    ("8x8", {"data": 4, "fsdp": 4, "model": 4}),
    ("16x16", {"data": 4, "fsdp": 16, "model": 4}),
]


def step(topology, axes, loss=jaxce.linear_cross_entropy, **options):
    """Value and gradients of hidden and kernel, for 8192 rows on every device along the rows' axes."""
    of_batch = tuple(name for name in ("data", "fsdp") if name in axes)
    rows = P(of_batch, "seq") if "seq" in axes else P(of_batch)
    classes, features = ("model" if "model" in axes else None), ("fsdp" if "fsdp" in axes else None)
    batch = ROWS * math.prod(axes[name] for name in of_batch)
    row_shape = (batch // 16, 16 * axes["seq"]) if "seq" in axes else (batch,)
    shapes = [
        jax.ShapeDtypeStruct((*row_shape, FEATURES), jnp.bfloat16),
        jax.ShapeDtypeStruct((FEATURES, CLASSES), jnp.bfloat16),
        jax.ShapeDtypeStruct(row_shape, jnp.int32),
    ]

    def of_arrays(hidden, kernel, labels):
        names = {"class_axis_name": classes, "batch_axis_name": rows, "feature_axis_name": features}
        return loss(hidden, kernel, labels, **names, **options)

    return compile_step(mesh_of(v5e(topology), axes), of_arrays, shapes, [rows, P(features, classes), rows], (0, 1))


def local_gradients(axes):
    """Bytes of the gradients of hidden and kernel on one device, before they are added up."""
    return 2 * FEATURES * (ROWS + CLASSES // axes.get("model", 1) // axes.get("fsdp", 1))


def kind_of(operation, shape, kernel_shape):
    """What devices tell each other: of a block of the kernel in every step of the loop, of all else once."""
    if operation == "all-gather":
        assert f",{kernel_shape.partition(',')[2]}" not in shape
        return "block"
    if shape == kernel_shape:
        return "kernel"
    if operation != "all-reduce" or (shape.startswith("f32") and "," in shape):
        return "block's gradient"
    return "hidden" if shape.startswith("bf16") else "rows"


def main():
    header = ["chips", "mesh", "temporaries beside the gradients", "row statistics", "hidden's gradient"]
    header += ["kernel's gradient", "a block of the kernel, gathered", "its gradient, scattered"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for topology, axes in MESHES:
        compiled = step(topology, axes, recompute=True)
        kernel_shape = f"bf16[{FEATURES // axes.get('fsdp', 1)},{CLASSES // axes.get('model', 1)}]"
        sent = dict.fromkeys(["rows", "hidden", "kernel", "block", "block's gradient"], 0)
        for (operation, shapes), count in collectives(compiled).items():
            for shape in shapes:
                size = math.prod(int(n) for n in shape.partition("[")[2].rstrip("]").split(",") if n)
                sent[kind_of(operation, shape, kernel_shape)] += count * size * (2 if shape.startswith("bf16") else 4)
        mesh = " × ".join(f"{name} {size}" for name, size in axes.items())
        beside = max(0, temporaries(compiled) - local_gradients(axes))
        cells = [
            f"{beside / 1e6:.0f} MB",
            *(f"{number / 1e6:.1f} MB" if number > 100 else "–" for number in sent.values()),
        ]
        print(f"| {math.prod(axes.values())} | {mesh} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
