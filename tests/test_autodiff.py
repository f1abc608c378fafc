"""The operation that a derivative rule is to JAX: what may stand in it, and what may stand around it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimized
from jax import export
from jax.experimental import pallas as pl
from lazy import linear_distillation
from marks import daily
from modes import all_modes, plain_modes
from test_derivatives import CASES

import jaxce
from jaxce import _rule
from jaxce._autodiff import rule
from jaxce._mesh import Classes

N, D, C = 4, 3, 5
RNG = np.random.default_rng(5)
LOGITS, VECTOR = RNG.normal(size=(N, C)), RNG.uniform(0.5, 2, C)
LABELS = np.array([1, 4, 0, 2])


class Inputs(NamedTuple):
    logits: Any
    label: Any
    vector: Any  # or None


def _forward(inputs):
    log_z = jax.nn.logsumexp(inputs.logits)
    spread = None if inputs.vector is None else jnp.vdot(inputs.vector, log_z - inputs.logits)
    return {"log_z": log_z, "nll": log_z - inputs.logits[inputs.label], "spread": spread}


def _gradient(logits, label, log_z, d_log_z, d_nll):
    p = jnp.exp(logits - log_z)
    is_label = jnp.arange(p.size, dtype=label.dtype) == label
    return d_log_z * p + d_nll * (p - is_label.astype(p.dtype))


def _backward(inputs, outputs, cotangents):
    logits, label, vector = inputs
    d_vector = None
    d_logits = _gradient(logits, label, outputs["log_z"], cotangents["log_z"], cotangents["nll"])
    if vector is not None:
        d_logits += cotangents["spread"] * (jnp.sum(vector) * jnp.exp(logits - outputs["log_z"]) - vector)
        d_vector = cotangents["spread"] * (outputs["log_z"] - logits)
    return Inputs(d_logits, None, d_vector)


def _kernel(logits, label, log_z, d_log_z, d_nll):
    def write(logits, label, numbers, d_logits):
        d_logits[...] = _gradient(logits[...], label[0], *(numbers[i] for i in range(3)))

    shape = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    call = pl.pallas_call(write, out_shape=shape, interpret=True)
    return call(logits, label[None], jnp.stack([log_z, d_log_z, d_nll]))


@jax.custom_jvp
def _kernel_that_has_a_derivative(*arguments):
    return _kernel(*arguments)


@_kernel_that_has_a_derivative.defjvp
def _push_kernel(primals, tangents):
    return _kernel_that_has_a_derivative(*primals), jax.jvp(_gradient, primals, tangents)[1]


def _backward_by(kernel):
    def backward(inputs, outputs, cotangents):
        numbers = outputs["log_z"], cotangents["log_z"], cotangents["nll"]
        return Inputs(kernel(inputs.logits, inputs.label, *numbers), None, None)

    return backward


PLAIN = rule(_forward, _backward)
KERNEL = rule(_forward, _backward_by(_kernel))
WITH_DERIVATIVE = rule(_forward, _backward_by(_kernel_that_has_a_derivative))


def _loss(function, logits, vector=None):
    """Of all rows; `vector` is shared by them."""

    def of_row(logits, label):
        outputs = function(Inputs(logits, label, vector))
        loss = jnp.sin(outputs["log_z"]) * outputs["nll"]
        return loss if vector is None else loss + outputs["spread"] ** 2

    return jnp.vdot(jax.vmap(of_row)(logits, jnp.asarray(LABELS)), jnp.arange(1.0, N + 1, dtype=logits.dtype))


def _assert_close(results, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), results, expected)


def test_a_backward_pass_may_be_a_kernel(x64):
    """Reverse mode calls it and does not transpose it, which JAX can not."""
    logits = jnp.asarray(LOGITS)
    expected = jax.value_and_grad(lambda z: _loss(_forward, z))(logits)
    gradient = jax.value_and_grad(lambda z: _loss(KERNEL, z))
    _assert_close(gradient(logits), expected)
    _assert_close(unoptimized.jit(gradient)(logits), expected)
    _assert_close(unoptimized.jit(jax.vmap(gradient))(logits[None]), jax.tree.map(lambda array: array[None], expected))
    _assert_close(jax.vjp(jax.checkpoint(lambda z: _loss(KERNEL, z)), logits)[1](1.0), expected[1:])


@pytest.mark.parametrize(
    "function", [pytest.param(PLAIN, marks=pytest.mark.thorough), WITH_DERIVATIVE], ids=["plain", "kernel"]
)
def test_every_mode(function, x64):
    """Of a vector, half of which is mapped with the rows while the other half is shared by them."""
    has_vector = function is PLAIN
    x = jnp.asarray(np.concatenate([LOGITS.ravel(), VECTOR]))
    v = jnp.asarray(RNG.normal(size=x.shape))

    def of_vector(function):
        def loss(x):
            logits, vector = x[: N * C].reshape(N, C), x[N * C :]
            return _loss(function, logits, vector) if has_vector else _loss(function, logits) + jnp.vdot(vector, vector)

        return loss

    expected = unoptimized.jit(plain_modes(of_vector(_forward)))(x, v)
    _assert_close(unoptimized.jit(all_modes(of_vector(function)))(x, v), expected)
    mapped = unoptimized.jit(jax.vmap(all_modes(of_vector(function)), in_axes=(None, 0)))(x, v[None])
    _assert_close(mapped, jax.tree.map(lambda array: array[None], expected))


def test_derivatives_by_some_arguments_under_vmap_of_others_and_cond(x64):
    logits, vectors = jnp.asarray(LOGITS), jnp.asarray(np.stack([VECTOR, 2 * VECTOR], axis=1))

    def modes(function):
        def loss(logits, vector):
            return jax.lax.cond(
                vector[0] > 1, lambda z, u: _loss(function, z, u), lambda z, u: jnp.sum(u), logits, vector
            )

        def of_vectors(transformed):
            return jax.vmap(transformed, in_axes=(None, 1))(logits, vectors)

        return {
            "grad by the shared": of_vectors(jax.grad(loss)),
            "grad by the mapped": of_vectors(jax.grad(loss, argnums=1)),
            "grad of vmap": jax.grad(
                lambda z, u: jnp.sum(jax.vmap(loss, in_axes=(None, 1))(z, u) ** 2), argnums=(0, 1)
            )(logits, vectors),
            "hessian": of_vectors(jax.hessian(loss, argnums=(0, 1))),
        }

    _assert_close(unoptimized.jit(lambda: modes(PLAIN))(), unoptimized.jit(lambda: modes(_forward))())


def test_what_stands_still_is_left_out(x64):
    """The derivative by a vector is infinite at a logit of −inf, and 0 · inf is NaN."""
    logits, vector, tangent = jnp.array([0.0, -jnp.inf, 1.0]), jnp.array([0.5, 0.25, 0.5]), jnp.array([1.0, 2.0, -1.0])

    def spread(logits):
        return PLAIN(Inputs(logits, jnp.int32(0), vector))["spread"]

    softmax, mass = jax.nn.softmax(logits), jnp.sum(vector)
    gradient = mass * softmax - vector
    _assert_close(jax.jvp(spread, (logits,), (tangent,))[1], jnp.vdot(gradient, tangent))
    _assert_close(jax.grad(spread)(logits), gradient)
    _assert_close(jax.hessian(spread)(logits), mass * (jnp.diag(softmax) - jnp.outer(softmax, softmax)))


def test_float64_of_the_callers_context():
    """Inside of `jit`, while what lowers the program has float32."""
    logits, labels = np.asarray(LOGITS, np.float32), np.asarray(LABELS, np.int32)

    @unoptimized.jit
    def gradient(logits, labels):
        with jax.enable_x64(True):
            return jax.grad(lambda z: jaxce.cross_entropy(z, labels))(logits.astype(jnp.float64))

    with jax.enable_x64(True):
        expected = jax.grad(lambda z: jaxce.cross_entropy(z, labels))(jnp.asarray(logits, jnp.float64))
    np.testing.assert_allclose(gradient(logits, labels), expected, rtol=1e-14)


def _losses(hidden, kernel, labels):
    """By name: a dense loss, and a linear head in both of its ways."""
    how = {"label_smoothing": 0.1, "z_loss": 0.1, "ignore_index": 2}
    return {
        "dense": lambda: jaxce.cross_entropy(hidden @ kernel, labels, **how),
        "recomputed": lambda: jaxce.linear_cross_entropy(
            hidden, kernel, labels, recompute=True, block_bytes=8 * N, **how
        ),
        "made forward": lambda: jaxce.linear_cross_entropy(
            hidden, kernel, labels, recompute=False, block_bytes=8 * C, **how
        ),
        "distillation": lambda: linear_distillation(
            hidden, kernel, 2 * hidden, kernel, recompute=True, block_bytes=8 * N
        ),
    }


LOSSES = list(_losses(None, None, None))
HIDDEN, KERNEL_OF_HEAD = RNG.normal(size=(N, D)), RNG.normal(size=(D, C))


def _gradient_of(name, hidden, kernel, labels):
    return jax.value_and_grad(lambda h, k: _losses(h, k, labels)[name](), argnums=(0, 1))(hidden, kernel)


@pytest.mark.parametrize("name", daily(LOSSES, ["dense"]))
def test_export(name):
    """Of value and gradient; of a dense loss with sizes that are not known."""
    rows, classes = export.symbolic_shape("n, c") if name == "dense" else (N, C)
    shapes = [
        jax.ShapeDtypeStruct((rows, D), jnp.float32),
        jax.ShapeDtypeStruct((D, classes), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    ]
    exported = export.export(jax.jit(lambda *arrays: _gradient_of(name, *arrays)))(*shapes)
    exported = export.deserialize(bytearray(exported.serialize()))
    arrays = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(KERNEL_OF_HEAD, jnp.float32), jnp.asarray(LABELS, jnp.int32)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        exported.call(*arrays),
        _gradient_of(name, *arrays),
    )


def _transformed(loss, argument):
    return jax.value_and_grad(loss)(argument), jax.jvp(loss, (argument,), (argument,))


@pytest.mark.parametrize("name", daily([*LOSSES, *CASES], ["dense", "recomputed"]))
def test_no_tracer_leaks(name):
    if name in CASES:
        case = CASES[name]
        arguments = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), case.arguments)

        def loss(arguments):
            return jnp.sum(case.loss(**arguments))
    else:
        arguments = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(KERNEL_OF_HEAD, jnp.float32)

        def loss(arguments):
            return _losses(*arguments, jnp.asarray(LABELS))[name]()

    with jax.checking_leaks():
        for function in (loss, jax.checkpoint(loss)):
            jax.jit(lambda arguments, f=function: _transformed(f, arguments)).trace(arguments)


@pytest.fixture
def remat3():
    """The next version of `jax.checkpoint`, where JAX has it."""
    if not hasattr(jax.config, "jax_remat3"):
        pytest.skip("needs a JAX with another jax.checkpoint")
    jax.config.update("jax_remat3", True)
    yield
    jax.config.update("jax_remat3", False)


SECOND_ORDERS = ("grad of checkpoint", "fwd over fwd", "fwd over rev", "rev over fwd", "rev over rev")


@pytest.mark.parametrize("name", daily(LOSSES, ["dense"]))
def test_the_next_checkpoint_of_jax(name, remat3, x64):
    """Of heads, second derivatives recompute blocks by it."""
    kernel, labels = jnp.asarray(KERNEL_OF_HEAD), jnp.asarray(LABELS)

    def dense(hidden):
        if name == "distillation":
            return jaxce.distillation_loss(hidden @ kernel, 2 * hidden @ kernel)
        return _losses(hidden, kernel, labels)["dense"]()

    hidden = jnp.asarray(HIDDEN)
    loss = all_modes(lambda h: _losses(h, kernel, labels)[name](), SECOND_ORDERS)
    results = unoptimized.jit(loss)(hidden, hidden + 1)
    jax.config.update("jax_remat3", False)
    _assert_close(results, unoptimized.jit(plain_modes(dense, SECOND_ORDERS))(hidden, hidden + 1))


@pytest.mark.parametrize("has_vector", [False, True])
@pytest.mark.parametrize("has_labels", [False, True])
def test_the_types_of_the_outputs_are_those_of_the_forward_pass(has_labels, has_vector):
    logits = jnp.zeros((N, C), jnp.bfloat16)
    target = jnp.asarray(LABELS) if has_labels else jnp.zeros((N, C), jnp.bfloat16)
    vector = jnp.zeros(C) if has_vector else None
    row = _rule.Row(logits, target, None, vector, None, jnp.zeros(N), None, Classes(C))
    assert jax.eval_shape(_rule._outputs, row) == jax.eval_shape(_rule._forward, row)
