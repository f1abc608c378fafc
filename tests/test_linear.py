"""The linear head is the dense loss: values and all gradients, by both ways, in blocks of any size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from jax.extend.mlir import ir
from lazy import linear, linear_distillation
from marks import daily
from modes import all_modes, plain_modes

import jaxce

N, D, E, V = 7, 5, 3, 11
RNG = np.random.default_rng(3)
LABELS = RNG.integers(0, V, N)
LISTED = RNG.integers(0, V, (N, 4))
LISTED[:, 3] = LISTED[:, 0]  # once more
WHERE = np.arange(N) != 2
# Logits of a spread of 1 to 3: among larger ones a phantom class would be invisible.
ARRAYS = {
    "hidden": RNG.normal(size=(N, D)),
    "kernel": RNG.normal(size=(D, V)),
    "bias": RNG.normal(size=V),
    "softcap": np.array(3.0),
    "temperatures": RNG.uniform(0.5, 2, N),
    "weights": RNG.uniform(0.5, 2, N),
    "class_weights": RNG.uniform(0.5, 2, V),
    "label_smoothing": np.array(0.1),
    "z_loss": np.array(0.05),
    "masses": RNG.uniform(0.1, 1, (N, 4)),
    "targets": RNG.uniform(0.1, 1, (N, V)),
    "gamma": np.array(1.5),
    "epsilon": np.array(0.7),
    "teacher_hidden": RNG.normal(size=(N, E)),
    "teacher_kernel": RNG.normal(size=(E, V)),
    "teacher_bias": RNG.normal(size=V),
    "teacher_softcap": np.array(2.0),
    "teacher_temperatures": RNG.uniform(0.5, 2, N),
    "temperature": np.array(1.5),
    "mixture": np.array(0.3),
}
HEAD = {"hidden", "kernel", "bias", "softcap", "temperatures"}
SETTINGS = ["bias", "softcap", "temperatures", "weights", "class_weights", "label_smoothing", "z_loss", "where"]
SETTINGS += ["ignore_index"]
HEAD_SETTINGS = SETTINGS[:3]
TEACHER = ["teacher_hidden", "teacher_kernel", "temperature"]
TWO_HEADS = [*TEACHER, *HEAD_SETTINGS, *(f"teacher_{name}" for name in HEAD_SETTINGS), "weights", "where"]

# The loss, and the names of its options, by the name of a case.
ALONE = {
    f"{name}, {target}": ("cross_entropy", [name, target]) for name in SETTINGS for target in ("labels", "targets")
}
del ALONE["ignore_index, targets"]
MIXED = {
    "labels": ("cross_entropy", ["labels"]),
    "distributions": ("cross_entropy", ["targets"]),
    "all, labels": ("cross_entropy", [*SETTINGS, "labels"]),
    "all, distributions": ("cross_entropy", [*SETTINGS[:-1], "targets"]),
    "all, listed": ("cross_entropy", [*SETTINGS[:-1], "masses"]),
    "half, labels": ("cross_entropy", ["bias", "temperatures", "class_weights", "label_smoothing", "where", "labels"]),
    "half, distributions": ("cross_entropy", ["softcap", "class_weights", "z_loss", "weights", "targets"]),
    "focal": ("focal_loss", ["gamma", "softcap", "class_weights", "where", "labels"]),
    "poly": ("poly_loss", ["epsilon", "bias", "weights", "ignore_index", "labels"]),
    "distillation": ("distillation_loss", TEACHER),
    "distillation, all": ("distillation_loss", TWO_HEADS),
    "reverse": ("distillation_loss", [*TWO_HEADS, "reverse"]),
    "jensen_shannon": ("distillation_loss", [*TWO_HEADS, "mixture", "jensen_shannon"]),
}
CASES = ALONE | MIXED


def _options(names):
    options = {"where": jnp.asarray(WHERE)} if "where" in names else {}
    options |= {"divergence": names[-1]} if names[-1] in ("reverse", "jensen_shannon") else {}
    return options | ({"ignore_index": int(LABELS[0])} if "ignore_index" in names else {})


def _logits(hidden, kernel, bias=None, softcap=None, temperatures=None):
    logits = hidden @ kernel if bias is None else hidden @ kernel + bias[None]
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return logits if temperatures is None else logits / temperatures[:, None]


def _dense(loss, arguments, options):
    student = {name: arguments[name] for name in arguments if name in HEAD}
    teacher = {name[8:]: arguments[name] for name in arguments if name.startswith("teacher_")}
    rest = {name: array for name, array in arguments.items() if name not in HEAD and not name.startswith("teacher_")}
    targets = _logits(**teacher) if teacher else rest.pop("targets", LABELS)
    if "masses" in rest:
        targets = jnp.sum(jax.nn.one_hot(LISTED, V) * rest.pop("masses")[..., None], 1)
    return getattr(jaxce, loss)(_logits(**student), targets, **rest, **options)


def _linear(loss, arguments, options):
    targets = {} if "teacher_hidden" in arguments or "targets" in arguments else {"targets": LABELS}
    if "masses" in arguments:
        arguments = {**arguments}
        targets = {"targets": jaxce.SparseTargets(LISTED, arguments.pop("masses"))}
    of_head = linear_distillation if loss == "distillation_loss" else linear(getattr(jaxce, loss))
    return of_head(**arguments, **targets, **options)


def _arguments(names):
    return {name: jnp.asarray(ARRAYS[name]) for name in ("hidden", "kernel", *names) if name in ARRAYS}


def _assert_close(results, expected, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), results, expected)


@pytest.mark.parametrize("name", daily(CASES, ["all, labels", "distillation"]))
def test_both_ways_equal_the_dense_loss(name, x64, request):
    """Blocks of 1, of a prime, of V−1, V, V+1 and 2V classes, and of so many rows: all in one compiled function.

    Every day, of one that leaves a rest.
    """
    loss, names = CASES[name]
    arguments, options = _arguments(names), _options(names)
    cotangent = jnp.asarray(RNG.normal(size=N))

    def sum_of(losses):
        return jnp.vdot(cotangent, losses)

    expected = unoptimized.jit(jax.value_and_grad(lambda a: _dense(loss, a, options)))(arguments)
    of_rows = unoptimized.jit(jax.value_and_grad(lambda a: sum_of(_dense(loss, a, options | {"reduction": "none"}))))(
        arguments
    )
    blocks: tuple[int, ...] = (3,)
    if request.config.getoption("--thorough"):
        blocks = (1, 3, V - 1, V, V + 1, 2 * V) if name in MIXED else (3, V + 1)

    @unoptimized.jit
    def results(arguments):
        by_blocks = {}
        for size in blocks:
            for recompute, bytes_of_one in ((True, 4 * N), (False, 4 * V)):
                how = options | {"recompute": recompute, "block_bytes": size * bytes_of_one}
                by_blocks[size, recompute] = jax.value_and_grad(lambda a, how=how: _linear(loss, a, how))(arguments)
        if name in ALONE:
            return by_blocks, of_rows
        how = options | {"block_bytes": 3 * 4 * N, "reduction": "none"}
        return by_blocks, jax.value_and_grad(lambda a: sum_of(_linear(loss, a, how)))(arguments)

    by_blocks, by_rows = results(arguments)
    for result in by_blocks.values():
        _assert_close(result, expected)
    _assert_close(by_rows, of_rows)


TWICE = ["half, labels", "all, labels", "all, listed", "distillation, all", "reverse", "jensen_shannon"]


@pytest.mark.parametrize("name", daily(TWICE, ["half, labels"]))
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_every_mode_works_and_falls_over_to_recomputing(name, recompute, x64):
    loss, names = CASES[name]
    arguments, options = _arguments(names), _options(names)
    direction = jax.tree.map(lambda array: jnp.asarray(RNG.normal(size=array.shape)), arguments)

    rows = jnp.stack([arguments["hidden"], 1.1 * arguments["hidden"]])

    def of_rows(f):
        return jax.vmap(lambda hidden: jax.grad(f)(arguments | {"hidden": hidden}))(rows)

    def dense(a):
        return _dense(loss, a, options)

    def of_head(a):
        how = {"recompute": recompute, "block_bytes": 3 * 4 * (N if recompute else V)}
        return _linear(loss, a, options | how)

    chosen = ("value", "jvp", "fwd over rev", "rev over rev", "scan of checkpoint")
    results = unoptimized.jit(lambda *a: (all_modes(of_head, chosen)(*a), of_rows(of_head)))
    expected = unoptimized.jit(lambda *a: (plain_modes(dense, chosen)(*a), of_rows(dense)))
    _assert_close(results(arguments, direction), expected(arguments, direction), 1e-9)


BESIDE = [(lazy, name) for lazy in ("student", "held_student") for name in ("forward", "reverse", "jensen_shannon")]


@pytest.mark.parametrize(("lazy", "divergence"), daily(BESIDE, []))
def test_lazy_logits_beside_held_ones(lazy, divergence, x64):
    """A row that does not count holds garbage on both sides; padding does too where it is held."""
    held = jnp.asarray(RNG.normal(size=(N, V))).at[2].set(jnp.nan).at[:, -1].set(jnp.inf)
    hidden, kernel = jnp.asarray(ARRAYS["hidden"]).at[2].set(jnp.inf), jnp.asarray(ARRAYS["kernel"])
    where = jnp.arange(N) != 2

    def loss(of_head, held, temperature, **options):
        pair = (of_head, held) if lazy == "student" else (held, of_head)
        options |= {"where": where, "num_classes": V - 1, "divergence": divergence, "mixture": 0.3}
        return jaxce.distillation_loss(*pair, temperature=temperature, **options)

    def of_rows(f):
        """The gradients of a sum in which every row has a weight of its own."""
        weights = jnp.linspace(0.5, 2, N)
        return jax.value_and_grad(lambda *a: jnp.vdot(weights, f(*a, reduction="none")), (0, 1, 2, 3))

    def dense(hidden, kernel, held, temperature, **options):
        return loss(jnp.where(where[:, None], hidden, 0) @ kernel / 2, held, temperature, **options)

    def in_blocks(hidden, kernel, held, temperature, recompute=True, **options):
        how = {"temperature": 2.0, "recompute": recompute, "block_bytes": 3 * 4 * (N if recompute else V)}
        return loss(jaxce.LinearLogits(hidden, kernel, **how), held, temperature, **options)

    @unoptimized.jit
    def everything(*arguments):
        mean, made_forward = (
            jax.value_and_grad(functools.partial(in_blocks, recompute=recompute), (0, 1, 2, 3))(*arguments)
            for recompute in (True, False)
        )
        expected = jax.value_and_grad(dense, (0, 1, 2, 3))(*arguments)
        return [mean, made_forward, of_rows(in_blocks)(*arguments)], [expected, expected, of_rows(dense)(*arguments)]

    results, expected = everything(hidden, kernel, held, 1.5)
    _assert_close(results, expected)
    for _, gradients in results:
        assert not gradients[0][2].any()
        assert not gradients[2][2].any()


def test_reductions_shapes_and_summary_agree_with_the_dense_loss(x64):
    kernel, vector = ARRAYS["kernel"], ARRAYS["class_weights"]
    hidden, labels = RNG.normal(size=(2, 3, D)), np.array([[1, 2, 3], [0, 1, -1]])
    summary = {"class_vector": vector, "where": labels != -1}

    @unoptimized.jit
    def everything(hidden, kernel):
        def reduced(loss, *arrays, **how):
            return {
                reduction: loss(*arrays, labels, ignore_index=-1, reduction=reduction, **how)
                for reduction in ("none", "sum", "mean", "parts")
            }

        logits, head = hidden @ kernel, (hidden, kernel)
        dense = reduced(jaxce.cross_entropy, logits)
        dense |= {"summary": jaxce.summarize(logits, np.abs(labels), **summary)._asdict()}
        dense |= {"row": jaxce.cross_entropy(logits[0, 0], labels[0, 0])}
        of_head = {
            recompute: reduced(jaxce.linear_cross_entropy, *head, recompute=recompute, block_bytes=100)
            for recompute in (True, False, None)
        }
        of_summary = linear(jaxce.summarize)(*head, np.abs(labels), block_bytes=100, **summary)._asdict()
        rest = {"summary": of_summary, "row": jaxce.linear_cross_entropy(hidden[0, 0], kernel, labels[0, 0])}
        return [of_reductions | rest for of_reductions in of_head.values()], dense

    results, expected = everything(hidden, kernel)
    for result in results:
        assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, expected)
        _assert_close(result, expected)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_row_that_does_not_count_may_hold_anything(recompute):
    hidden, kernel, bias = (np.float32(ARRAYS[name]) for name in ("hidden", "kernel", "bias"))
    hidden[2] = np.nan

    temperatures = np.float32(ARRAYS["temperatures"])
    temperatures[2] = np.nan

    def loss(hidden, kernel, bias, softcap, temperatures, where):
        return jaxce.linear_cross_entropy(
            hidden,
            kernel,
            LABELS,
            bias=bias,
            softcap=softcap,
            temperature=temperatures,
            where=where,
            recompute=recompute,
            block_bytes=100,
        )

    everything = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))
    rest = kernel, bias, np.float32(3)
    value, gradients = everything(hidden, *rest, temperatures, WHERE)
    assert not gradients[0][2].any()
    assert not gradients[4][2].any()
    clean, calm = hidden.copy(), temperatures.copy()
    clean[2], calm[2] = 0, 1
    jax.tree.map(np.testing.assert_array_equal, (value, gradients), everything(clean, *rest, calm, WHERE))
    value, gradients = everything(hidden, *rest, temperatures, np.zeros(N, bool))
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("recompute", [True, False])
def test_edges(recompute, x64):
    """Absent classes, wrong labels and empty batches, as in the dense loss."""
    hidden, kernel, bias = (ARRAYS[name].copy() for name in ("hidden", "kernel", "bias"))
    bias[3:6] = -np.inf  # a block of nothing
    labels = np.where(np.isin(LABELS, (3, 4, 5)), 0, LABELS)
    how = {"recompute": recompute, "block_bytes": 3 * 4 * (N if recompute else V)}

    @unoptimized.jit
    def everything(hidden, kernel, bias, wrong):
        def of_head(h, k, labels=labels, **options):
            return jaxce.linear_cross_entropy(h, k, labels, **how, **options)

        def dense(h, k):
            return jaxce.cross_entropy(h @ k + bias[None], labels)

        absent = jax.value_and_grad(functools.partial(of_head, bias=bias), (0, 1))(hidden, kernel)
        losses = of_head(hidden, kernel, wrong, reduction="none")
        gradient = jax.grad(of_head)(hidden, kernel, wrong)
        empty = jax.value_and_grad(of_head, 1)(hidden[:0], kernel, labels[:0])
        return absent, jax.value_and_grad(dense, (0, 1))(hidden, kernel), losses, gradient, empty

    wrong = np.where(np.arange(N) == 1, V, labels)
    absent, expected, losses, gradient, empty = everything(hidden, kernel, bias, wrong)
    _assert_close(absent, expected)
    assert np.isnan(losses).tolist() == [row == 1 for row in range(N)]
    assert np.isnan(gradient[1]).all()
    assert empty[0] == 0
    assert not empty[1].any()


def _matmul_flops(function, *arguments):
    """2 · M · N · K of every matrix multiplication, times the lengths of the loops that it is in."""
    module = jax.jit(function).lower(*arguments).compiler_ir()
    functions = {ir.StringAttr(each.attributes["sym_name"]).value: each for each in module.body.operations}

    def of_calls(operations):
        return sum(of_one(each.operation) for each in operations)

    def of_one(operation):
        inner = [of_calls(block) for region in operation.regions for block in region.blocks]
        if operation.name == "stablehlo.dot_general":
            # M · K, K · N and M · N are the sizes of the operands and the result.
            values = *operation.operands, *operation.results
            return 2 * math.isqrt(math.prod(math.prod(ir.RankedTensorType(value.type).shape) for value in values))
        if operation.name == "func.call":
            callee = functions[ir.FlatSymbolRefAttr(operation.attributes["callee"]).value]
            return of_calls(callee.regions[0].blocks[0])
        if operation.name == "stablehlo.while":
            (compare,) = (each for each in operation.regions[0].blocks[0] if each.operation.name == "stablehlo.compare")
            length = ir.DenseIntElementsAttr(compare.operands[1].owner.attributes["value"])[0]
            return length * sum(inner)
        return sum(inner)

    return of_calls(functions["main"].regions[0].blocks[0])


@pytest.mark.parametrize("vocabulary", [12, 11])
def test_matrix_multiplications(vocabulary):
    hidden, kernel = jnp.ones((6, D)), jnp.ones((D, vocabulary))
    labels = jnp.zeros(6, jnp.int32)
    one = 2 * 6 * D * vocabulary

    def count(function):
        return _matmul_flops(function, hidden, kernel) / one

    for recompute, wanted, one_block in ((True, 4, 6), (False, 3, vocabulary)):

        def loss(h, k, recompute=recompute, one_block=one_block):
            return jaxce.linear_cross_entropy(h, k, labels, recompute=recompute, block_bytes=16 * one_block)

        assert count(loss) == 1
        assert count(jax.grad(loss, argnums=(0, 1))) == wanted

    def of_softmax(h, k):
        logits = jaxce.LinearLogits(h, k, block_bytes=16 * 6)
        summary = jaxce.summarize(logits, labels, entropy=True, argmax=True)
        return jnp.sum(summary.entropy * summary.argmax.astype(jnp.float32))

    assert count(of_softmax) == 1
    assert count(jax.grad(of_softmax, argnums=(0, 1))) == 4


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_matrix_multiplications_of_two_heads(divergence):
    arrays = [jnp.ones(shape) for shape in ((6, 2), (2, 12), (6, 2), (2, 12))]

    def count(recompute, function):
        how = {"recompute": recompute, "block_bytes": 96, "divergence": divergence}
        return _matmul_flops(function(functools.partial(linear_distillation, **how)), *arrays) / (2 * 6 * 2 * 12)

    passes = 2 if divergence == "jensen_shannon" else 1
    assert count(True, lambda loss: loss) == 2 * passes
    assert count(True, lambda loss: jax.grad(loss, (0, 1, 2, 3))) == 2 * (passes + 3)
    assert count(False, lambda loss: jax.grad(loss, (0, 1, 2, 3))) == 2 * 3


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("vocabulary", [50257, pytest.param(131072, marks=pytest.mark.thorough)])
def test_bfloat16_is_as_exact_as_dense_float32_logits(vocabulary, recompute, x64, rng):
    dtype = jnp.bfloat16
    rows, width = 32, 16
    hidden = jnp.asarray(rng.normal(size=(rows, width)), dtype)
    kernel = jnp.asarray(2 * rng.normal(size=(width, vocabulary)) / width**0.5, dtype)
    labels = jnp.asarray(rng.integers(0, vocabulary, rows))

    def of_head(h, k):
        return jaxce.linear_cross_entropy(h, k, labels, recompute=recompute, block_bytes=2**20)

    def dense(h, k):
        return jaxce.cross_entropy(jnp.matmul(h, k, preferred_element_type=jnp.float32), labels)

    def both(h, k):
        return jax.value_and_grad(of_head, argnums=(0, 1))(h, k), jax.value_and_grad(dense, argnums=(0, 1))(h, k)

    exact = jax.jit(jax.value_and_grad(lambda h, k: jaxce.cross_entropy(h @ k, labels), argnums=(0, 1)))(
        hidden.astype(jnp.float64), kernel.astype(jnp.float64)
    )
    result, plain = jax.jit(both)(hidden, kernel)
    assert result[0].dtype == jnp.float32
    assert all(gradient.dtype == dtype for gradient in result[1])
    resolution = float(jnp.finfo(dtype).eps)
    for ours, theirs, truth, table in zip(
        jax.tree.leaves(result),
        jax.tree.leaves(plain),
        jax.tree.leaves(exact),
        (1e-6, resolution, resolution),
        strict=True,
    ):

        def error(values, truth=truth):
            return float(jnp.linalg.norm(values.astype(jnp.float64) - truth) / jnp.linalg.norm(truth))

        assert error(ours) <= error(theirs) + table


def test_the_precision_of_the_multiplications_is_the_callers(x64):
    def precisions(function):
        text = jax.jit(function).lower(jnp.ones((6, D)), jnp.ones((D, V))).as_text()
        return text.count("stablehlo.dot_general"), text.count("precision = [HIGHEST, HIGHEST]")

    for recompute in (True, False):

        def loss(h, k, recompute=recompute):
            with jax.default_matmul_precision("highest"):  # and not around what lowers it
                return jaxce.linear_cross_entropy(h, k, jnp.zeros(6, int), recompute=recompute)

        dots, highest = precisions(jax.grad(loss, argnums=(0, 1)))
        assert dots > 0
        assert highest == dots


@pytest.mark.parametrize("recompute", [True, False])
def test_bfloat16_hidden_and_a_float32_kernel(recompute):
    """In float32 as they promote; in bfloat16, accumulated in float32, where the caller says so of all products."""
    hidden, kernel = (np.float32(ARRAYS[name]) for name in ("hidden", "kernel"))
    half = jnp.asarray(hidden, jnp.bfloat16)

    @functools.cache
    def step(precision):
        def loss(hidden, kernel):
            with jax.default_matmul_precision(precision):
                return jaxce.linear_cross_entropy(hidden, kernel, LABELS, recompute=recompute, block_bytes=4 * 3 * V)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    def products(precision, *arrays):
        lines = [line for line in step(precision).lower(*arrays).as_text().splitlines() if "dot_general" in line]
        assert lines
        return {line.partition(" : (")[2].count("xbf16>") for line in lines}

    assert products("float32", half, kernel) == {0}
    assert products("bfloat16", hidden, kernel) == {0}  # which the backend may round
    assert products("bfloat16", half, kernel) == {2}
    value, gradients = step("bfloat16")(half, kernel)
    rounded_value, rounded = step("bfloat16")(half, jnp.asarray(kernel, jnp.bfloat16))
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
    assert value == rounded_value
    np.testing.assert_array_equal(gradients[0], rounded[0])
    np.testing.assert_array_equal(gradients[1].astype(jnp.bfloat16), rounded[1])
