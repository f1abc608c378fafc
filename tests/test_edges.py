"""Rows that are masked, empty, infinite or wrong: every one has one answer, and it stays in its row."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import unoptimized
from marks import daily, except_for
from oracle import relative_error

import jaxce

N, C = 4, 5
LOGITS = np.random.default_rng(2).normal(0, 2, (N, C)).astype(np.float32)
LABELS = np.array([1, 0, 4, 2], np.int32)
DISTRIBUTION = np.random.default_rng(3).dirichlet(np.ones(C), N).astype(np.float32)
CLASS_WEIGHTS = np.linspace(0.5, 2, C, dtype=np.float32)
WEIGHTS = np.array([1.0, 0.5, 2.0, 0.25], np.float32)
OFF_DIAGONAL = 1 - np.eye(C, dtype=np.float32)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01}

# Losses over classes as functions of logits, class weights and row weights; where and labels are the test's.
BY_LABEL = {
    "cross_entropy": lambda z, y, w, v, **kw: jaxce.cross_entropy(z, y, class_weights=w, weights=v, **OPTIONS, **kw),
    "focal_loss": lambda z, y, w, v, **kw: jaxce.focal_loss(z, y, class_weights=w, weights=v, gamma=0.5, **kw),
    "poly_loss": lambda z, y, w, v, **kw: jaxce.poly_loss(z, y, class_weights=w, weights=v, **kw),
    "nll_loss": lambda z, y, w, v, **kw: jaxce.nll_loss(z, y, class_weights=w, weights=v, **kw),
    "multi_margin_loss": lambda z, y, w, v, **kw: jaxce.multi_margin_loss(z, y, class_weights=w, weights=v, **kw),
}
# Of a true class, every mistake costs what the class weighs.
BY_LABEL["expected_cost"] = lambda z, y, w, v, **kw: jaxce.imbalance.expected_cost(
    z, y, (np.ones(C, np.float32) if w is None else w)[:, None] * OFF_DIAGONAL, weights=v, **kw
)
BY_ARRAY = {
    "cross_entropy of distributions": lambda z, t, v, **kw: jaxce.cross_entropy(
        z, t, class_weights=CLASS_WEIGHTS, weights=v, **OPTIONS, **kw
    ),
    "distillation_loss": lambda z, t, v, **kw: jaxce.distillation_loss(z, t, temperature=2.0, weights=v, **kw),
    "distillation_loss, mixed": lambda z, t, v, **kw: jaxce.distillation_loss(
        z, t, temperature=2.0, divergence="jensen_shannon", weights=v, **kw
    ),
    "expected_cost of distributions": lambda z, t, v, **kw: jaxce.imbalance.expected_cost(
        z, t, OFF_DIAGONAL, weights=v, **kw
    ),
}
BY_ELEMENT = {
    "binary_cross_entropy": lambda z, t, v, **kw: jaxce.binary_cross_entropy(z, t, weights=v, pos_weight=3.0, **kw),
    "binary_focal_loss": lambda z, t, v, **kw: jaxce.binary_focal_loss(z, t, weights=v, gamma=0.5, alpha=0.25, **kw),
    "mse_loss": lambda z, t, v, **kw: jaxce.mse_loss(z, t, weights=v, **kw),
    "l1_loss": lambda z, t, v, **kw: jaxce.l1_loss(z, t, weights=v, **kw),
}


def _derivatives(f):
    """Value, gradients, a forward derivative and a second derivative by the arguments, in one compilation."""

    def everything(*arguments):
        tangents = tuple(jnp.ones_like(argument) for argument in arguments)
        positions = tuple(range(len(arguments)))

        def pushed(*arguments):
            return jax.jvp(f, arguments, tangents)[1]

        return f(*arguments), jax.grad(f, positions)(*arguments), pushed(*arguments), jax.grad(pushed)(*arguments)

    return unoptimized.jit(everything)


def _with(array, index, value):
    """A copy of a NumPy array with a value put in."""
    array = np.array(array)
    array[index] = value
    return array


# --- masks


@pytest.mark.parametrize(
    "name",
    except_for(
        [*BY_LABEL, *BY_ARRAY, *BY_ELEMENT],
        ["focal_loss", "poly_loss", "l1_loss", "mse_loss", "nll_loss", "distillation_loss, mixed"],
    ),
)
def test_masked_rows_leak_nothing(name):
    """The masked row is full of garbage, its label out of range, its weight too: all is as if it were not there."""
    mask = np.array([True, False, True, True])
    keep = np.flatnonzero(mask)
    shape = LOGITS.shape if name in BY_ELEMENT else (N,)
    where = jnp.asarray(np.broadcast_to(mask[:, None] if name in BY_ELEMENT else mask, shape))
    weights = np.broadcast_to(WEIGHTS[:, None] if name in BY_ELEMENT else WEIGHTS, shape)
    if name in BY_LABEL:
        labels = np.where(mask, LABELS, 99)

        def masked(z, w, v):
            return BY_LABEL[name](z, jnp.asarray(labels), w, v, where=where)

        def subset(z, w, v):
            return BY_LABEL[name](z, jnp.asarray(labels[keep]), w, v)

        second_argument, by_row = CLASS_WEIGHTS, (True, False, True)
    else:
        loss = {**BY_ARRAY, **BY_ELEMENT}[name]

        def masked(z, t, v):
            return loss(z, t, v, where=where)

        def subset(z, t, v):
            return loss(z, t, v)

        second_argument, by_row = DISTRIBUTION, (True, True, True)

    arguments = (LOGITS, second_argument, weights)
    chosen = [array[keep] if rows else array for array, rows in zip(arguments, by_row, strict=True)]
    value_, gradients_, pushed_, second_ = _derivatives(subset)(*chosen)
    everything = _derivatives(masked)
    for garbage in (np.nan, np.inf, -np.inf):
        spoilt = [_with(array, 1, garbage) if rows else array for array, rows in zip(arguments, by_row, strict=True)]
        value, gradients, pushed, second = everything(*spoilt)
        np.testing.assert_allclose(value, value_, rtol=1e-6)
        np.testing.assert_allclose(pushed, pushed_, rtol=2e-5, atol=1e-6)
        for gradient, gradient_, rows in zip(gradients, gradients_, by_row, strict=True):
            np.testing.assert_allclose(gradient[keep] if rows else gradient, gradient_, rtol=2e-5, atol=1e-6)
            if rows:
                np.testing.assert_array_equal(gradient[1], 0)
        np.testing.assert_allclose(second[keep], second_, rtol=1e-4, atol=2e-6)
        np.testing.assert_array_equal(second[1], 0)


def test_masked_rows_of_a_summary_leak_nothing():
    logits, labels, where = _with(LOGITS, 1, np.nan), jnp.asarray(_with(LABELS, 1, 99)), np.arange(N) != 1

    def own_loss(z):
        summary = jaxce.summarize(z, labels, where=where, class_vector=jnp.ones(C))
        return jaxce.reduce_losses(summary.nll + 0.1 * summary.log_z + 0.1 * summary.spread, where=where)

    value, gradient = jax.jit(jax.value_and_grad(own_loss))(logits)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, C - 1, C, 255])
def test_ignore_index_is_where(ignore_index):
    labels = _with(LABELS, 2, ignore_index)

    @unoptimized.jit
    def both(labels):
        arguments = LOGITS, labels, CLASS_WEIGHTS, WEIGHTS
        losses = list(BY_LABEL.values())[:4]
        return [loss(*arguments, ignore_index=ignore_index) for loss in losses], [
            loss(*arguments, where=labels != ignore_index) for loss in losses
        ]

    ignored, masked = both(labels)
    np.testing.assert_allclose(ignored, masked, rtol=1e-6)
    assert np.all(np.isfinite(ignored))


def test_where_and_ignore_index_both_mask():
    labels = np.array([1, -1, 4, 2])
    where = np.array([True, True, False, True])
    losses = jaxce.cross_entropy(LOGITS, labels, ignore_index=-1, where=where, reduction="none")
    assert [bool(loss) for loss in losses] == [True, False, False, True]


@pytest.mark.parametrize("name", [*BY_LABEL, *BY_ARRAY, *BY_ELEMENT])
def test_mean_of_nothing_is_zero_with_zero_gradient(name):
    """Of an empty batch, where all is masked, and where all weights are 0."""
    loss = {**BY_LABEL, **BY_ARRAY, **BY_ELEMENT}[name]
    shape = (N, C) if name in BY_ELEMENT else (N,)
    targets = LABELS if name in BY_LABEL else DISTRIBUTION
    middle = (CLASS_WEIGHTS,) if name in BY_LABEL else ()

    @unoptimized.jit
    def everything(*arrays):
        def mean(z, weights, targets, where):
            return loss(z, targets, *middle, weights, where=where)

        of_mean = jax.value_and_grad(mean, (0, 1))
        return of_mean(*arrays), of_mean(*(array[:0] for array in arrays))

    for weights, where in ((1, False), (0, True)):
        weights, where = np.full(shape, weights, np.float32), np.full(shape, where)
        for value, gradients in everything(LOGITS, weights, targets, where):
            assert value == 0
            for gradient in gradients:
                np.testing.assert_array_equal(gradient, 0)


def test_weight_zero_multiplies():
    logits = np.array([[1.0, np.nan], [0.0, 1.0]], np.float32)
    labels = jnp.array([0, 0])
    assert jnp.isnan(jaxce.cross_entropy(logits, labels, weights=jnp.array([0.0, 1.0])))
    assert jnp.isfinite(jaxce.cross_entropy(logits, labels, where=jnp.array([False, True])))
    infinite = np.array([[-np.inf, 1.0], [0.0, 1.0]], np.float32)
    assert jnp.isnan(jaxce.cross_entropy(infinite, labels, weights=jnp.array([0.0, 1.0])))
    assert jnp.isnan(jaxce.cross_entropy(logits, labels, weights=jnp.zeros(2)))
    assert jnp.isinf(jaxce.reduce_losses(jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0])))


# --- labels


@pytest.mark.parametrize("name", BY_LABEL)
def test_wrong_label_is_loud_in_its_row_alone(name):
    @unoptimized.jit
    def everything(z, labels):
        def losses(z):
            return BY_LABEL[name](z, labels, CLASS_WEIGHTS, WEIGHTS, reduction="none")

        values, pushed = jax.jvp(losses, (z,), (jnp.ones((N, C)),))
        mean = BY_LABEL[name](z, labels, CLASS_WEIGHTS, WEIGHTS)
        return values, pushed, jax.grad(lambda z: losses(z).sum())(z), mean

    good = everything(LOGITS, LABELS)[0]
    assert np.all(np.isfinite(good))
    for bad in (-1, -C, C, C + 2, -100, 2**31 - 1):
        values, pushed, gradient, mean = map(np.asarray, everything(LOGITS, _with(LABELS, 2, bad)))
        np.testing.assert_allclose(values, np.where(np.arange(N) == 2, np.nan, good), rtol=1e-6)
        assert np.isnan(pushed).tolist() == [False, False, True, False]
        wrong = 1 if name == "nll_loss" else C  # the derivative of a picked score is its own alone
        assert np.isnan(gradient).sum(-1).tolist() == [0, 0, wrong, 0]
        assert np.isnan(mean)


def test_wrong_label_beside_an_ignored_one():
    labels = jnp.array([1, -100, -4, 2])
    losses = jaxce.cross_entropy(LOGITS, labels, ignore_index=-100, reduction="none")
    assert jnp.isnan(losses).tolist() == [False, False, True, False]
    assert losses[1] == 0


def test_wrong_numpy_label_is_an_error_at_once():
    labels = np.array([[1, 0], [7, 2]])
    logits = jnp.zeros((2, 2, C))
    with pytest.raises(ValueError, match=r"^`targets` must be class indices in \[0, 5\); got 7 at position \(1, 0\)\."):
        jaxce.cross_entropy(logits, labels)
    with pytest.raises(ValueError, match=r"got 7 at position \(1, 0\)"):
        jax.jit(lambda z: jaxce.cross_entropy(z, labels))(logits)
    assert jnp.isfinite(jaxce.cross_entropy(logits, labels, ignore_index=7))
    assert jnp.isfinite(jaxce.cross_entropy(logits, labels, where=labels < 5))


WIDE = [-(2**63), -(2**32), -(2**31) - 1, 2**31, 2**32 - 2, 2**32, 2**32 + 1, 2**63 - 1]
IGNORES = {
    **{
        name: lambda y, i, name=name: BY_LABEL[name](LOGITS, y, CLASS_WEIGHTS, WEIGHTS, ignore_index=i)
        for name in ("cross_entropy", "focal_loss", "poly_loss", "nll_loss")
    },
    "linear_cross_entropy": lambda y, i: jaxce.linear_cross_entropy(LOGITS, np.eye(C, dtype="f"), y, ignore_index=i),
    "torch.cross_entropy": lambda y, i: jaxce.torch.cross_entropy(LOGITS, y, ignore_index=i),
    "torch.nll_loss": lambda y, i: jaxce.torch.nll_loss(LOGITS, y, ignore_index=i),
    "torch.linear_cross_entropy": lambda y, i: jaxce.torch.linear_cross_entropy(
        LOGITS, np.eye(C, dtype="f"), y, ignore_index=i
    ),
}


@pytest.mark.parametrize("name", IGNORES)
def test_numpy_labels_are_ignored_before_they_are_cut_to_32_bits(name):
    labels, unsigned = np.array([1, 0, -100, 2]), np.array([1, 0, 2**64 - 1, 2], np.uint64)
    expected = IGNORES[name](labels, -100)
    traced = jax.jit(lambda: [IGNORES[name](_with(labels, 2, sentinel), sentinel) for sentinel in WIDE])()
    np.testing.assert_allclose(traced, np.full(len(WIDE), expected), rtol=1e-6)
    for sentinel in WIDE:
        np.testing.assert_allclose(IGNORES[name](_with(labels, 2, sentinel), sentinel), expected, rtol=1e-6)
        with pytest.raises(ValueError, match=f"got {sentinel} at position"):
            IGNORES[name](_with(labels, 2, sentinel), 7)
    np.testing.assert_allclose(IGNORES[name](unsigned, 2**64 - 1), expected, rtol=1e-6)


@pytest.mark.parametrize("sentinel", [*WIDE, -1, -2])
def test_numpy_labels_that_32_bits_do_not_hold_are_wrong_where_a_device_mask_counts_them(sentinel):
    labels, where = np.array([1, 2**40, sentinel, 2]), jnp.array([True, False, True, True])
    losses = jaxce.cross_entropy(LOGITS, labels, where=where, reduction="none")
    assert jnp.isnan(losses).tolist() == [False, False, True, False]
    losses = jaxce.cross_entropy(LOGITS, labels, where=where, ignore_index=sentinel, reduction="none")
    assert (losses != 0).tolist() == [True, False, False, True]
    assert jnp.all(jnp.isnan(jaxce.imbalance.class_counts(labels, C, where=where)))
    where = jnp.array([True, False, False, True])
    np.testing.assert_array_equal(jaxce.imbalance.class_counts(labels, C, where=where), [0, 1, 1, 0, 0])


@pytest.mark.parametrize("dtype", ["int2", "int4"])
def test_labels_of_a_few_bits(dtype):
    """XLA:CPU compares labels of 2 bits with −1 wrongly."""
    labels = np.array([1, 0, -1, 0, -1, 1, 0, 1])
    logits, where = np.float32(np.random.default_rng(4).normal(size=(8, 3))), labels >= 0

    def everything(labels):
        losses = [
            loss(logits, labels, ignore_index=-1, reduction="none")
            for loss in (jaxce.cross_entropy, jaxce.focal_loss, jaxce.nll_loss)
        ]
        return losses, jaxce.imbalance.class_counts(labels, 3, where=where)

    for wrap in (lambda f: f, jax.jit):
        losses, counts = wrap(everything)(jnp.asarray(labels, dtype))
        np.testing.assert_array_equal(losses, wrap(everything)(labels)[0])
        np.testing.assert_array_equal(counts, [3, 3, 0])


@pytest.mark.parametrize("dtype", ["int4", "uint8", "uint16", "uint32", "int32"])
def test_any_sentinel_that_the_labels_hold_is_ignored(dtype):
    sentinel = int(jnp.iinfo(dtype).max)
    labels = np.where(np.arange(N) == 2, sentinel, LABELS.astype(np.int64)).astype(jnp.dtype(dtype))
    expected = jaxce.cross_entropy(LOGITS, LABELS, where=np.arange(N) != 2)
    for array in (labels, jnp.asarray(labels)):
        np.testing.assert_array_equal(jaxce.cross_entropy(LOGITS, array, ignore_index=sentinel), expected)
        with pytest.raises(ValueError, match=f"^`ignore_index` must be a number that `targets` of dtype {dtype} can"):
            jaxce.cross_entropy(LOGITS, array, ignore_index=sentinel + 1)


def test_pytorchs_minus_100_ignores_nothing_among_bytes():
    labels = LABELS.astype(np.uint8)
    for loss in (jaxce.torch.cross_entropy, jaxce.torch.nll_loss):
        np.testing.assert_array_equal(loss(LOGITS, labels), loss(LOGITS, LABELS))
    eye = np.eye(C, dtype=np.float32)
    linear = jaxce.torch.linear_cross_entropy
    np.testing.assert_array_equal(linear(LOGITS, eye, labels), linear(LOGITS, eye, LABELS))


def test_numpy_integers_beyond_32_bits_do_not_wrap():
    large = 2**33 + 2**32
    vector, matrix = np.full(C, large), np.full((C, C), large)
    pairs = [
        (lambda x: jaxce.cross_entropy(LOGITS, LABELS, class_weights=x, reduction="sum"), vector),
        (lambda x: jaxce.summarize(LOGITS, LABELS, class_vector=x).spread, vector),
        (lambda x: jaxce.imbalance.expected_cost(LOGITS, LABELS, x), matrix),
        (lambda x: jaxce.imbalance.logit_adjustment(x), vector + np.arange(C)),
        (lambda x: jaxce.binary_cross_entropy(LOGITS, DISTRIBUTION, pos_weight=x), vector),
        (lambda x: jaxce.torch.binary_cross_entropy_with_logits(LOGITS, DISTRIBUTION, x), vector),
        (lambda x: jaxce.cross_entropy(LOGITS, LABELS, z_loss=x), large),
        (lambda x: jaxce.poly_loss(LOGITS, LABELS, epsilon=x), np.asarray(large)),
    ]
    for loss, integers in pairs:
        np.testing.assert_array_equal(loss(integers), loss(np.float32(integers)))


INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("dtype", daily(INTEGERS, ["int8", "uint64"]))
def test_any_integer_dtype_with_more_classes_than_it_holds(dtype, x64):
    logits, labels = np.random.default_rng(0).normal(size=(3, 300)), np.array([0, 100, 127])
    expected = _of_300_classes()(np.float32(logits), labels)
    step = jax.value_and_grad(functools.partial(jaxce.cross_entropy, ignore_index=99))
    same = functools.partial(step, targets=labels.astype(dtype))
    for value, gradient in (jax.jit(step)(np.float32(logits), jnp.asarray(labels, dtype)), same(np.float32(logits))):
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-5)


@functools.cache
def _of_300_classes():
    return jax.jit(jax.value_and_grad(jaxce.cross_entropy))


def test_wide_labels_do_not_wrap(x64):
    labels = jnp.array([2**32 + 1, 1], jnp.int64)
    assert jnp.isnan(jaxce.cross_entropy(jnp.zeros((2, 3)), labels, reduction="none")).tolist() == [True, False]
    labels = jnp.array([2**32 - 1, 1], jnp.uint32)
    assert jnp.isnan(jaxce.cross_entropy(jnp.zeros((2, 3)), labels, reduction="none")).tolist() == [True, False]


def test_wide_labels_of_a_device_do_not_wrap_where_x64_is_off_again():
    for bad in (2**32 + 1, -(2**63), 2**40):
        with jax.enable_x64(True):
            labels = jnp.array([1, bad, 4, 2])
        losses = jaxce.cross_entropy(LOGITS, labels, reduction="none")
        assert jnp.isnan(losses).tolist() == [False, True, False, False]
        ignored = jaxce.cross_entropy(LOGITS, labels, ignore_index=bad, reduction="none")
        np.testing.assert_array_equal(ignored, jnp.where(jnp.isnan(losses), 0, losses))
        assert jnp.all(jnp.isnan(jaxce.imbalance.class_counts(labels, C)))


# --- infinities


def test_class_of_minus_infinity_that_no_target_uses():
    logits, targets = _with(LOGITS, np.s_[:, 3], -np.inf), _with(DISTRIBUTION, np.s_[:, 3], 0)
    without = np.delete(LOGITS, 3, 1)
    for target, smaller in ((LABELS, np.array([1, 0, 3, 2])), (targets, np.delete(targets, 3, 1))):
        f = _derivatives(lambda z, t=target: jaxce.cross_entropy(z, t))(logits)
        f_ = _derivatives(lambda z, t=smaller: jaxce.cross_entropy(z, t))(without)
        np.testing.assert_allclose(f[0], f_[0], rtol=1e-6)
        np.testing.assert_array_equal(f[1][0][:, 3], 0)
        np.testing.assert_allclose(np.delete(f[1][0], 3, 1), f_[1][0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(np.delete(f[3], 3, 1), f_[3], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(f[3][:, 3], 0)
    by_target = np.asarray(jax.jit(jax.grad(jaxce.cross_entropy, 1))(logits, targets))
    np.testing.assert_array_equal(by_target[:, 3], 0)  # by convention
    assert np.all(np.isfinite(by_target))


def test_target_or_smoothing_on_minus_infinity():
    logits = np.array([[-np.inf, 1.0, 2.0]], np.float32)
    losses = [
        lambda z: jaxce.cross_entropy(z, jnp.array([0])),
        lambda z: jaxce.cross_entropy(z, jnp.array([[0.5, 0.5, 0.0]])),
        lambda z: jaxce.focal_loss(z, jnp.array([0])),
        lambda z: jaxce.poly_loss(z, jnp.array([0])),
        lambda z: jaxce.cross_entropy(z, jnp.array([1]), label_smoothing=0.1),
    ]
    weights = jnp.array([0.0, 1.0, 1.0])

    @unoptimized.jit
    def everything(z):
        no_weight = jaxce.cross_entropy(z, jnp.array([1]), label_smoothing=0.1, class_weights=weights)
        return [jax.value_and_grad(loss)(z) for loss in losses], no_weight

    results, no_weight = everything(logits)
    for value, gradient in results:
        assert value == np.inf
        assert np.all(np.isfinite(gradient))
    assert np.isfinite(no_weight)


@functools.cache
def _beside_a_row():
    """Losses, their gradient, and value and gradient without the second row, of three kinds of targets."""

    def of_kind(logits, targets):
        losses, pullback = jax.vjp(lambda z: jaxce.cross_entropy(z, targets, reduction="none"), logits)
        options = {"where": jnp.array([True, False]), "label_smoothing": 0.1}
        masked = jax.value_and_grad(lambda z: jaxce.cross_entropy(z, targets, **options))(logits)
        return losses, pullback(jnp.ones(2))[0], masked

    kinds = np.array([1, 1]), np.full((2, 3), 1 / 3, np.float32), np.eye(3, dtype=np.float32)[[1, 1]]
    return jax.jit(lambda logits: [of_kind(logits, targets) for targets in kinds])


@pytest.mark.parametrize("row", [[-np.inf] * 3, [np.inf, 0.0, 0.0], [np.nan, 0.0, 0.0]])
def test_rows_without_a_softmax_are_nan_alone(row):
    for losses, gradient, masked in _beside_a_row()(np.array([[1.0, 2.0, 0.0], row], np.float32)):
        assert np.isnan(losses).tolist() == [False, True]
        assert np.all(np.isfinite(gradient[0]))
        assert all(np.all(np.isfinite(x)) for x in masked)
        np.testing.assert_array_equal(masked[1][1], 0)


def test_debug_nans_does_not_trip_on_legal_input():
    logits, targets = _with(LOGITS, np.s_[:, 3], -np.inf), _with(DISTRIBUTION, np.s_[:, 3], 0)
    labels, confident = jnp.array([1, 0, 4, -100]), np.array([[90.0, 0.0], [0.0, 0.0]], np.float32)
    with jax.debug_nans(True):
        jax.value_and_grad(lambda z: jaxce.cross_entropy(z, labels, ignore_index=-100, z_loss=0.1))(logits)
        jax.value_and_grad(lambda z, t: jaxce.cross_entropy(z, t), (0, 1))(logits, targets)
        jax.value_and_grad(lambda z: jaxce.focal_loss(z, jnp.array([0, 0]), gamma=0.5))(confident)
        jax.value_and_grad(lambda z: jaxce.binary_cross_entropy(z, jnp.eye(2)))(confident)
        jax.value_and_grad(lambda z: jaxce.cross_entropy(z, LABELS, where=jnp.zeros(N, bool)))(LOGITS)
        jax.jit(jax.grad(lambda z: jaxce.cross_entropy(z, jnp.array([0, 1]))), donate_argnums=0)(jnp.array(confident))


# --- shapes, dtypes, settings


@pytest.mark.parametrize("shape", [(C,), (3, C), (3, C, 2), (3, C, 2, 2), (3, C, C)])
def test_any_rank_and_axis(shape, x64):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=shape)
    targets = rng.dirichlet(np.ones(C), logits[..., 0].shape if len(shape) == 1 else shape[:1] + shape[2:])
    rows = targets.shape[:-1]
    labels = rng.integers(0, C, rows)
    axis = min(1, len(shape) - 1)
    last = jnp.moveaxis(jnp.asarray(logits), axis, -1)
    expected = [
        jaxce.cross_entropy(last, target, class_weights=np.ones(C), reduction="none") for target in (labels, targets)
    ]
    moved = np.moveaxis(targets, -1, axis)
    for same_axis in (axis, axis - len(shape)):
        for target, losses in zip((labels, moved), expected, strict=True):
            result = jaxce.cross_entropy(logits, target, axis=same_axis, reduction="none")
            assert result.shape == rows
            np.testing.assert_allclose(result, losses, rtol=1e-13)
    log_p = np.asarray(jax.nn.log_softmax(last))
    np.testing.assert_allclose(expected[0], -np.take_along_axis(log_p, labels[..., None], -1)[..., 0], rtol=1e-12)


LOSSES = {
    **{name: lambda z, f=f: f(z, jnp.asarray(LABELS), None, None) for name, f in BY_LABEL.items()},
    **{name: lambda z, f=f: f(z, jnp.asarray(DISTRIBUTION), None) for name, f in {**BY_ARRAY, **BY_ELEMENT}.items()},
}


@pytest.mark.parametrize("name", LOSSES)
def test_dtypes_out(name, x64):
    for given in ("bfloat16", "float16", "float32", "float64"):
        value, gradient = jax.eval_shape(jax.value_and_grad(LOSSES[name]), jax.ShapeDtypeStruct((N, C), given))
        assert (value.dtype, gradient.dtype) == ("float64" if given == "float64" else "float32", given)
    assert LOSSES[name](jnp.asarray(LOGITS, "float16")).dtype == "float32"


FLOAT8 = ["float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn"]


@pytest.mark.parametrize("dtype", daily(FLOAT8, []))
def test_floats_without_an_infinity_or_a_zero(dtype):
    """Padding, masks and wrong labels put nothing into the logits' dtype that it does not have."""
    logits = jnp.asarray(2.0 ** np.random.default_rng(0).integers(0, 3, (N, C)), dtype)
    wide, labels, where = logits.astype(jnp.float32), jnp.array([1, 0, 9, 2]), jnp.array([True, True, False, True])
    good = jnp.where(where, labels, 0)
    other = logits[::-1]
    losses = [
        lambda z: jaxce.cross_entropy(z, labels, num_classes=4, where=where, label_smoothing=0.1),
        lambda z: jaxce.cross_entropy(z, other, num_classes=4, where=where),
        lambda z: jaxce.cross_entropy(other, z, num_classes=4, where=where),
        lambda z: jaxce.distillation_loss(z, other, num_classes=4, where=where),
        lambda z: jaxce.focal_loss(z, good, where=where, num_classes=4),
        lambda z: jaxce.nll_loss(z, labels, where=where),
        lambda z: jaxce.multi_margin_loss(z, labels, where=where),
        lambda z: jaxce.imbalance.expected_cost(z, labels, OFF_DIAGONAL, where=where),
        lambda z: jaxce.binary_cross_entropy(z, other / other, weights=other, where=other > 1),
        lambda z: jaxce.mse_loss(z, other, where=other > 1),
        lambda z: jaxce.reduce_losses(z, other, where=other > 1),
        lambda z: jaxce.summarize(z, labels, num_classes=4, where=where).log_z.sum(),
    ]
    everything = jax.jit(lambda z: [jax.value_and_grad(loss)(z) for loss in losses])
    for (value, gradient), (expected, wide_gradient) in zip(everything(logits), everything(wide), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert gradient.dtype == dtype
        if dtype != "float8_e8m0fnu":  # which has nothing negative, and no 0
            np.testing.assert_array_equal(gradient.astype("f"), wide_gradient.astype(dtype).astype("f"))
    assert np.isnan(jaxce.cross_entropy(logits, labels, reduction="none")).tolist() == [False, False, True, False]
    expected = jaxce.cross_entropy(wide @ jnp.ones((C, 7)), good)
    for kernel in (jnp.ones((C, 7), dtype), jnp.ones((C, 7))):
        np.testing.assert_allclose(jaxce.linear_cross_entropy(logits, kernel, good), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_softcap_that_changes_nothing_changes_nothing(dtype):
    hidden = jnp.asarray(LOGITS, dtype).at[0, 0].set(1e-30)
    kernel = jnp.eye(C, dtype=dtype)

    @unoptimized.jit
    def everything(softcap):
        def loss(hidden, softcap):
            return jaxce.linear_cross_entropy(hidden, kernel, LABELS, softcap=softcap)

        return jax.value_and_grad(loss, (0, 1))(hidden, softcap)

    plain = jax.jit(jax.value_and_grad(lambda h: jaxce.linear_cross_entropy(h, kernel, LABELS)))(hidden)
    for softcap in (1e6, 1e20, 3e38, np.float32(np.inf)):
        value, (gradient, by_softcap) = everything(jnp.float32(softcap))
        np.testing.assert_array_equal(value, plain[0])
        np.testing.assert_allclose(gradient, plain[1], rtol=1e-6)
        assert abs(by_softcap) < 1e-15
    for softcap in (10**30, 3e38, 1e300):
        np.testing.assert_array_equal(
            jaxce.linear_cross_entropy(hidden, kernel, LABELS, softcap=softcap, block_bytes=4 * N), plain[0]
        )


def test_derivative_by_a_large_softcap(x64):
    """By 50 digits: tanh x − x (1 − tanh² x) is (2/3) x³ where x is small, and rounds to 0 as it stands."""
    hidden, kernel = np.array([[1.0, -2.0, 0.5]]), np.eye(3)
    for softcap in (3.0, 1e2, 1e3, 1e7, 1e9):
        value = jax.grad(lambda c: jaxce.linear_cross_entropy(hidden, kernel, np.array([0]), softcap=c))(softcap)
        x = [mpmath.mpf(z) / mpmath.mpf(softcap) for z in hidden[0]]
        slopes = [mpmath.tanh(r) - r * (1 - mpmath.tanh(r) ** 2) for r in x]
        e = [mpmath.exp(mpmath.mpf(softcap) * mpmath.tanh(r)) for r in x]
        exact = mpmath.fsum(p / mpmath.fsum(e) * s for p, s in zip(e, slopes, strict=True)) - slopes[0]
        assert relative_error(value, exact) < 1e-9


def test_arrays_of_any_layout():
    logits, distribution = LOGITS.astype(">f4"), np.asfortranarray(DISTRIBUTION[::-1])[::-1].astype(">f8")
    logits.flags.writeable = False
    expected = jaxce.cross_entropy(LOGITS, LABELS, class_weights=CLASS_WEIGHTS, weights=WEIGHTS, label_smoothing=0.1)
    swapped = jaxce.cross_entropy(
        logits,
        np.repeat(LABELS, 2)[::2].astype(">i8"),
        class_weights=CLASS_WEIGHTS.astype(">f8"),
        weights=WEIGHTS.astype(">f2"),
        label_smoothing=np.array(0.1, ">f8"),
    )
    np.testing.assert_array_equal(swapped, expected)
    np.testing.assert_array_equal(jaxce.cross_entropy(logits, distribution), jaxce.cross_entropy(LOGITS, DISTRIBUTION))
    np.testing.assert_array_equal(jaxce.l1_loss(logits, distribution), jaxce.l1_loss(LOGITS, DISTRIBUTION))
    smoothed = [jaxce.cross_entropy(LOGITS, LABELS, label_smoothing=e) for e in (np.longdouble(0.1), 0.1)]
    assert smoothed[0] == smoothed[1]
    np.testing.assert_array_equal(
        jaxce.imbalance.class_weights(np.array([3, 1, 2], ">i8")), jaxce.imbalance.class_weights(np.array([3, 1, 2]))
    )


def test_scalar_settings_never_widen(x64):
    def losses(setting):
        yield jaxce.cross_entropy(LOGITS, LABELS, label_smoothing=setting, z_loss=setting)
        yield jaxce.focal_loss(LOGITS, LABELS, gamma=setting)
        yield jaxce.binary_cross_entropy(LOGITS, DISTRIBUTION, pos_weight=setting)

    for setting in (0.1, np.float64(0.1), jnp.asarray(0.1, jnp.float64)):
        for loss in jax.eval_shape(lambda setting=setting: [*losses(setting)]):
            assert loss.dtype == jnp.float32
    assert jaxce.cross_entropy(LOGITS, LABELS, label_smoothing=np.float64(0.1)).dtype == jnp.float32


def test_gradients_come_in_the_dtype_of_their_argument():
    shapes = [jax.ShapeDtypeStruct((N, C), dtype) for dtype in ("bfloat16", "float16")]
    shapes += [jax.ShapeDtypeStruct((length,), "bfloat16") for length in (C, N)]

    def loss(z, t, w, v):
        return jaxce.cross_entropy(z, t, class_weights=w, weights=v, label_smoothing=0.1)

    gradients = jax.eval_shape(jax.grad(loss, (0, 1, 2, 3)), *shapes)
    assert [g.dtype.name for g in gradients] == ["bfloat16", "float16", "bfloat16", "bfloat16"]


def test_distributions_need_not_sum_to_one(x64):
    targets = np.array([[0.0, 0, 0], [2.0, 1, 0.5], [-0.5, 0.2, 1]])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
    value, gradient = jax.value_and_grad(lambda z: jaxce.cross_entropy(z, targets, reduction="sum"))(logits)
    p = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(value, -(targets * np.log(p)).sum(), rtol=1e-13)
    np.testing.assert_allclose(gradient, targets.sum(-1, keepdims=True) * p - targets, atol=1e-14)


def test_label_smoothing_of_one_and_a_smoothing_that_is_traced(x64):
    logits = jnp.asarray(LOGITS, jnp.float64)
    uniform = jnp.full((N, C), 1 / C)
    loss = jax.jit(lambda e: jaxce.cross_entropy(logits, jnp.asarray(LABELS), label_smoothing=e))
    np.testing.assert_allclose(loss(1.0), jaxce.cross_entropy(logits, uniform), rtol=1e-13)
    np.testing.assert_allclose(loss(0.0), jaxce.cross_entropy(logits, jnp.asarray(LABELS)), rtol=1e-13)


def test_z_loss_has_the_divisor_of_the_rest(x64):
    logits = jnp.asarray(LOGITS, jnp.float64)
    labels = jnp.array([1, 0, -100, 2])
    options = {"class_weights": CLASS_WEIGHTS.astype(float), "weights": WEIGHTS.astype(float), "ignore_index": -100}
    z_part = jaxce.cross_entropy(logits, labels, z_loss=1.0, label_smoothing=0.1, **options) - jaxce.cross_entropy(
        logits, labels, label_smoothing=0.1, **options
    )
    share = np.where(labels >= 0, WEIGHTS * CLASS_WEIGHTS[np.maximum(labels, 0)], 0).astype(float)
    expected = (share * np.asarray(jax.nn.logsumexp(logits, axis=-1)) ** 2).sum() / share.sum()
    np.testing.assert_allclose(z_part, expected, rtol=1e-12)
