"""`jaxce.torch` is `torch.nn.functional`: by stored results, by an installed PyTorch and by PyTorch's own samples.

Comparisons are of values and gradients, and of `jaxce` itself too where it means the same.
"""

import inspect
import math
import re
import warnings
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from golden import make_torch
from golden.make_torch import CASES
from marks import daily, except_for, needs

import jaxce

VALUE_TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-6}
GRADIENT_TOLERANCE = VALUE_TOLERANCE | {"bfloat16": 2**-8}  # a gradient is rounded once, to the dtype of its argument
ABSOLUTE_TOLERANCE = VALUE_TOLERANCE

GROUPS = sorted({case.group for case in CASES})
# without "linear" and "positions", which round the gradient of their logits too: see test_linear
ROUNDED_GROUPS = [
    group
    for group in GROUPS
    if group not in ("nothing", "nll-C", "nll-NC1", "nll-NC12", "margin-C", "linear")
    and not group.startswith("positions")
]
LOSSES = (
    "cross_entropy",
    "nll_loss",
    "multi_margin_loss",
    "binary_cross_entropy_with_logits",
    "mse_loss",
    "l1_loss",
    "kl_div",
)
SOFTMAXES = ("softmax", "log_softmax")
ERROR_INPUTS = {"multi_margin_loss": 9, "l1_loss": 2}  # how many PyTorch has; jaxce.torch refuses them all
LOG2 = math.log(2)


# The table of calls in golden/make_torch.py


LONG = {"labels-C", "labels-NC", "labels-NC1", "labels-NC12", "probabilities-NC", "probabilities-NC12", "linear"}
LONG |= {"positions-NC1", "positions-NC12", "margin-C", "margin-NC", "nll-C", "nll-NC12", "binary", "errors", "nothing"}


@pytest.mark.parametrize("group", except_for(GROUPS, LONG))
def test_float64(group, x64):
    """The stored results, and where PyTorch is installed other numbers too."""
    cases = _cases(group)
    program = _program(cases)
    _compare(program, *make_torch.load(), "float64")
    if find_spec("torch"):
        arrays = make_torch.draw(1)
        _compare(program, arrays, {case.name: make_torch.run(case, arrays) for case in cases}, "float64")


@pytest.mark.parametrize("dtype", daily(["float32", "bfloat16"], ["bfloat16"]))
@pytest.mark.parametrize("group", daily(ROUNDED_GROUPS, ["labels-NC1", "probabilities-NC1"]))
def test_smaller_dtypes(group, dtype):
    """PyTorch gets the numbers that the dtype can hold, in float64: it is the truth, not another approximation."""
    needs("torch")
    cases = _cases(group)
    arrays = {name: _round(array, dtype) for name, array in make_torch.draw(2).items()}
    _compare(_program(cases), arrays, {case.name: make_torch.run(case, arrays) for case in cases}, dtype)


def test_stored_results_belong_to_the_table():
    arrays, results = make_torch.load()
    assert list(results) == [case.name for case in CASES]
    drawn = make_torch.draw(0)
    for name, array in arrays.items():
        np.testing.assert_allclose(array, drawn[name], 1e-12, err_msg=name)


def test_stored_results_are_those_of_the_installed_pytorch():
    needs("torch")
    arrays, results = make_torch.load()
    for case in CASES:
        stored, live = results[case.name], make_torch.run(case, arrays)
        jax.tree.map(
            lambda a, b, case=case: np.testing.assert_allclose(a, b, 1e-12, 1e-14, err_msg=case.name), stored, live
        )


def _cases(group):
    return [case for case in CASES if case.group == group]


def _round(array, dtype):
    return array.astype(jnp.dtype(dtype)).astype(np.float64) if array.dtype == np.float64 else array


def _program(cases):
    """All cases by both names, compiled together: arrays → values and gradients by case and name."""
    return unoptimized.jit(lambda arrays: {case.name: _evaluate(case, arrays) for case in cases})


def _compare(program, arrays, results, dtype):
    held = {name: jnp.asarray(a, dtype if a.dtype == np.float64 else np.int32) for name, a in arrays.items()}
    results_dtype = "float64" if dtype == "float64" else "float32"
    for name, by_api in program(held).items():
        for api, (value, gradients) in by_api.items():
            expected, expected_gradients = results[name]
            if api == "jaxce" and np.isnan(expected).any():  # the mean over nothing is 0 there
                expected, expected_gradients = np.zeros(()), jax.tree.map(np.zeros_like, expected_gradients)
            _assert_close(value, expected, results_dtype, VALUE_TOLERANCE, f"{api}, {name}")
            assert gradients.keys() == expected_gradients.keys()
            for argument, gradient in gradients.items():
                place = f"{api}, {name}, gradient by {argument}"
                _assert_close(gradient, expected_gradients[argument], dtype, GRADIENT_TOLERANCE, place)


def _evaluate(case, arrays):
    functions = {"jaxce.torch": getattr(jaxce.torch, case.loss), "jaxce": _plain(case)}
    return {api: _differentiate(case, function, arrays) for api, function in functions.items() if function is not None}


def _differentiate(case, function, arrays):
    arguments = {argument: arrays[name] for argument, name in case.arrays.items()}
    cotangent = None if case.cotangent is None else arrays[case.cotangent]
    return _value_and_gradients(function, arguments, case.by, case.options, cotangent)


def _value_and_gradients(function, arguments, by, options, cotangent):
    variables = {argument: arguments[argument] for argument in by}
    value, pullback = jax.vjp(lambda variables: function(**(arguments | variables), **options), variables)
    return value, pullback(jnp.ones_like(value) if cotangent is None else cotangent.astype(value.dtype))[0]


def _plain(case):
    """The same call by `jaxce`'s own name; None where that has no such loss, or means something else by it."""
    if case.loss in ("cross_entropy", "nll_loss", "multi_margin_loss"):
        return partial(_plain_classes, case.loss)
    if case.group == "linear":
        return _plain_linear
    if case.loss in ("mse_loss", "l1_loss"):
        return partial(_plain_elements, case.loss)
    if case.loss == "binary_cross_entropy_with_logits" and not (
        "weight" in case.arrays and case.options["reduction"] == "mean"
    ):
        return partial(_plain_elements, "binary_cross_entropy")
    return None


def _plain_classes(loss, input, target, weight=None, **options):
    if loss != "multi_margin_loss" and jnp.issubdtype(target.dtype, jnp.integer):
        options = {"ignore_index": -100} | options  # PyTorch's default
    return getattr(jaxce, loss)(input, target, axis=min(1, input.ndim - 1), class_weights=weight, **options)


def _plain_linear(input, linear_weight, target, linear_bias=None, weight=None, **options):
    if jnp.issubdtype(target.dtype, jnp.integer):
        options |= {"ignore_index": -100}
    return jaxce.linear_cross_entropy(
        input, linear_weight.T, target, bias=linear_bias, class_weights=weight, block_bytes=32, **options
    )


def _plain_elements(loss, input, target, weight=None, **options):
    weights = None if weight is None else jnp.broadcast_to(weight, input.shape)
    return getattr(jaxce, loss)(input, target, weights=weights, **options)


def _assert_close(actual, expected, dtype, tolerance, place):
    assert actual.dtype == jnp.dtype(dtype), place
    assert actual.shape == expected.shape, place
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual, expected, tolerance[dtype], ABSOLUTE_TOLERANCE[dtype], err_msg=place)


# PyTorch's own samples


@pytest.mark.parametrize(
    ("name", "variant"), [(name, "") for name in (*LOSSES, *SOFTMAXES)] + [(name, "with_dtype") for name in SOFTMAXES]
)
def test_pytorch_samples(name, variant, x64, rng):
    _compare_samples(name, [sample for sample in _samples(name, variant) if sample.input.numel()], rng)


@pytest.mark.parametrize("name", SOFTMAXES)
def test_pytorch_samples_without_elements(name, x64, rng):
    _compare_samples(name, [sample for sample in _samples(name) if not sample.input.numel()], rng)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(("name", "index"), [(name, i) for name, count in ERROR_INPUTS.items() for i in range(count)])
def test_pytorch_error_inputs(name, index):
    torch = needs("torch")
    errors = list(_op(name).error_inputs("cpu"))
    assert len(errors) == ERROR_INPUTS[name]
    arguments, options = _arguments(name, errors[index].sample_input)
    with pytest.raises(errors[index].error_type):
        getattr(torch.nn.functional, name)(**arguments, **options)
    with pytest.raises((TypeError, ValueError)):
        getattr(jaxce.torch, name)(**{key: jnp.asarray(tensor.numpy()) for key, tensor in arguments.items()}, **options)


def test_pytorch_has_no_other_error_inputs():
    needs("torch")
    assert {name for name in (*LOSSES, *SOFTMAXES) if _op(name).error_inputs_func is not None} == set(ERROR_INPUTS)


def _compare_samples(name, samples, rng):
    import torch

    assert samples
    function = getattr(torch.nn.functional, name)
    calls, expected = [], []
    for sample in samples:
        arguments, options = _arguments(name, sample)
        by = [argument for argument, tensor in arguments.items() if tensor.requires_grad]
        assert "input" in by
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "reduction: 'mean' divides")  # kl_div
            value = function(**arguments, **options)
        cotangent = torch.tensor(rng.normal(size=value.shape))
        expected.append((value, torch.autograd.grad(value, [arguments[argument] for argument in by], cotangent)))
        arrays = {argument: tensor.detach().numpy() for argument, tensor in arguments.items()}
        options = {option: jnp.float64 if value == torch.float64 else value for option, value in options.items()}
        calls.append((by, options, arrays, cotangent.numpy()))

    @unoptimized.jit
    def program(arrays_and_cotangents):
        return [
            _value_and_gradients(getattr(jaxce.torch, name), arrays, by, options, cotangent)
            for (by, options, _, _), (arrays, cotangent) in zip(calls, arrays_and_cotangents, strict=True)
        ]

    actual = program([(arrays, cotangent) for _, _, arrays, cotangent in calls])
    for index, ((value, gradients), (expected_value, expected_gradients)) in enumerate(
        zip(actual, expected, strict=True)
    ):
        place = f"sample {index}, {calls[index][1]}"
        _assert_close(value, expected_value.detach().numpy(), "float64", VALUE_TOLERANCE, place)
        for argument, gradient in zip(calls[index][0], expected_gradients, strict=True):
            by_argument = f"{place}, gradient by {argument}"
            _assert_close(gradients[argument], gradient.numpy(), "float64", GRADIENT_TOLERANCE, by_argument)


def _op(name, variant=""):
    needs("torch")
    needs("expecttest")  # PyTorch's samples need it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # PyTorch would like hypothesis for tests of its own
        from torch.testing._internal.common_methods_invocations import op_db

    full_name = name if name in SOFTMAXES else f"nn.functional.{name}"
    return next(op for op in op_db if op.name == full_name and op.variant_test_name == variant)


def _samples(name, variant=""):
    op = _op(name, variant)
    import torch

    return list(op.sample_inputs("cpu", torch.float64, requires_grad=True))


def _arguments(name, sample):
    """Tensors and options of a sample by the names of the arguments."""
    import torch

    second = "dim" if name in SOFTMAXES else "target"
    arguments = {"input": sample.input} | dict(zip([second], sample.args, strict=True)) | sample.kwargs
    tensors = {argument: value for argument, value in arguments.items() if isinstance(value, torch.Tensor)}
    return tensors, {argument: value for argument, value in arguments.items() if argument not in tensors}


# What is PyTorch's alone


@pytest.mark.parametrize("name", [*LOSSES, *SOFTMAXES])
def test_signature_is_pytorchs(name):
    torch = needs("torch")
    ours, theirs = (
        [(parameter.name, parameter.default) for parameter in inspect.signature(function).parameters.values()]
        for function in (getattr(jaxce.torch, name), getattr(torch.nn.functional, name))
    )
    assert ours == theirs


@pytest.mark.parametrize("label_smoothing", daily([0.0, 0.1], [0.1]))
@pytest.mark.parametrize("weight", [None, np.float32([1, 2, 3])])
def test_all_ignored(weight, label_smoothing):
    """The mean is NaN, the sum 0, and the gradient 0 all the same, even of rows that hold NaN (NaN in PyTorch)."""

    def loss(input, reduction):
        target = jnp.array([-100, -100])
        return jaxce.torch.cross_entropy(input, target, weight, label_smoothing=label_smoothing, reduction=reduction)

    input = jnp.array([[1.0, 2.0, 0.0], [jnp.nan, 0.0, jnp.inf]])
    assert jnp.isnan(loss(input, "mean"))
    assert loss(input, "sum") == 0
    np.testing.assert_array_equal(loss(input, "none"), [0, 0])
    for reduction in ("mean", "sum"):
        np.testing.assert_array_equal(jax.grad(loss)(input, reduction), np.zeros((2, 3)))


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batch(name):
    """The mean over nothing is NaN. PyTorch's multi_margin_loss returns what its memory held instead."""
    input = jnp.zeros((0, 3))
    target = jnp.zeros(0, int) if name in ("cross_entropy", "nll_loss", "multi_margin_loss") else input
    loss = getattr(jaxce.torch, name)
    assert jnp.isnan(loss(input, target))
    assert loss(input, target, reduction="sum") == 0
    assert loss(input, target, reduction="none").size == 0


@pytest.mark.parametrize("positions", [(), (2,)])
@pytest.mark.parametrize("has_labels", [True, False])
def test_empty_batch_of_a_head(positions, has_labels):
    target = jnp.zeros((0, *positions), int) if has_labels else jnp.zeros((0, 4, *positions))
    loss = partial(jaxce.torch.linear_cross_entropy, jnp.zeros((0, 3)), jnp.ones((4, *positions, 3)), target)
    assert jnp.isnan(loss())
    assert loss(reduction="sum") == 0
    assert loss(reduction="none").shape == (0, *positions)


# by loss: shapes of the scores and of the labels, and of what "none" returns, where they are not (N, C), (N,) and (N,)
SINGLE = {
    "cross_entropy": {((3,), ()): (), ((3,), (1,)): ()},
    "nll_loss": {((3,), ()): (), ((3,), (1,)): (), ((1,), ()): (), ((1,), (1,)): ()},
    "multi_margin_loss": {
        ((), ()): (),
        ((), (1,)): (1,),
        ((1,), ()): (),
        ((1,), (1,)): (1,),
        ((3,), ()): (),
        ((3,), (1,)): (1,),
        ((1, 3), ()): (),
    },
    "linear_cross_entropy": {((3,), ()): (), ((3,), (1,)): ()},
}
SINGLE_CALLS = [(name, *shapes) for name, calls in SINGLE.items() for shapes in calls]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("name", "input_shape", "target_shape"), SINGLE_CALLS)
def test_one_row_with_and_without_a_batch(name, input_shape, target_shape, reduction, rng):
    """The value is that of a batch of one, whatever the shapes."""
    head = [np.float32(rng.normal(size=(4, 3)))] if name == "linear_cross_entropy" else []
    input, target = np.float32(rng.normal(size=input_shape)), np.zeros(target_shape, np.int32)
    loss = partial(getattr(jaxce.torch, name), reduction=reduction)
    actual = loss(input, *head, target)
    batch = loss(input.reshape(1, -1), *head, target.reshape(1))
    assert actual.shape == (SINGLE[name][input_shape, target_shape] if reduction == "none" else ())
    np.testing.assert_array_equal(actual, batch.reshape(actual.shape))
    if find_spec("torch"):
        torch = needs("torch")
        arguments = [torch.tensor(array) for array in (input, *head, np.int64(target))]
        expected = getattr(torch.nn.functional, name)(*arguments, reduction=reduction).numpy()
        np.testing.assert_allclose(actual, expected, 1e-6, 1e-6, strict=True)


def test_no_logits_are_held_at_any_position():
    rows, classes, positions, width = 2048, 512, 32, 16
    shapes = {"f": ((rows, width), (classes, positions, width)), "i": ((rows, positions),)}
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for dtype, of_dtype in shapes.items() for shape in of_dtype]
    compiled = jax.jit(jax.value_and_grad(jaxce.torch.linear_cross_entropy, (0, 1))).lower(*arrays).compile()
    logits = 4 * rows * positions * classes
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * logits / positions


def test_ignored_class_stays_in_the_softmax():
    input, target = jnp.zeros((2, 4)), jnp.array([0, 3])
    np.testing.assert_allclose(jaxce.torch.cross_entropy(input, target, ignore_index=3), math.log(4), 1e-6)


def test_labels_divide_by_their_weights_and_one_hot_probabilities_by_rows():
    input, target, weight = jnp.zeros((2, 2)), jnp.array([0, 1]), jnp.array([1.0, 3.0])
    np.testing.assert_allclose(jaxce.torch.cross_entropy(input, target, weight), LOG2, 1e-6)
    np.testing.assert_allclose(jaxce.torch.cross_entropy(input, jnp.eye(2), weight), 2 * LOG2, 1e-6)


def test_smoothing_is_weighted_by_every_class():
    """p = (3/4, 1/4), label 0, ε = 0.2: 0.8 · 1 · log 4/3 + 0.1 · (1 · log 4/3 + 5 · log 4), and by w_y = 1."""
    input, weight = jnp.array([[math.log(3), 0.0]]), jnp.array([1.0, 5.0])
    smoothed = [jaxce.torch.cross_entropy(input, jnp.array([label]), weight, label_smoothing=0.2) for label in (0, 1)]
    part = 0.1 * (math.log(4 / 3) + 5 * math.log(4))
    np.testing.assert_allclose(smoothed[0], 0.8 * math.log(4 / 3) + part, 1e-6)
    np.testing.assert_allclose(smoothed[1], (0.8 * 5 * math.log(4) + part) / 5, 1e-6)


def test_ignore_index_of_probabilities():
    """One that is a class is an error; a negative one, such as the default, is not used."""
    input, target = jnp.zeros((2, 2)), jnp.eye(2)
    for ignore_index in (0, 1, 7):
        with pytest.raises(ValueError, match="`ignore_index`"):
            jaxce.torch.cross_entropy(input, target, ignore_index=ignore_index)
    for ignore_index in (-100, -1):
        loss = jaxce.torch.cross_entropy(input, target, ignore_index=ignore_index)
        np.testing.assert_allclose(loss, LOG2, 1e-6)


@pytest.mark.parametrize(
    ("size_average", "reduce", "reduction"),
    [
        (None, True, "mean"),
        (None, False, "none"),
        (True, None, "mean"),
        (True, True, "mean"),
        (True, False, "none"),
        (False, None, "sum"),
        (False, True, "sum"),
        (False, False, "none"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_legacy_flags(name, size_average, reduce, reduction):
    """They overrule `reduction`."""
    loss = getattr(jaxce.torch, name)
    input = jnp.array([[0.5, 2.0], [-1.0, 0.2], [0.1, 0.3]])
    target = jnp.array([0, 1, 0]) if name in LOSSES[:3] else jnp.array([[0.2, 0.4], [0.1, 0.9], [0.6, 0.5]])
    expected = loss(input, target, reduction=reduction)
    for overruled in ("none", "sum"):
        actual = loss(input, target, size_average=size_average, reduce=reduce, reduction=overruled)
        np.testing.assert_array_equal(actual, expected)


def test_kl_div_divides_by_elements_or_by_the_batch():
    """The rows' divergences are log 2 and 0."""
    input, target = jnp.log(jnp.full((2, 2), 0.5)), jnp.array([[1.0, 0.0], [0.5, 0.5]])
    for reduction, expected in {"sum": LOG2, "mean": LOG2 / 4, "batchmean": LOG2 / 2}.items():
        np.testing.assert_allclose(jaxce.torch.kl_div(input, target, reduction=reduction), expected, 1e-6)
    losses = jaxce.torch.kl_div(input, target, reduction="none")
    np.testing.assert_allclose(losses, [[LOG2, 0], [0, 0]], 1e-6, 1e-7)


def test_kl_div_flags_leave_the_batch_to_batchmean(x64):
    """PyTorch divides what the flags reduce by the batch once more."""
    torch = needs("torch")
    input, target = np.log(np.full((2, 2), 0.5)), np.array([[1.0, 0.0], [0.5, 0.5]])
    with pytest.warns(UserWarning, match="size_average and reduce args"):
        expected = torch.nn.functional.kl_div(
            torch.tensor(input), torch.tensor(target), size_average=False, reduction="batchmean"
        )
    actual = jaxce.torch.kl_div(jnp.asarray(input), jnp.asarray(target), size_average=False, reduction="batchmean")
    np.testing.assert_allclose(actual, expected.numpy(), 1e-12)


def test_binary_weights_do_not_divide():
    """In `jaxce` they do."""
    input, target, weight = jnp.zeros(2), jnp.ones(2), jnp.array([1.0, 3.0])
    loss = jaxce.torch.binary_cross_entropy_with_logits(input, target, weight)
    np.testing.assert_allclose(loss, 2 * LOG2, 1e-6)
    np.testing.assert_allclose(jaxce.binary_cross_entropy(input, target, weights=weight), LOG2, 1e-6)


def test_margin_class_weights_do_not_divide():
    loss = jaxce.torch.multi_margin_loss(jnp.zeros((2, 2)), jnp.array([0, 1]), weight=jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(loss, (1 / 2 + 3 / 2) / 2, 1e-6)


def test_error_weights_divide():
    input, target, weight = jnp.array([1.0, 2.0]), jnp.zeros(2), jnp.array([1.0, 3.0])
    np.testing.assert_allclose(jaxce.torch.mse_loss(input, target, weight=weight), (1 + 3 * 4) / 4, 1e-6)
    np.testing.assert_allclose(jaxce.torch.l1_loss(input, target, weight=weight), (1 + 3 * 2) / 4, 1e-6)


@pytest.mark.parametrize(("ndim", "dim"), list(enumerate([0, 0, 1, 0, 1])))
@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax_chooses_a_dim_with_a_warning(name, ndim, dim):
    input = jnp.arange(2.0**ndim).reshape((2,) * ndim)
    function = getattr(jaxce.torch, name)
    with pytest.warns(UserWarning, match="dim") as caught:
        chosen = function(input)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(chosen, function(input, dim))


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax_in_another_dtype(name, x64):
    """It is the dtype of the arithmetic too."""
    function = getattr(jaxce.torch, name)
    input = jnp.array([[0.0, 1.0, 3.0]], jnp.float32)
    expected = function(input.astype(jnp.float64), 1)
    assert expected.dtype == jnp.float64
    assert function(input, 1).dtype == jnp.float32
    np.testing.assert_array_equal(function(input, 1, dtype=jnp.float64), expected)


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax_of_integers_in_a_floating_dtype(name):
    function = getattr(jaxce.torch, name)
    input = jnp.array([[0, 1, 3]])
    expected = function(input.astype(jnp.float32), 1)
    np.testing.assert_array_equal(function(input, 1, dtype=jnp.float32), expected)


# Errors

F32, I32 = np.float32, np.int32
WRONG = {
    "a label too large": ("cross_entropy", ((2, 3), np.array([0, 7])), {}, ValueError, "`target`.* 7 at"),
    "a label below 0": ("cross_entropy", ((2, 3), np.array([0, -1])), {}, ValueError, "`target`.* -1 at"),
    "a label too large for nll": ("nll_loss", ((2, 3), np.array([0, 7])), {}, ValueError, "`target`.* 7 at"),
    "a label too large for margins": (
        "multi_margin_loss",
        ((2, 3), np.array([0, 7])),
        {},
        ValueError,
        "`target`.* 7 at",
    ),
    "integer logits": ("cross_entropy", (np.zeros((2, 3), I32), I32([0, 1])), {}, TypeError, "`input`"),
    "a list of logits": ("cross_entropy", ([[1.0, 2.0]], I32([0])), {}, TypeError, "`input`"),
    "a list of labels": ("cross_entropy", ((1, 2), [0]), {}, TypeError, "`target`"),
    "one-hot integers": ("cross_entropy", ((2, 2), np.eye(2, dtype=I32)), {}, TypeError, "`target`.*`input`"),
    "floating labels": ("cross_entropy", ((2, 3), (2,)), {}, TypeError, "`target`.*`input`"),
    "boolean labels": ("cross_entropy", ((2, 3), np.array([True, False])), {}, TypeError, "`target`"),
    "a column of labels": ("cross_entropy", ((2, 3), I32([[0], [1]])), {}, ValueError, "`target`.*squeeze"),
    "classes last": ("cross_entropy", ((2, 5, 3), np.zeros((2, 5), I32)), {}, ValueError, "`target`.*`input`"),
    "probabilities for nll": ("nll_loss", ((2, 3), (2, 3)), {}, TypeError, "`target`"),
    "a class to ignore": ("cross_entropy", ((2, 3), (2, 3)), {"ignore_index": 1}, ValueError, "`ignore_index`"),
    "too few weights": ("cross_entropy", ((2, 3), I32([0, 1])), {"weight": F32([1, 2])}, ValueError, "`weight`"),
    "a list of weights": ("cross_entropy", ((2, 3), I32([0, 1])), {"weight": [1, 2, 3]}, TypeError, "`weight`"),
    "boolean weights": ("cross_entropy", ((2, 3), I32([0, 1])), {"weight": np.ones(3, bool)}, TypeError, "`weight`"),
    "no classes": ("cross_entropy", ((2, 0), I32([0, 0])), {}, ValueError, "`input`"),
    "too much smoothing": (
        "cross_entropy",
        ((2, 3), I32([0, 1])),
        {"label_smoothing": 2},
        ValueError,
        "`label_smoothing`",
    ),
    "a reduction of jaxce": ("cross_entropy", ((2, 3), I32([0, 1])), {"reduction": "parts"}, ValueError, "`reduction`"),
    "an unknown reduction of kl_div": ("kl_div", ((2, 3), (2, 3)), {"reduction": "max"}, ValueError, "'batchmean'"),
    "batchmean elsewhere": ("mse_loss", ((2, 3), (2, 3)), {"reduction": "batchmean"}, ValueError, "`reduction`"),
    "cubic margins": ("multi_margin_loss", ((2, 3), I32([0, 1])), {"p": 3}, ValueError, "`p`"),
    "margins of pixels": ("multi_margin_loss", ((2, 3, 4), np.zeros((2, 4), I32)), {}, ValueError, "`input`"),
    "a column of logits": ("binary_cross_entropy_with_logits", ((2, 1), (2,)), {}, ValueError, "`target`.*`input`"),
    "integer answers": ("binary_cross_entropy_with_logits", ((2,), I32([0, 1])), {}, TypeError, "`target`"),
    "wide weights": ("binary_cross_entropy_with_logits", ((2,), (2,), (3, 2)), {}, ValueError, "`weight`.*`input`"),
    "error weights": ("mse_loss", ((2,), (2,)), {"weight": F32([1])}, ValueError, "`weight`"),
    "a mask of errors": ("l1_loss", ((2,), (2,)), {"weight": np.ones(2, bool)}, TypeError, "`weight`"),
    "a column of predictions": ("mse_loss", ((2, 1), (2,)), {}, ValueError, "`target`.*`input`"),
    "a column of log-probabilities": ("kl_div", ((2, 1), (2,)), {}, ValueError, "`target`.*`input`"),
    "a weight the other way round": (
        "linear_cross_entropy",
        ((2, 3), (3, 5), I32([0, 1])),
        {},
        ValueError,
        r"`linear_weight`.*\(C, D\).*got \(3, 5\) with `input` of shape \(2, 3\)",
    ),
    "a row of hidden at positions": (
        "linear_cross_entropy",
        ((3,), (5, 2, 3), I32([0, 1])),
        {},
        ValueError,
        r"`linear_weight`.*\(C, d1, …, D\).*got \(5, 2, 3\) with `input` of shape \(3,\)",
    ),
    "a bias without positions": (
        "linear_cross_entropy",
        ((2, 3), (5, 4, 3), np.zeros((2, 4), I32)),
        {"linear_bias": F32([1] * 5)},
        ValueError,
        r"`linear_bias` must have shape \(5, 4\).*got \(5,\)",
    ),
    "labels without positions": (
        "linear_cross_entropy",
        ((2, 3), (5, 4, 3), I32([0, 1])),
        {},
        ValueError,
        r"`target` must have shape \(2, 4\) for class indices or \(2, 5, 4\) for probabilities.*got \(2,\)",
    ),
    "a label too large at a position": (
        "linear_cross_entropy",
        ((1, 3), (5, 2, 3), I32([[0, 7]])),
        {},
        ValueError,
        r"`target`.* 7 at position \(0, 1\)",
    ),
    "a class to ignore at positions": (
        "linear_cross_entropy",
        ((1, 3), (5, 2, 3), (1, 5, 2)),
        {"ignore_index": 1},
        ValueError,
        "`ignore_index`",
    ),
    "a head's bias": (
        "linear_cross_entropy",
        ((2, 3), (5, 3), I32([0, 1])),
        {"linear_bias": F32([1, 2])},
        ValueError,
        r"`linear_bias` must have shape \(5,\)",
    ),
    "labels of a head": ("linear_cross_entropy", ((2, 3), (5, 3), I32([0])), {}, ValueError, "`target`.*`input"),
    "no such dim": ("softmax", ((2, 3), 2), {}, ValueError, "`dim`.*`input`"),
}


@pytest.mark.parametrize("what", WRONG)
def test_error_speaks_of_pytorchs_arguments(what):
    """The text names what is wrong, and advises nothing that the function does not take."""
    name, arguments, options, error, match = WRONG[what]
    function = getattr(jaxce.torch, name)
    arguments = [np.zeros(value, F32) if isinstance(value, tuple) else value for value in arguments]
    with pytest.raises(error, match=match) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    code = {word for words in re.findall(r"`(\w+)`|\b(\w+)=|\((\w+)\)|\b(\w+)(?=\[|\.\w)", text) for word in words}
    foreign = {parameter for loss in _jaxce_losses() for parameter in inspect.signature(loss).parameters}
    assert not code & (foreign - set(inspect.signature(function).parameters)), text


def _jaxce_losses():
    return [jaxce.cross_entropy, jaxce.nll_loss, jaxce.multi_margin_loss, jaxce.binary_cross_entropy, jaxce.mse_loss]
