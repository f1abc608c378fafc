"""What the losses keep and what they need: compiled temporaries, saved residuals, and the memory of a real run."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct
from jax.ad_checkpoint import print_saved_residuals
from marks import daily

import jaxce

N, C = 8192, 32768
F32 = jnp.float32
SHAPES = {
    "labels": ShapeDtypeStruct((N,), jnp.int32),
    "distribution": ShapeDtypeStruct((N, C), F32),
    "class_weights": ShapeDtypeStruct((C,), F32),
    "weights": ShapeDtypeStruct((N,), F32),
    "where": ShapeDtypeStruct((N,), jnp.bool_),
}

# by name: which arrays the call takes beside the logits, and the call
CALLS = {
    "labels": (("labels",), lambda z, y: jaxce.cross_entropy(z, y)),
    "labels, all options": (
        ("labels", "class_weights"),
        lambda z, y, w: jaxce.cross_entropy(z, y, class_weights=w, ignore_index=-100, label_smoothing=0.1, z_loss=1e-4),
    ),
    "labels, all options and row weights": (
        ("labels", "class_weights", "weights", "where"),
        lambda z, y, w, v, c: jaxce.cross_entropy(
            z, y, class_weights=w, weights=v, where=c, ignore_index=-100, label_smoothing=0.1, z_loss=1e-4
        ),
    ),
    "distribution": (("distribution",), lambda z, q: jaxce.cross_entropy(z, q)),
    "distribution, all options": (
        ("distribution", "class_weights", "weights", "where"),
        lambda z, q, w, v, c: jaxce.cross_entropy(
            z, q, class_weights=w, weights=v, where=c, label_smoothing=0.1, z_loss=1e-4
        ),
    ),
    "focal loss": (("labels", "where"), lambda z, y, c: jaxce.focal_loss(z, y, where=c)),
}


def _temporaries(call, dtype):
    names, loss = CALLS[call]
    logits = ShapeDtypeStruct((N, C), dtype)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(logits, *(SHAPES[name] for name in names)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


TEMPORARIES = [(call, dtype) for call in CALLS for dtype in ("float32", "bfloat16")]
DAILY = [("labels", "float32"), ("distribution", "float32")]
DAILY += [(call, "bfloat16") for call in ("labels, all options and row weights", "distribution, all options")]


@pytest.mark.parametrize(("call", "dtype"), daily(TEMPORARIES, DAILY))
def test_temporaries_of_value_and_gradient_on_the_cpu(call, dtype):
    assert _temporaries(call, dtype) <= 0.01 * N * C * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temporaries_of_long_rows_on_the_cpu(dtype, smoothing):
    """XLA:CPU has other reductions for rows of more than 2^15 classes, and so they are summed a few at a time."""
    logits, labels = ShapeDtypeStruct((512, 50257), dtype), ShapeDtypeStruct((512,), jnp.int32)

    def loss(logits, labels):
        return jaxce.cross_entropy(logits, labels, label_smoothing=smoothing)

    for function in (loss, jax.value_and_grad(loss)):
        compiled = jax.jit(function).lower(logits, labels).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 2**20  # five of 512 rows


@pytest.mark.parametrize("call", CALLS)
def test_no_second_residual_over_the_classes(call, capsys):
    names, loss = CALLS[call]
    print_saved_residuals(loss, ShapeDtypeStruct((N, C), jnp.bfloat16), *(SHAPES[name] for name in names))
    saved = [line for line in capsys.readouterr().out.splitlines() if f"[{N},{C}]" in line]
    arguments = 1 + ("distribution" in names)
    assert len(saved) == arguments
    assert all("from the argument" in line for line in saved)


@pytest.mark.parametrize(
    ("divergence", "temperature", "bound"),
    daily(
        [("forward", 1.0, 1.01), ("forward", 2.0, 1.01), ("reverse", 2.0, 2.01), ("jensen_shannon", 2.0, 0.25)],
        [("forward", 1.0, 1.01), ("forward", 2.0, 1.01), ("jensen_shannon", 2.0, 0.25)],
    ),
)
def test_distillation_holds_one_array_over_the_classes(divergence, temperature, bound, capsys):
    """Or two where the gradient is that of the divergence's target, or blocks; and beside them only the arguments."""
    logits = ShapeDtypeStruct((N, C), F32)

    def loss(logits, teacher_logits):
        options = {"temperature": temperature, "divergence": divergence}
        return jaxce.distillation_loss(logits, teacher_logits, **options)

    for function in (loss, jax.value_and_grad(loss)):
        compiled = jax.jit(function).lower(logits, logits).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= bound * N * C * 4
    print_saved_residuals(loss, logits, logits)
    saved = [line for line in capsys.readouterr().out.splitlines() if f"[{N},{C}]" in line]
    assert len(saved) == 2
    assert all("from the argument" in line for line in saved)


POLICIES = {
    name: getattr(jax.checkpoint_policies, name)
    for name in ("dots_saveable", "everything_saveable", "dots_with_no_batch_dims_saveable")
}
HEAD = (ShapeDtypeStruct((512, 64), F32), ShapeDtypeStruct((64, 8192), F32), ShapeDtypeStruct((512,), jnp.int32))


@pytest.mark.parametrize(("recompute", "with_model"), daily([(r, m) for r in (1, 0) for m in (1, 0)], [(1, 1), (0, 0)]))
def test_no_policy_of_checkpoint_keeps_logits_of_a_head(recompute, with_model):
    def loss(hidden, kernel, labels):
        hidden = jnp.tanh(hidden @ jnp.ones((64, 64))) if with_model else hidden
        return jaxce.linear_cross_entropy(hidden, kernel, labels, recompute=bool(recompute), block_bytes=2**20)

    def temporaries(loss):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*HEAD).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    bare = temporaries(loss)
    for name, policy in POLICIES.items():
        assert temporaries(jax.checkpoint(loss, policy=policy)) <= 1.1 * bare, name


def test_second_derivatives_of_a_head_keep_no_block():
    """Of the block's logits, and of the gradients that the loop carries, there would be one for every block."""

    def loss(hidden, kernel, labels):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, recompute=True, block_bytes=2**20)

    def temporaries(function):
        return jax.jit(function).lower(*HEAD).compile().memory_analysis().temp_size_in_bytes

    def pushed(h, k, y):
        return jax.jvp(lambda h, k: loss(h, k, y), (h, k), (jnp.ones_like(h), jnp.ones_like(k)))[1]

    def norm(h, k, y):
        return sum(jnp.vdot(gradient, gradient) for gradient in jax.grad(loss, argnums=(0, 1))(h, k, y))

    logits = 4 * 512 * 8192
    for function in (pushed, norm):
        assert temporaries(jax.grad(function, argnums=(0, 1))) < logits


CHILD = """
import jax
import jax.numpy as jnp
import jaxce

N, C = 4096, 32768
logits = jax.jit(lambda: (jax.lax.broadcasted_iota(jnp.float32, (N, C), 1) * 0.37) % 5)().block_until_ready()
labels, class_weights = jnp.arange(N) % C, jnp.ones(C)
distributions = jax.jit(lambda: jnp.full((N, C), 1 / C))().block_until_ready()


def with_options(logits, targets):
    ignored = {"ignore_index": 7} if targets.ndim == 1 else {}
    return jaxce.cross_entropy(
        logits, targets, class_weights=class_weights, label_smoothing=0.1, z_loss=1e-4, **ignored
    )


def resident(field):
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(field))


def grown(function, targets):
    compiled = jax.jit(function).lower(logits, targets).compile()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak, to what is resident now
    before = resident("VmRSS:")
    jax.block_until_ready(compiled(logits, targets))
    return (resident("VmHWM:") - before) / logits.nbytes  # ru_maxrss would be that of the parent, if larger


for loss in (jaxce.cross_entropy, with_options):
    for targets in (labels, distributions):
        print(grown(loss, targets), grown(jax.value_and_grad(loss), targets))
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, for /proc")
def test_memory_of_a_real_run():
    """The gradient is one logits' worth. What XLA:CPU allocates inside a loop is in no report of the compiler."""
    # On one device, and of so many rows: with several devices, or of half as many rows, XLA:CPU allocates nothing more.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run([sys.executable, "-c", CHILD], env=environment, check=True, capture_output=True, text=True)
    printed = run.stdout
    print(f"resident memory grew, in logits, by\n{printed}")
    for line in printed.splitlines():
        of_loss, of_gradient = map(float, line.split())
        assert of_loss < 0.05
        assert 0.95 < of_gradient < 1.05
