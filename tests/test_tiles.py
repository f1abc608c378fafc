"""Heads of which the rows come in tiles, and those that do not count are left out: the numbers of the dense loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import daily
from modes import all_modes, plain_modes

import jaxce
from jaxce._head import tile_shape

N, D, V, K = 600, 3, 11, 2  # three tiles of rows where some do not count, of which the last is smaller
RNG = np.random.default_rng(17)
HIDDEN, KERNEL, BIAS = RNG.normal(size=(N, D)), RNG.normal(size=(D, V)), RNG.normal(size=V)
TEACHER = RNG.normal(size=(N, 2)), RNG.normal(size=(2, V))
LABELS = RNG.integers(0, V, N)
DISTRIBUTIONS = RNG.dirichlet(np.ones(V), N)
LISTED = np.stack([LABELS, (LABELS + 1 + RNG.integers(0, V - 1, N)) % V], -1), RNG.uniform(size=(N, K))
MASKS = {
    "few": RNG.random(N) < 0.05,
    "most": RNG.random(N) < 0.9,
    "a stretch": (np.arange(N) > 250) & (np.arange(N) < 280),
    "one": np.arange(N) == N - 1,
    "none": np.zeros(N, bool),
    "all": np.ones(N, bool),
}


def _own(summary):
    return summary.nll * summary.entropy + summary.log_z


def _of_teacher(divergence, *, is_lazy):
    def loss(logits, teacher, **options):
        teacher = jaxce.LinearLogits(*teacher, block_bytes=2**14) if is_lazy else teacher[0] @ teacher[1]
        return jaxce.distillation_loss(logits, teacher, divergence=divergence, temperature=2.0, **options)

    return loss


LOSSES = {
    "labels": (lambda z, t, **o: jaxce.cross_entropy(z, t, label_smoothing=0.1, z_loss=0.1, **o), LABELS),
    "distributions": (jaxce.cross_entropy, DISTRIBUTIONS),
    "listed": (lambda z, t, **o: jaxce.cross_entropy(z, jaxce.SparseTargets(LISTED[0], t), **o), LISTED[1]),
    "own": (functools.partial(jaxce.custom_loss, _own, entropy=True), LABELS),
    "forward": (_of_teacher("forward", is_lazy=True), TEACHER),
    "jensen_shannon": (_of_teacher("jensen_shannon", is_lazy=True), TEACHER),
    "forward, beside a held teacher": (_of_teacher("forward", is_lazy=False), TEACHER),
}
WAYS = ("grad", "jvp", "rev over fwd", "fwd over rev", "rev over rev")
DAILY_WAYS = ("grad", "rev over fwd")


def _total(name, where, how):
    loss, targets = LOSSES[name]
    is_moving = not np.issubdtype(np.asarray(jax.tree.leaves(targets)[0]).dtype, np.integer)

    def total(arrays):
        hidden, kernel, bias, *moving = arrays
        given = moving[0] if is_moving else targets
        logits = hidden @ kernel + bias[None] if how is None else jaxce.LinearLogits(hidden, kernel, bias=bias, **how)
        return loss(logits, given, where=where)

    return total, [HIDDEN, KERNEL, BIAS, *([jax.tree.map(jnp.asarray, targets)] if is_moving else [])]


CASES = [(name, mask, recompute) for name in LOSSES for mask in MASKS for recompute in (True, False)]


@pytest.mark.parametrize(
    ("name", "mask", "recompute"), daily(CASES, [("labels", "few", True), ("labels", "few", False)])
)
def test_every_mode_is_that_of_held_logits(name, mask, recompute, x64, request):
    ways = WAYS if request.config.getoption("--thorough") else DAILY_WAYS
    where = jnp.asarray(MASKS[mask])
    head, arrays = _total(name, where, {"recompute": recompute, "block_bytes": 4 * 4 * N})
    dense, _ = _total(name, where, None)
    arrays = jax.tree.map(jnp.asarray, arrays)
    direction = jax.tree.map(lambda array: jnp.cos(1 + array), arrays)
    results = unoptimized.jit(all_modes(head, ways))(arrays, direction)
    expected = unoptimized.jit(plain_modes(dense, ways))(arrays, direction)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), results, expected)


@pytest.mark.parametrize("recompute", [True, False])
def test_rows_that_do_not_count_may_hold_anything(recompute):
    where = MASKS["few"]
    spoilt = np.where(where[:, None], HIDDEN, np.nan).astype(np.float32)

    @jax.jit
    def results(hidden):
        def loss(hidden, kernel):
            return jaxce.linear_cross_entropy(hidden, kernel, LABELS, where=where, recompute=recompute)

        return jax.value_and_grad(loss, (0, 1))(hidden, np.float32(KERNEL))

    jax.tree.map(np.testing.assert_array_equal, results(spoilt), results(np.float32(HIDDEN)))
    assert not np.asarray(results(spoilt)[1][0])[~where].any()


def test_vmap_of_masks(x64):
    """Of heads with masks of their own, whose tiles are all made."""
    masks = jnp.stack([MASKS["few"], MASKS["most"]])
    kernels = jnp.stack([KERNEL, KERNEL[::-1]])

    def gradient(loss):
        return unoptimized.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(0, 0)))(kernels, masks)

    head = gradient(lambda kernel, where: jaxce.linear_cross_entropy(HIDDEN, kernel, LABELS, where=where))
    dense = gradient(lambda kernel, where: jaxce.cross_entropy(HIDDEN @ kernel, LABELS, where=where))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), head, dense)


SPLITS = [(kind, named, how) for kind in ("Explicit", "Auto") for named in (True, False) for how in (True, False)]


@pytest.mark.parametrize(
    ("kind", "named", "recompute"),
    daily(SPLITS, [("Explicit", False, False), ("Auto", True, True), ("Auto", False, True)]),
)
def test_every_device_leaves_out_its_own(kind, named, recompute, x64):
    """In an Auto mesh without names the partitioner has the rows: they stay where they are, and none is left out."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType[kind],))
    where = np.arange(2 * N) < N // 2
    hidden = np.concatenate([HIDDEN, -HIDDEN])
    labels = np.concatenate([LABELS, LABELS])
    names = {"batch_axis_name": "data"} if named and kind == "Auto" else {}

    def loss(hidden, kernel, labels, where):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, where=where, recompute=recompute, **names)

    expected = jax.value_and_grad(lambda h, k: jaxce.cross_entropy(h @ k, labels, where=where), (0, 1))(hidden, KERNEL)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        arrays = jax.device_put((hidden, KERNEL, labels, where), (rows, NamedSharding(mesh, P()), rows, rows))
        step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), step(*arrays), expected)
    if recompute:
        skips = named or kind == "Explicit"
        assert (" conditional(" in step.as_text()) == skips
        assert "all-gather" not in step.as_text()


def test_what_is_small_or_symbolic_or_counts_whole_has_no_tiles():
    def text(num_rows, **options):
        shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((num_rows, D), (D, V))]
        labels, where = (jax.ShapeDtypeStruct((num_rows,), dtype) for dtype in ("int32", bool))
        options = {name: where if value is None else value for name, value in options.items()}

        def step(hidden, kernel, labels, where=None):
            return jax.grad(jaxce.linear_cross_entropy, (0, 1))(hidden, kernel, labels, where=where)

        return unoptimized.jit(step).lower(*shapes, labels, **options).compile().as_text()

    assert " conditional(" in text(N, where=None)
    assert " conditional(" not in text(N)
    assert " conditional(" not in text(256, where=None)


@pytest.mark.parametrize(
    ("shape", "masked", "expected"),
    [
        ((8192, 131072), False, (8192, 1024)),
        ((8192, 131072), True, (1024, 1024)),
        ((32768, 32768), False, (16384, 512)),
        ((524288, 32768), False, (16384, 512)),
        ((2048, 16384), True, (256, 2048)),
        ((2048, 16384), False, (2048, 2048)),
        ((1024, 4096), False, (1024, 1024)),
        ((7, 5), True, (7, 5)),
    ],
)
def test_shape_of_a_tile(shape, masked, expected):
    """32 MiB, or an eighth of the logits, but not less than 4 MiB."""
    head = jaxce.LinearLogits(jnp.zeros((shape[0], 1)), jnp.zeros((1, shape[1])))
    assert tile_shape([head], jnp.zeros(shape[0], bool) if masked else None) == expected
