"""Targets that list a few classes are the distribution that they stand for: edges, digits and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import unoptimized
from marks import daily

import jaxce

N, C, K = 5, 7, 3
RNG = np.random.default_rng(13)
LOGITS = RNG.normal(0, 2, (N, C)).astype(np.float32)
CLASSES = np.array([[2, 0, 5], [4, 4, 1], [0, 6, -1], [3, 2, 3], [6, 5, 4]], np.int32)  # twice, and padding
MASSES = RNG.uniform(0.1, 1, (N, K)).astype(np.float32) * (CLASSES >= 0)
WHERE = np.array([True, True, True, False, True])


def _distribution(classes, masses, size=C):
    """The same as a distribution over all classes."""
    one_hot = jax.nn.one_hot(classes, size, dtype=masses.dtype)
    return jnp.sum(one_hot * masses[..., None], axis=-2)


def _logits(logits, block):
    """Rows of logits, or a head whose kernel they are."""
    if block is None:
        return logits
    identity = jnp.eye(len(logits), dtype=logits.dtype)
    return jaxce.LinearLogits(identity, logits, block_bytes=4 * block * len(logits))


@functools.cache
def _everything(block, **options):
    """Losses, gradients by logits and masses, a forward derivative and a second derivative."""

    def all_of_it(logits, classes, masses, where):
        def losses(logits, masses):
            targets = jaxce.SparseTargets(classes, masses)
            return jaxce.cross_entropy(_logits(logits, block), targets, where=where, reduction="none", **options)

        def pushed(logits, masses):
            return jax.jvp(losses, (logits, masses), (jnp.ones_like(logits), jnp.ones_like(masses)))[1]

        def gradient(losses):
            return jax.grad(lambda *arrays: jnp.sum(losses(*arrays)), (0, 1))(logits, masses)

        return losses(logits, masses), pushed(logits, masses), gradient(losses), gradient(pushed)

    return unoptimized.jit(all_of_it)


BLOCKS = [None, 2]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_row_that_does_not_count_may_hold_anything(block):
    clean = _everything(block)(LOGITS, CLASSES, MASSES, WHERE)
    for garbage in (np.nan, np.inf):
        logits, masses, classes = LOGITS.copy(), MASSES.copy(), CLASSES.copy()
        masses[3], classes[3] = garbage, 99
        logits[3] = LOGITS[3] if block is not None else garbage  # of a head whose kernel is NaN nothing is left
        spoilt = _everything(block)(logits, classes, masses, WHERE)
        jax.tree.map(np.testing.assert_array_equal, spoilt, clean)
    assert not clean[2][0][3].any()
    assert not clean[2][1][3].any()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_wrong_class_is_loud_in_its_row_alone(block):
    good = _everything(block)(LOGITS, CLASSES, MASSES, WHERE)
    assert all(np.isfinite(result).all() for result in jax.tree.leaves(good))
    assert not good[2][1][2, 2]  # padding has no gradient
    is_wrong = np.arange(N) == 1
    for bad in (-1, C, -C, 2**31 - 1, -(2**31)):
        classes = CLASSES.copy()
        classes[1, 2] = bad
        losses, pushed, (d_logits, d_masses), _ = _everything(block)(LOGITS, classes, MASSES, WHERE)
        np.testing.assert_array_equal(np.isnan(losses), is_wrong)
        np.testing.assert_array_equal(losses[~is_wrong], good[0][~is_wrong])
        np.testing.assert_array_equal(np.isnan(pushed), is_wrong)
        if block is None:  # a kernel's gradient is a sum over the rows
            np.testing.assert_array_equal(np.isnan(d_logits).all(-1), is_wrong)
        np.testing.assert_array_equal(np.isnan(d_masses).all(-1), is_wrong)


@pytest.mark.parametrize("block", BLOCKS)
def test_classes_that_are_left_out(block):
    """A mass of 0 on a logit of −inf adds nothing and has no gradient; any other is an infinite loss."""
    logits = LOGITS.copy()
    logits[0, [2, 0]], logits[1, 1] = -np.inf, -np.inf
    if block is not None:
        logits = np.maximum(logits, -1e30)  # the products of a head are 0 · −inf
    masses = MASSES.copy()
    masses[0] = [0, 0, 0.5]
    losses, pushed, (d_logits, d_masses), second = _everything(block)(logits, CLASSES, masses, WHERE)
    p = np.exp(logits[0] - np.max(logits[0]))
    np.testing.assert_allclose(losses[0], -0.5 * np.log(p[5] / p.sum()), rtol=1e-6)
    assert losses[1] > 1e28
    assert np.isfinite(d_logits).all()
    assert np.isfinite(second[0]).all()
    assert np.isfinite(pushed[0])
    if block is None:
        assert not d_masses[0, :2].any()
        assert not d_logits[0, [2, 0]].any()


@pytest.mark.parametrize("block", BLOCKS)
def test_no_classes_at_all(block):
    result = _everything(block, z_loss=0.1)(LOGITS, CLASSES[:, :0], MASSES[:, :0], WHERE)
    nothing = np.zeros((N, C), np.float32)
    expected = jaxce.cross_entropy(LOGITS, nothing, where=WHERE, z_loss=0.1, reduction="none")
    np.testing.assert_allclose(result[0], expected, rtol=1e-6)
    losses, _, (d_logits, d_masses), _ = _everything(block)(LOGITS, CLASSES[:, :0], MASSES[:, :0], WHERE)
    assert not losses.any()
    assert not d_logits.any()
    assert d_masses.shape == (N, 0)


@pytest.mark.parametrize("block", [None, *(pytest.param(size, marks=pytest.mark.thorough) for size in (1, 3))])
def test_one_class_is_as_exact_as_its_label(block):
    """And of two the one that leads is within the bound of a label's."""
    others = np.array([0.0, -0.3, -1.1, -4.0, -0.7, -9.0])
    leads = np.concatenate([np.linspace(0, 70, 29), -np.logspace(-1, 4, 6)])
    rows = np.stack([np.insert(others, 3, lead) for lead in leads]).astype(np.float32)
    counts, tiny = np.ones(len(rows), bool), float(np.finfo(np.float32).tiny)
    for classes, masses in (([3], [1.0]), ([5, 3, 5], [0.0, 0.75, 0.0]), ([3, 1, -1], [0.75, 2.0**-40, 0.0])):
        listed = np.tile(np.array(classes, np.int32), (len(rows), 1)), np.tile(np.float32(masses), (len(rows), 1))
        losses, _, (gradients, d_masses), _ = _everything(block)(rows, *listed, counts)
        distributions = np.asarray(_distribution(*listed))
        for row, target, loss, gradient in zip(rows, distributions, np.asarray(losses), gradients, strict=True):
            lead = max(float(row[3]) - float(np.delete(row, 3).max()), 0)
            assert oracle.relative_error(loss, oracle.row(row, target)[1]) <= 1e-6 + 1.2e-7 * lead
            for c, true in enumerate(oracle.nll_gradient(row, target)):
                if abs(true) < tiny or (c == 1 and len(masses) > 1):  # p − t of a class without a lead
                    continue
                reach = lead if c == 3 else float(row.max() - row[c])
                assert oracle.relative_error(gradient[c], true) <= 1e-6 + 1.2e-7 * reach, (row, c)
        assert (np.asarray(losses) > 0).all()
        assert (np.asarray(d_masses)[:, classes.index(3)] > 0).all()


@pytest.mark.thorough
def test_every_shape_dtype_and_axis(x64):
    rng = np.random.default_rng(0)
    for rows, axis in (((), 0), ((2, 3), 1)):
        logits = rng.normal(size=(*rows, C))
        classes, masses = rng.integers(0, C, (*rows, K)), rng.uniform(size=(*rows, K))
        expected = jaxce.cross_entropy(logits, np.asarray(_distribution(classes, masses)), reduction="none")
        moved = np.moveaxis(logits, -1, axis)
        result = jaxce.cross_entropy(moved, jaxce.SparseTargets(classes, masses), axis=axis, reduction="none")
        assert result.shape == rows
        np.testing.assert_allclose(result, expected, rtol=1e-12)
    wide = rng.normal(size=(4, 200))
    classes = np.array([[199], [130], [0], [127]])
    expected = jaxce.cross_entropy(wide, classes[:, 0])
    for dtype in ("uint8", "int64", ">i8"):
        targets = jaxce.SparseTargets(classes.astype(dtype), np.ones((4, 1)))
        np.testing.assert_allclose(jaxce.cross_entropy(wide, targets), expected, rtol=1e-14)
    for logits, masses in (("bfloat16", "float32"), ("float8_e4m3fn", "float16")):
        arrays = jnp.asarray(LOGITS, logits), jnp.asarray(MASSES, masses)
        value, gradients = jax.jit(
            jax.value_and_grad(lambda z, m: jaxce.cross_entropy(z, jaxce.SparseTargets(CLASSES, m)), (0, 1))
        )(*arrays)
        assert value.dtype == jnp.float32
        assert [gradient.dtype for gradient in gradients] == [logits, masses]
        dense = jax.jit(jax.grad(lambda z, m: jaxce.cross_entropy(z, _distribution(CLASSES, m.astype("f"))), (0, 1)))
        for ours, theirs in zip(gradients, dense(*arrays), strict=True):
            np.testing.assert_allclose(ours.astype("f"), theirs.astype("f"), rtol=0.02, atol=0.01)


def test_second_derivatives_of_half_precision():
    """Their gradient is put together by its bits, and has a derivative."""

    def pushed(logits, targets_of):
        def gradient(logits, masses):
            return jax.grad(lambda z: jaxce.cross_entropy(z, targets_of(CLASSES, masses)))(logits)

        # That by the masses is there at the listed classes alone.
        tangents = jnp.ones_like(logits).at[:, 3].set(2), np.cos(MASSES)
        return jax.jvp(gradient, (logits, MASSES), tangents)[1]

    half, compiled = jnp.asarray(LOGITS, jnp.bfloat16), jax.jit(pushed, static_argnums=1)
    expected = compiled(half.astype("f"), _distribution)
    np.testing.assert_allclose(compiled(half.astype("f"), jaxce.SparseTargets), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(compiled(half, jaxce.SparseTargets).astype("f"), expected, rtol=0.05, atol=1e-3)
    assert abs(expected).max() > 0.01


def test_numpy_classes_are_checked_where_all_of_it_is_known():
    classes = CLASSES.copy()
    classes[3, 1] = 9
    message = r"^`targets.classes` must be class indices in \[0, 7\); got 9 at position \(3, 1\), where the mass is"
    targets = jaxce.SparseTargets(classes, MASSES)
    with pytest.raises(ValueError, match=message):
        jaxce.cross_entropy(LOGITS, targets)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda z: jaxce.summarize(_logits(z, 2), targets).nll)(LOGITS)
    assert jnp.isfinite(jaxce.cross_entropy(LOGITS, targets, where=WHERE))
    assert jnp.isnan(jaxce.cross_entropy(LOGITS, jaxce.SparseTargets(classes, jnp.asarray(MASSES))))
    assert jnp.isfinite(jaxce.cross_entropy(LOGITS, targets, where=jnp.asarray(WHERE)))
    wide = classes.astype(np.int64)
    wide[3, 1] = 2**32  # which 32 bits make a class of
    assert jnp.isnan(jaxce.cross_entropy(LOGITS, jaxce.SparseTargets(wide, jnp.asarray(MASSES))))


def test_padding_of_logits_and_summaries(x64):
    logits = np.pad(LOGITS.astype(float), ((0, 0), (0, 2)), constant_values=np.nan)
    targets = jaxce.SparseTargets(CLASSES, MASSES.astype(float))
    asked = {"class_vector": np.linspace(0, 1, C), "entropy": True, "argmax": True}
    padded = asked | {"class_vector": np.pad(asked["class_vector"], (0, 2))}
    summary = jaxce.summarize(logits, targets, num_classes=C, **padded)
    expected = jaxce.summarize(LOGITS.astype(float), np.asarray(_distribution(CLASSES, MASSES.astype(float))), **asked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), summary, expected)


ROWS, FEATURES, VOCABULARY, LISTED = 512, 64, 16384, 16


@pytest.mark.parametrize(
    ("recompute", "dtype"),
    daily([(r, d) for r in (True, False) for d in ("float32", "bfloat16")], [(True, "float32"), (False, "float32")]),
)
def test_temporaries_are_those_of_labels(recompute, dtype):
    hidden, kernel = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((ROWS, FEATURES), (FEATURES, VOCABULARY)))
    labels = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    listed = [jax.ShapeDtypeStruct((ROWS, LISTED), dtype) for dtype in (jnp.int32, jnp.float32)]

    def temporaries(loss, *arrays):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return step.lower(hidden, kernel, *arrays).compile().memory_analysis().temp_size_in_bytes

    how = {"recompute": recompute, "block_bytes": 2**22}
    of_labels = temporaries(lambda h, k, y: jaxce.linear_cross_entropy(h, k, y, **how), labels)
    of_listed = temporaries(
        lambda h, k, c, m: jaxce.linear_cross_entropy(h, k, jaxce.SparseTargets(c, m), **how), *listed
    )
    assert of_listed <= 1.1 * of_labels


def test_no_array_over_rows_and_classes_is_made_of_listed_ones():
    logits = jax.ShapeDtypeStruct((2048, 8192), jnp.float32)
    listed = [jax.ShapeDtypeStruct((2048, LISTED), dtype) for dtype in (jnp.int32, jnp.float32)]

    def loss(logits, classes, masses):
        return jaxce.cross_entropy(logits, jaxce.SparseTargets(classes, masses), label_smoothing=0.1, z_loss=1e-4)

    for function in (loss, jax.value_and_grad(loss, (0, 2))):
        compiled = jax.jit(function).lower(logits, *listed).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 0.05 * 2048 * 8192 * 4


@pytest.mark.parametrize("block", BLOCKS)
def test_a_mass_on_an_infinite_logit_is_as_in_the_distribution(block):
    """Of a class that the softmax leaves out, and in a row that is infinite itself."""
    logits = np.float32([[-np.inf, 0.0, 1.0], [np.inf, 0.0, 1.0], [0.0, 1.0, 2.0]])
    classes, masses = np.int32([[0, 1]] * 3), np.float32([[0.0, 1.0]] * 3)

    def losses(logits, targets):
        return jaxce.cross_entropy(_logits(logits, block), targets, reduction="none")

    by_masses = jax.grad(lambda m: jnp.sum(losses(logits, jaxce.SparseTargets(classes, m))))(masses)
    by_distribution = jax.grad(lambda q: jnp.sum(losses(logits, q)))(_distribution(classes, masses, 3))
    np.testing.assert_allclose(by_masses, by_distribution[:, :2], rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_beside_cross_entropy_take_listed_classes(reduction, rng):
    """A loss of one's own, and the expected cost of a mistake."""
    costs = rng.uniform(0, 1, (C, C)).astype(np.float32)
    weights = rng.uniform(1, 2, N).astype(np.float32)
    how = {"weights": weights, "where": WHERE, "reduction": reduction}

    def own(summary):
        return summary.nll**2 + summary.entropy

    losses = [
        lambda z, targets: jaxce.imbalance.expected_cost(z, targets, costs, **how),
        lambda z, targets: jaxce.custom_loss(own, z, targets, entropy=True, **how),
        lambda z, targets: jaxce.custom_loss(own, _logits(z, 2), targets, entropy=True, **how),
    ]

    @unoptimized.jit
    def both(logits, masses):
        def of(loss, targets_of):
            def total(logits, masses):
                losses = loss(logits, targets_of(CLASSES, masses))
                return jnp.sum(losses), losses

            return jax.grad(total, (0, 1), has_aux=True)(logits, masses)

        return [[of(loss, targets_of) for targets_of in (jaxce.SparseTargets, _distribution)] for loss in losses]

    for listed, expected in both(LOGITS, MASSES):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), listed, expected)
