"""Kernels whose features are split over devices that have rows of their own: the numbers of one device."""

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

N, D, V = 16, 8, 22
BLOCK = 4 * (N // 4) * 5  # bytes: five of the eleven classes of a device, for its rows
RNG = np.random.default_rng(23)
HIDDEN, KERNEL, BIAS = RNG.normal(size=(N, D)), RNG.normal(size=(D, V)), RNG.normal(size=V)
LABELS, WHERE = RNG.integers(0, V, N), np.arange(N) % 5 != 1
ROWS = ("data", "fsdp")


def _of_labels(logits, labels, where, **mesh):
    return jaxce.cross_entropy(logits, labels, where=where, label_smoothing=0.1, z_loss=0.1, **mesh)


def _of_two(divergence):
    """The teacher is the same head, of hidden by its squares."""

    def loss(logits, labels, where, **mesh):
        teacher = jaxce.LinearLogits(
            logits.hidden**2, logits.kernel, feature_axis_name=logits.feature_axis_name, block_bytes=BLOCK
        )
        return jaxce.distillation_loss(logits, teacher, where=where, divergence=divergence, **mesh)

    return loss


LOSSES = {"labels": _of_labels} | {name: _of_two(name) for name in ("forward", "jensen_shannon")}
SPECS = P(ROWS), P("fsdp", "model"), P("model"), P(ROWS), P(ROWS)
KINDS = {"shard_map": AxisType.Auto, "names": AxisType.Auto, "types": AxisType.Explicit}
CASES = [(name, way) for name in LOSSES for way in KINDS]
WAYS = ("value", "grad", "jvp", "fwd over rev", "rev over fwd")
DAILY_WAYS = ("grad", "fwd over rev")


def _loss(name, recompute=None, feature_axis_name=None, **mesh):
    def loss(arrays, labels, where):
        hidden, kernel, bias = arrays
        logits = jaxce.LinearLogits(
            hidden,
            kernel,
            bias=bias,
            feature_axis_name=feature_axis_name,
            block_bytes=BLOCK,
            recompute=recompute,
        )
        return LOSSES[name](logits, labels, where, **mesh)

    return loss


def _mesh(kind):
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(kind,) * 3)


def _place(mesh, dtype=None):
    arrays = [jnp.asarray(array, dtype) for array in (HIDDEN, KERNEL, BIAS)] + [jnp.asarray(LABELS), jnp.asarray(WHERE)]
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, SPECS, strict=True)]
    return placed[:3], *placed[3:]


NAMES = {"feature_axis_name": "fsdp", "batch_axis_name": P(ROWS), "class_axis_name": "model"}


@pytest.mark.parametrize(("name", "way"), daily(CASES, [("labels", "shard_map")]))
def test_every_mode_is_that_of_one_device(name, way, x64, request):
    chosen = WAYS if request.config.getoption("--thorough") else DAILY_WAYS
    mesh = _mesh(KINDS[way])
    arrays, labels, where = _place(mesh)
    loss = _loss(name, **({} if way == "types" else NAMES))

    def modes(differentiate, loss, arrays, labels, where):
        direction = [jnp.cos(array) for array in arrays]
        return differentiate(lambda arrays: loss(arrays, labels, where), chosen)(arrays, direction)

    whole = [jnp.asarray(array) for array in (HIDDEN, KERNEL, BIAS)]
    expected = unoptimized.jit(functools.partial(modes, plain_modes, _loss(name, recompute=True)))(whole, LABELS, WHERE)
    split = functools.partial(modes, all_modes, loss)
    if way == "shard_map":
        vectors = list(SPECS[:3])
        out_specs = {name: P() if name in ("value", "jvp") else vectors for name in chosen}
        split = jax.shard_map(split, mesh=mesh, in_specs=(vectors, *SPECS[3:]), out_specs=out_specs)
    with jax.set_mesh(mesh):
        results = unoptimized.jit(split)(arrays, labels, where)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), results, expected)
    assert [array.sharding.spec for array in results["grad"]][1] == SPECS[1]


@pytest.mark.parametrize(
    ("way", "recompute"), daily([(way, how) for way in ("names", "types") for how in (None, True)], [("types", None)])
)
def test_no_device_holds_the_kernel(way, recompute):
    """A block of it is gathered, and its gradient scattered; with the row blocks' word, too."""
    mesh = _mesh(KINDS[way])
    loss = _loss("labels", recompute=recompute, **({} if way == "types" else NAMES))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss)).lower(*_place(mesh, jnp.float32)).compile()
    text = step.as_text()
    gathered = [line.partition("=")[2].split()[0] for line in text.splitlines() if " all-gather(" in line]
    assert gathered
    assert all(f"[{D},{V // 2}]" not in shape for shape in gathered)
    assert "reduce-scatter" in text
    assert step.output_shardings[1][1].spec == SPECS[1]


def test_a_tile_may_count_on_one_device_alone(x64):
    """What is gathered is gathered by all: those that leave a tile out would wait for it otherwise."""
    rows = 2048
    hidden, labels = RNG.normal(size=(rows, D)), RNG.integers(0, V, rows)
    where = np.arange(rows) < 300

    def loss(hidden, kernel, labels, where):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, where=where, recompute=True, block_bytes=4 * rows)

    expected = jax.value_and_grad(lambda h, k: jaxce.cross_entropy(h @ k, labels, where=where), (0, 1))(hidden, KERNEL)
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"))
    specs = P(ROWS), P("fsdp"), P(ROWS), P(ROWS)
    arrays = hidden, KERNEL, labels, where
    arrays = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]
    step = unoptimized.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()
    assert " conditional(" in step.as_text()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), step(*arrays), expected)


@pytest.mark.thorough
def test_second_derivatives_gather_anew():
    """They keep no block of the kernel from one step to the next: their temporaries do not grow with its classes."""

    def temporaries(classes):
        mesh = jax.make_mesh((4,), ("fsdp",))
        shapes = [(8, 64), (64, classes), (8,)]
        specs, dtypes = [P("fsdp"), P("fsdp"), P("fsdp")], [jnp.float32, jnp.float32, jnp.int32]
        arrays = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)
        ]

        def curvature(hidden, kernel, labels):
            def gradient(hidden):
                return jax.grad(jaxce.linear_cross_entropy)(hidden, kernel, labels, block_bytes=4 * 8 * 16)

            return jax.grad(lambda hidden: jnp.sum(gradient(hidden) ** 2))(hidden)

        with jax.set_mesh(mesh):
            return jax.jit(curvature).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    whole_kernel = 4 * 64 * 4096
    assert temporaries(8192) - temporaries(4096) < whole_kernel / 4


@pytest.mark.parametrize("named", [{"batch_axis_name": "data"}, {"class_axis_name": "fsdp", "batch_axis_name": "data"}])
def test_axes_of_features_have_to_split_the_rows(named):
    with (
        jax.set_mesh(jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)),
        pytest.raises(ValueError, match="`feature_axis_name` names 'fsdp', which do not split the rows"),
    ):
        jaxce.linear_cross_entropy(HIDDEN, KERNEL, LABELS, feature_axis_name="fsdp", **named)


def test_features_that_are_the_same_everywhere():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))

    def loss(hidden, kernel, labels):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, feature_axis_name="fsdp", batch_axis_name="fsdp")

    def split(kernel):
        return jax.shard_map(loss, mesh=mesh, in_specs=(P("fsdp"), P(), P("fsdp")), out_specs=P())(
            HIDDEN, kernel, LABELS
        )

    with pytest.raises(ValueError, match=r"`kernel` must have shape \(8 / 2, V\)"):
        split(KERNEL)
    with pytest.raises(ValueError, match="all devices along it hold the same `kernel`"):
        split(KERNEL[:4])


def test_a_gathered_block_is_an_eighth_of_the_kernel():
    """However few the rows are that a device has: a block of their logits alone may have all classes."""
    head = functools.partial(jaxce.LinearLogits, jnp.zeros((4, 1)), jnp.zeros((1, 8192)))
    split, whole = head(feature_axis_name="fsdp"), head()
    assert tile_shape([whole], None) == (4, 8192)
    assert tile_shape([split], None) == (4, 1024)
    assert tile_shape([whole, split], None) == (4, 1024)
    assert tile_shape([jnp.zeros((4, 8192)), split], None) == (4, 1024)
    assert tile_shape([head(feature_axis_name="fsdp", block_bytes=4 * 4 * 100)], None) == (4, 100)
