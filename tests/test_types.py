"""Code as users write it, for pyright and mypy as much as for pytest: what works at run time has to pass both.

The two check every call; `assert_type` holds the results to a type, since anything may be assigned from `Any`.
"""

import functools
from typing import Any, Literal, TypedDict, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxce

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
LABELS = jnp.array([0, 2, 1, 2])
PROBS = jax.nn.softmax(LOGITS)
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)), jnp.float32)
LOSS = float(jaxce.cross_entropy(LOGITS, LABELS))


class Held:
    """What holds an array without being one."""

    def __init__(self, array: jax.Array) -> None:
        self.array = array

    def __jax_array__(self) -> jax.Array:
        return self.array


def close(actual: jax.Array, expected: object) -> None:
    np.testing.assert_allclose(actual, np.asarray(expected), 1e-6)


@pytest.mark.thorough
def test_every_loss_is_an_array_or_parts() -> None:
    arrays = [
        assert_type(jaxce.cross_entropy(LOGITS, LABELS), jax.Array),
        assert_type(jaxce.focal_loss(LOGITS, LABELS), jax.Array),
        assert_type(jaxce.poly_loss(LOGITS, LABELS), jax.Array),
        assert_type(jaxce.nll_loss(LOGITS, LABELS), jax.Array),
        assert_type(jaxce.multi_margin_loss(LOGITS, LABELS), jax.Array),
        assert_type(jaxce.distillation_loss(LOGITS, LOGITS), jax.Array),
        assert_type(jaxce.binary_cross_entropy(LOGITS, PROBS), jax.Array),
        assert_type(jaxce.binary_focal_loss(LOGITS, PROBS), jax.Array),
        assert_type(jaxce.mse_loss(LOGITS, PROBS), jax.Array),
        assert_type(jaxce.l1_loss(LOGITS, PROBS), jax.Array),
        assert_type(jaxce.linear_cross_entropy(LOGITS, KERNEL, LABELS), jax.Array),
        assert_type(jaxce.focal_loss(jaxce.LinearLogits(LOGITS, KERNEL), LABELS), jax.Array),
        assert_type(jaxce.poly_loss(jaxce.LinearLogits(LOGITS, KERNEL), LABELS), jax.Array),
        assert_type(
            jaxce.distillation_loss(jaxce.LinearLogits(LOGITS, KERNEL), jaxce.LinearLogits(LOGITS, KERNEL)), jax.Array
        ),
        assert_type(jaxce.imbalance.expected_cost(LOGITS, LABELS, np.eye(3)), jax.Array),
        assert_type(jaxce.reduce_losses(LOGITS), jax.Array),
    ]
    parts = [
        assert_type(jaxce.cross_entropy(LOGITS, LABELS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.focal_loss(LOGITS, LABELS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.poly_loss(LOGITS, LABELS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.nll_loss(LOGITS, LABELS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.multi_margin_loss(LOGITS, LABELS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.distillation_loss(LOGITS, LOGITS, divergence="reverse", reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.binary_cross_entropy(LOGITS, PROBS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.binary_focal_loss(LOGITS, PROBS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.mse_loss(LOGITS, PROBS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.l1_loss(LOGITS, PROBS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.linear_cross_entropy(LOGITS, KERNEL, LABELS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.focal_loss(jaxce.LinearLogits(LOGITS, KERNEL), LABELS, reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.poly_loss(jaxce.LinearLogits(LOGITS, KERNEL), LABELS, reduction="parts"), jaxce.MeanParts),
        assert_type(
            jaxce.distillation_loss(
                jaxce.LinearLogits(LOGITS, KERNEL), jaxce.LinearLogits(LOGITS, KERNEL), reduction="parts"
            ),
            jaxce.MeanParts,
        ),
        assert_type(jaxce.imbalance.expected_cost(LOGITS, LABELS, np.eye(3), reduction="parts"), jaxce.MeanParts),
        assert_type(jaxce.reduce_losses(LOGITS, reduction="parts"), jaxce.MeanParts),
    ]
    for array, part in zip(arrays, parts, strict=True):
        close(part.mean(), array)


def test_a_reduction_that_is_chosen_elsewhere() -> None:
    def any_reduction(reduction: Literal["none", "sum", "mean", "parts"]) -> jax.Array | jaxce.MeanParts:
        return jaxce.cross_entropy(LOGITS, LABELS, reduction=reduction)

    def to_array(reduction: Literal["none", "sum", "mean"]) -> jax.Array:
        return jaxce.reduce_losses(LOGITS, reduction=reduction)

    close(to_array("sum"), LOGITS.sum())
    parts = any_reduction("parts")
    assert isinstance(parts, jaxce.MeanParts)
    close(parts.total, 4 * LOSS)


def test_parts_add_up() -> None:
    first, *others = [
        jaxce.cross_entropy(LOGITS[rows], LABELS[rows], reduction="parts") for rows in (slice(0, 1), slice(1, 4))
    ]
    for total in (first + others[0], sum(others, first), 0 + first + others[0]):
        assert_type(total, jaxce.MeanParts)
        close(assert_type(total.mean(), jax.Array), LOSS)
        close(assert_type(total.weight, jax.Array), 4)
    started = sum([first, *others])
    assert_type(started, jaxce.MeanParts | Literal[0])  # typeshed's: the sum of no parts is 0
    assert started != 0
    close(started.mean(), LOSS)

    def on_device(logits: jax.Array, labels: jax.Array) -> jax.Array:
        parts = jaxce.cross_entropy(logits, labels, reduction="parts")
        return assert_type(assert_type(parts.psum(("rows",)), jaxce.MeanParts).mean(), jax.Array)

    means: jax.Array = jax.vmap(on_device, axis_name="rows")(LOGITS, LABELS)
    close(means, [LOSS] * 4)

    def step(carry: jaxce.MeanParts, batch: tuple[jax.Array, jax.Array]) -> tuple[jaxce.MeanParts, None]:
        return carry + jaxce.cross_entropy(*batch, reduction="parts"), None

    scanned, _ = jax.lax.scan(step, jaxce.MeanParts(jnp.zeros(()), jnp.zeros(())), (LOGITS, LABELS))
    close(assert_type(scanned, jaxce.MeanParts).mean(), LOSS)


class Options(TypedDict, total=False):
    label_smoothing: float
    ignore_index: int
    reduction: Literal["sum"]


def test_options_from_a_dictionary() -> None:
    typed: Options = {"label_smoothing": 0.1, "reduction": "sum"}
    untyped: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "sum"}
    parts: dict[str, Any] = {"where": jnp.ones(4, bool), "reduction": "parts"}
    expected = jaxce.cross_entropy(LOGITS, LABELS, label_smoothing=0.1, reduction="sum")
    from_typed: jax.Array = jaxce.cross_entropy(LOGITS, LABELS, **typed)
    from_untyped: jax.Array = jaxce.cross_entropy(LOGITS, LABELS, **untyped)
    from_parts: jaxce.MeanParts = jaxce.cross_entropy(LOGITS, LABELS, **parts)
    close(from_typed, expected)
    close(from_untyped, expected)
    close(from_parts.mean(), LOSS)
    close(jaxce.torch.cross_entropy(LOGITS, LABELS, **typed), expected)
    close(jaxce.torch.cross_entropy(LOGITS, LABELS, **untyped), expected)


def test_partial_and_transformations() -> None:
    smooth = functools.partial(jaxce.cross_entropy, label_smoothing=0.1)
    expected = assert_type(smooth(LOGITS, LABELS), jax.Array)

    def loss(logits: jax.Array) -> jax.Array:
        return jaxce.cross_entropy(logits, LABELS, label_smoothing=0.1)

    def with_parts(logits: jax.Array) -> tuple[jax.Array, jaxce.MeanParts]:
        parts = jaxce.cross_entropy(logits, LABELS, label_smoothing=0.1, reduction="parts")
        return parts.total, parts

    gradient: jax.Array = jax.grad(smooth)(LOGITS, LABELS)
    for function in (loss, smooth):
        value: jax.Array = jax.jit(function)(LOGITS, *[LABELS] * (function is smooth))
        close(value, expected)
    close(jax.value_and_grad(loss)(LOGITS)[0], expected)
    close(jax.grad(loss)(LOGITS), gradient)
    rows: jax.Array = jax.vmap(jaxce.cross_entropy)(LOGITS, LABELS)
    close(rows.mean(), LOSS)
    (_, aux), by_total = jax.value_and_grad(with_parts, has_aux=True)(LOGITS)
    close(jaxce.MeanParts(by_total, aux.weight).mean(), gradient)


@pytest.mark.thorough
def test_integers_and_numbers_of_numpy() -> None:
    logits, labels = np.asarray(LOGITS), np.asarray(LABELS)
    two, five = np.int64(2), np.int32(5)
    close(jaxce.cross_entropy(logits, labels, axis=np.int64(-1), ignore_index=np.int64(-100)), LOSS)
    close(jaxce.cross_entropy(logits, labels, class_weights=np.ones(3), num_classes=np.uint8(3)), LOSS)
    close(jaxce.cross_entropy(logits, labels, label_smoothing=np.float32(0), z_loss=0), LOSS)
    close(jaxce.nll_loss(jax.nn.log_softmax(LOGITS), labels, axis=np.int8(1), ignore_index=np.int16(7)), LOSS)
    margins = jaxce.multi_margin_loss(logits, labels, p=2, margin=1)
    close(jaxce.multi_margin_loss(logits, labels, p=two, margin=np.float64(1), axis=np.int64(1)), margins)
    close(jaxce.torch.multi_margin_loss(logits, labels, p=two, margin=np.float32(1)), margins)
    linear = jaxce.linear_cross_entropy(logits, np.asarray(KERNEL), labels)
    close(jaxce.linear_cross_entropy(logits, KERNEL, labels, block_bytes=np.int64(64), num_classes=five), linear)
    close(
        jaxce.summarize(jaxce.LinearLogits(logits, KERNEL, block_bytes=five), labels, num_classes=five).nll.mean(),
        linear,
    )
    close(jaxce.summarize(logits, labels, axis=np.int64(1), num_classes=np.int64(3)).nll.mean(), LOSS)
    close(jaxce.distillation_loss(logits, logits, temperature=two, axis=np.int64(1), num_classes=np.int64(3)), 0)
    close(jaxce.distillation_loss(logits, logits, divergence="jensen_shannon", mixture=np.float32(0.5)), 0)
    close(jaxce.imbalance.class_counts(labels, np.int64(3)), [1, 1, 2])
    close(jaxce.imbalance.expected_cost(logits, labels, np.ones((3, 3)), axis=np.int64(1)), 1)
    close(jaxce.torch.cross_entropy(logits, labels, ignore_index=np.int64(-100)), LOSS)
    close(jaxce.torch.nll_loss(np.asarray(jax.nn.log_softmax(LOGITS)), labels, ignore_index=np.int64(-100)), LOSS)
    close(jaxce.torch.linear_cross_entropy(logits, KERNEL.T, labels, ignore_index=np.int64(-100)), linear)
    close(jaxce.torch.softmax(logits, dim=np.int64(1)), PROBS)
    focal = jaxce.binary_focal_loss(LOGITS, PROBS, gamma=2, alpha=0.25)
    close(jaxce.binary_focal_loss(logits, PROBS, gamma=np.float32(2), alpha=np.float64(0.25)), focal)
    close(jaxce.focal_loss(logits, labels, gamma=np.int64(0)), LOSS)
    close(jaxce.poly_loss(logits, labels, epsilon=0), LOSS)
    binary = jaxce.binary_cross_entropy(LOGITS, PROBS, pos_weight=2)
    close(jaxce.binary_cross_entropy(logits, PROBS, pos_weight=np.full(3, 2.0, np.float32)), binary)
    close(jaxce.torch.binary_cross_entropy_with_logits(logits, PROBS, 1, pos_weight=2.0), binary)


def test_one_row_of_numbers() -> None:
    row = jaxce.cross_entropy(LOGITS[1], LABELS[1])
    close(jaxce.cross_entropy(LOGITS[1], 2, where=True), row)
    close(jaxce.cross_entropy(LOGITS[1], np.int64(2), where=np.bool_(True), weights=np.float32(3)), row)
    close(jaxce.mse_loss(np.float32(1), np.float32(3)), 4)


def test_what_holds_an_array_is_one() -> None:
    layer = nnx.Param(KERNEL)
    linear = jaxce.linear_cross_entropy(LOGITS, KERNEL, LABELS)
    close(jaxce.linear_cross_entropy(LOGITS, layer, LABELS), linear)
    close(jaxce.linear_cross_entropy(LOGITS, layer[...], LABELS), linear)
    logits, labels, smoothing = Held(LOGITS), Held(LABELS), Held(jnp.float32(0.1))
    smooth = jaxce.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    close(jaxce.cross_entropy(logits, labels, weights=Held(jnp.ones(4)), label_smoothing=smoothing), smooth)
    close(jaxce.torch.cross_entropy(logits, labels, Held(jnp.ones(3)), label_smoothing=smoothing), smooth)
    close(jaxce.reduce_losses(Held(jnp.ones(4)), Held(jnp.ones(4)), where=Held(jnp.ones(4, bool))), 1)
    close(jaxce.imbalance.logit_adjustment(Held(jnp.ones(3)), tau=Held(jnp.float32(0))), jnp.zeros(3))


def test_names_of_a_mesh() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    logits = jnp.concatenate([LOGITS, jnp.zeros((4, 1))], axis=1)
    expected = jaxce.cross_entropy(logits, LABELS)
    with jax.set_mesh(mesh):
        close(jaxce.cross_entropy(logits, LABELS, batch_axis_name=P("data"), class_axis_name="tensor"), expected)
        close(jaxce.cross_entropy(logits, LABELS, batch_axis_name=("data", "tensor")), expected)
        close(jaxce.cross_entropy(logits, LABELS, batch_axis_name=["data"], class_axis_name=["tensor"]), expected)
        losses = jaxce.cross_entropy(logits, LABELS, reduction="none")
        close(jaxce.reduce_losses(losses, batch_axis_name="data"), expected)


def test_summaries() -> None:
    summary = assert_type(jaxce.summarize(LOGITS, LABELS, class_vector=np.ones(3)), jaxce.Summary)
    close(assert_type(summary.nll, jax.Array).mean(), LOSS)
    assert_type(summary.log_z, jax.Array)
    assert_type(summary.spread, jax.Array | None)
    assert_type(summary.entropy, jax.Array | None)
    assert_type(summary.argmax, jax.Array | None)
    assert summary.spread is not None
    close(summary.spread, jaxce.cross_entropy(LOGITS, jnp.ones((4, 3)), reduction="none"))
    linear = assert_type(
        jaxce.summarize(jaxce.LinearLogits(LOGITS, KERNEL, softcap=np.float32(30)), LABELS), jaxce.Summary
    )
    close(linear.nll.mean(), jaxce.linear_cross_entropy(LOGITS, KERNEL, LABELS, softcap=30))
    close(
        jaxce.linear_cross_entropy(LOGITS, KERNEL, LABELS, temperature=jnp.full(4, 2.0)),
        jaxce.cross_entropy(jaxce.LinearLogits(LOGITS, KERNEL, temperature=2), LABELS),
    )


def test_listed_classes() -> None:
    listed = jaxce.SparseTargets(np.array([[0], [1], [2], [0]], np.int8), jnp.ones((4, 1)))
    assert_type(jaxce.cross_entropy(LOGITS, listed), jax.Array)
    assert_type(jaxce.linear_cross_entropy(LOGITS, KERNEL, listed, reduction="parts"), jaxce.MeanParts)
    assert_type(jaxce.summarize(jaxce.LinearLogits(LOGITS, KERNEL), listed), jaxce.Summary)


def test_imbalance() -> None:
    counts = assert_type(jaxce.imbalance.class_counts(LABELS, 3), jax.Array)
    weights = assert_type(jaxce.imbalance.class_weights(counts), jax.Array)
    close(jaxce.imbalance.class_weights(np.array([1, 1, 2])), weights)
    scheme: Literal["balanced", "effective_number"] = "effective_number"
    close(jaxce.imbalance.class_weights(counts, scheme=scheme, beta=np.float32(0)), jnp.ones(3))
    close(assert_type(jaxce.imbalance.logit_adjustment(counts, tau=0), jax.Array), jnp.zeros(3))


def test_names_of_pytorch() -> None:
    log_probs = assert_type(jaxce.torch.log_softmax(LOGITS, 1), jax.Array)
    probs = assert_type(jaxce.torch.softmax(LOGITS, dim=1), jax.Array)
    close(assert_type(jaxce.torch.cross_entropy(LOGITS, LABELS), jax.Array), LOSS)
    close(assert_type(jaxce.torch.nll_loss(log_probs, LABELS), jax.Array), LOSS)
    close(assert_type(jaxce.torch.kl_div(log_probs, probs, reduction="batchmean"), jax.Array) + 1, 1)
    close(assert_type(jaxce.torch.mse_loss(LOGITS, LOGITS), jax.Array), 0)
    close(assert_type(jaxce.torch.l1_loss(LOGITS, LOGITS), jax.Array), 0)
    assert_type(jaxce.torch.multi_margin_loss(LOGITS, LABELS), jax.Array)
    assert_type(jaxce.torch.binary_cross_entropy_with_logits(LOGITS, PROBS), jax.Array)
    linear = assert_type(jaxce.torch.linear_cross_entropy(LOGITS, KERNEL.T, LABELS), jax.Array)
    close(linear, jaxce.linear_cross_entropy(LOGITS, KERNEL, LABELS))
