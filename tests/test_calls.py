"""What a call costs: one program the first time, none the second, and nothing at import."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lazy import linear, linear_distillation

import jaxce

F = jaxce.torch
COUNTS = np.array([4.0, 2.0, 1.0], np.float32)
SHAPE = (7, 3)  # of this file alone: nothing is compiled for it before

CALLS = {
    "cross_entropy": lambda a, b, y, s: jaxce.cross_entropy(a, y, label_smoothing=s, z_loss=s),
    "cross_entropy of distributions": lambda a, b, y, s: jaxce.cross_entropy(a, b, label_smoothing=s),
    "cross_entropy in parts": lambda a, b, y, s: jaxce.cross_entropy(a, y, label_smoothing=s, reduction="parts"),
    "cross_entropy of listed classes": lambda a, b, y, s: jaxce.cross_entropy(
        a, jaxce.SparseTargets(np.broadcast_to(np.arange(3), b.shape), b), z_loss=s
    ),
    "linear_cross_entropy": lambda a, b, y, s: jaxce.linear_cross_entropy(a, np.eye(3), y, softcap=s, z_loss=s),
    "distillation_loss of heads": lambda a, b, y, s: linear_distillation(a, np.eye(3), b, np.eye(3), temperature=s),
    "summarize of a head": lambda a, b, y, s: linear(jaxce.summarize)(a, np.eye(3), y, softcap=s),
    "focal_loss": lambda a, b, y, s: jaxce.focal_loss(a, y, gamma=s),
    "poly_loss": lambda a, b, y, s: jaxce.poly_loss(a, y, epsilon=s),
    "nll_loss": lambda a, b, y, s: jaxce.nll_loss(a, y),
    "distillation_loss": lambda a, b, y, s: jaxce.distillation_loss(a, b, temperature=s),
    "distillation_loss in reverse": lambda a, b, y, s: jaxce.distillation_loss(
        a, b, temperature=s, divergence="reverse", mixture=s
    ),
    "distillation_loss, mixed": lambda a, b, y, s: jaxce.distillation_loss(
        a, b, temperature=s, divergence="jensen_shannon", mixture=s
    ),
    "multi_margin_loss": lambda a, b, y, s: jaxce.multi_margin_loss(a, y, margin=s),
    "binary_cross_entropy": lambda a, b, y, s: jaxce.binary_cross_entropy(a, b, label_smoothing=s, pos_weight=s),
    "binary_focal_loss": lambda a, b, y, s: jaxce.binary_focal_loss(a, b, gamma=s, alpha=s),
    "expected_cost": lambda a, b, y, s: jaxce.imbalance.expected_cost(a, y, np.eye(3)),
    "class_counts": lambda a, b, y, s: jaxce.imbalance.class_counts(y, 3),
    "class_counts by names": lambda a, b, y, s: jaxce.imbalance.class_counts(y, num_classes=3),
    "class_weights": lambda a, b, y, s: jaxce.imbalance.class_weights(COUNTS, scheme="effective_number", beta=s),
    "logit_adjustment": lambda a, b, y, s: jaxce.imbalance.logit_adjustment(COUNTS, tau=s),
    "mse_loss": lambda a, b, y, s: jaxce.mse_loss(a, b),
    "l1_loss": lambda a, b, y, s: jaxce.l1_loss(a, b),
    "reduce_losses": lambda a, b, y, s: jaxce.reduce_losses(a, b),
    "summarize": lambda a, b, y, s: jaxce.summarize(a, y),
    "torch.cross_entropy": lambda a, b, y, s: F.cross_entropy(a, y, label_smoothing=s, reduction="sum"),
    "torch.cross_entropy mean": lambda a, b, y, s: F.cross_entropy(a, y, label_smoothing=s),
    "torch.nll_loss": lambda a, b, y, s: F.nll_loss(a, y),
    "torch.multi_margin_loss": lambda a, b, y, s: F.multi_margin_loss(a, y, margin=s),
    "torch.binary_cross_entropy_with_logits": lambda a, b, y, s: F.binary_cross_entropy_with_logits(a, b),
    "torch.mse_loss": lambda a, b, y, s: F.mse_loss(a, b),
    "torch.l1_loss": lambda a, b, y, s: F.l1_loss(a, b),
    "torch.kl_div": lambda a, b, y, s: F.kl_div(a, b, reduction="batchmean"),
    "torch.softmax": lambda a, b, y, s: F.softmax(a, 1),
    "torch.log_softmax": lambda a, b, y, s: F.log_softmax(a, 1),
}


@pytest.fixture
def compilations():
    """Grows with every program that is compiled."""
    names = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("name", CALLS)
def test_an_eager_call_is_one_program_and_the_next_none(name, compilations):
    logits, targets = jnp.asarray(np.ones(SHAPE, np.float32)), jnp.asarray(np.full(SHAPE, 0.25, np.float32))
    labels = jnp.asarray(np.arange(7, dtype=np.int32) % 3)
    jax.block_until_ready((logits, targets, labels))
    jax.clear_caches()
    del compilations[:]
    jax.block_until_ready(CALLS[name](logits, targets, labels, 0.1))
    assert len(compilations) == 1
    jax.block_until_ready(CALLS[name](logits, targets, labels, 0.1))
    jax.block_until_ready(CALLS[name](logits, targets, labels, 0.7))
    assert len(compilations) == 1


def test_import_brings_in_nothing_but_jax_and_jaxtyping():
    script = """
import sys
import jax
import jaxtyping
before = set(sys.modules)
import jaxce
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] not in ("jax", "jaxce")))
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_no_step_is_traced_twice():
    traces = []

    @jax.jit
    def step(logits, labels):
        traces.append(1)
        return jax.grad(jaxce.cross_entropy)(logits, labels)

    logits, labels = jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)
    for _ in range(3):
        logits = logits - step(logits, labels)
    assert len(traces) == 1
