"""Where PyTorch, optax or Keras are wrong or silent: what they give, what is right by the formula, what jaxce gives.

What a peer gives is asserted too, so that a row goes once it is cured. That is optax 0.2.8, PyTorch 2.13, Keras 3.15.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import needs

import jaxce

NAN, INF = np.nan, np.inf


def _in_chunks(torch):
    """The linear head of PyTorch by chunks of one row, with the identity for a kernel."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1)
    head = partial(torch.nn.functional.linear_cross_entropy, ignore_index=-100, options=options)
    return lambda z, y: head(z, torch.eye(z.shape[1]), y)


def _by_identity(z, y):
    return jaxce.linear_cross_entropy(z, jnp.eye(z.shape[1]), y, ignore_index=-100)


OF_LABELS = partial(jaxce.cross_entropy, ignore_index=-100)
LOSSES = {  # the peer's, from its module, and ours
    "optax": (lambda optax: optax.softmax_cross_entropy_with_integer_labels, OF_LABELS),
    "optax, distributions": (lambda optax: optax.softmax_cross_entropy, jaxce.cross_entropy),
    "optax, binary": (lambda optax: optax.sigmoid_binary_cross_entropy, jaxce.binary_cross_entropy),
    "keras": (lambda keras: lambda z, y: keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, z), OF_LABELS),
    "torch": (lambda torch: torch.nn.functional.cross_entropy, OF_LABELS),
    "torch, distributions": (lambda torch: torch.nn.functional.cross_entropy, jaxce.cross_entropy),
    "torch, binary": (lambda torch: torch.nn.functional.binary_cross_entropy_with_logits, jaxce.binary_cross_entropy),
    "torch, linear head": (_in_chunks, _by_identity),
}


class Case(NamedTuple):
    loss: str
    what: str
    logits: Any
    targets: Any
    give: tuple  # the loss, and its gradient by the logits
    right: tuple


ROW, SOFTMAX = np.float32([[1, 2, 0.5]]), np.array([0.2312239, 0.6285317, 0.1402444])
AHEAD, SMALL = np.float32([[20, 0]]), 2.0611537e-9  # log(1 + e⁻²⁰), and 1 − p, to as many digits
ROUNDED, EXACT = (0, [0, SMALL]), (SMALL, [-SMALL, SMALL])
OFFSET, OF_OFFSET = np.float32([[10003, 10000]]), [-0.04742587, 0.04742587]
FAR, OF_FAR = np.asarray([[36.25, 0.1, 3]], jnp.bfloat16), [1, -1, 3.63598e-15]  # and its 0.1 is 0.10009766
ABSENT, HALVES, OF_HALVES = np.float32([[1, 0, -INF]]), np.float32([[0.5, 0.5, 0]]), [0.2310586, -0.2310586, 0]
MANY = np.float16([[0, 20]] * 5000)  # float16 ends at 65504, and the sum is 100000
SPOILT, OF_SPOILT = np.float32([[0, 0], [NAN, 0]]), [[-0.5, 0.5], [NAN, NAN]]
SURE = np.float32([-INF, INF]), np.float32([0, 1])

CASES = [
    # There is no class −1 and no class 3. No number is right, and a batch that holds one must not be trained on.
    Case("optax", "label -1 is the last class", ROW, [-1], (1.9643688, SOFTMAX - [0, 0, 1]), (NAN, NAN)),
    Case("optax", "label C pushes every class down", ROW, [3], (NAN, SOFTMAX), (NAN, NAN)),
    Case("keras", "label C is a row without loss", ROW, [3], (0, 0), (NAN, NAN)),
    # log_z rounds to the label's logit, and p to 1.
    *[Case(peer, "a confident row", AHEAD, [0], ROUNDED, EXACT) for peer in ("optax", "keras", "torch")],
    # log_z is rounded at the size of the logits, and the difference keeps that error.
    Case("optax", "an offset of 1e4", OFFSET, [0], (0.04882812, OF_OFFSET), (0.04858735, OF_OFFSET)),
    # The loss is rounded to the dtype of the logits, here in steps of 0.25.
    *[Case(peer, "bfloat16", FAR, [1], (36.25, OF_FAR), (36.149902, OF_FAR)) for peer in ("optax", "torch")],
    Case("torch", "a mean over 100000 in float16", MANY, [0] * 5000, (INF, [-2e-4, 2e-4]), (20, [-2e-4, 2e-4])),
    # 0 · −inf is NaN; but a class without mass adds nothing.
    Case("optax, distributions", "a class left out", ABSENT, HALVES, (NAN, OF_HALVES), (0.8132617, OF_HALVES)),
    Case("torch, distributions", "a class left out", ABSENT, HALVES, (NAN, OF_HALVES), (0.8132617, OF_HALVES)),
    Case("optax, binary", "certainty", *SURE, (NAN, 0), (0, 0)),
    Case("torch, binary", "certainty", *SURE, (NAN, 0), (0, 0)),
    # A row that does not count is read all the same; by the head, even for the loss.
    Case("torch", "a masked NaN", SPOILT, [0, -100], (np.log(2), OF_SPOILT), (np.log(2), [[-0.5, 0.5], [0, 0]])),
    Case("torch, linear head", "a masked NaN", SPOILT, [0, -100], (NAN, OF_SPOILT), (np.log(2), [[-0.5, 0.5], [0, 0]])),
    # 0/0 has no value: a policy. jaxce chose 0, which leaves a step without rows as it is, and for jaxce.torch NaN.
    Case("torch", "nothing counts", ROW, [-100], (NAN, 0), (0, 0)),
    Case("torch, linear head", "nothing counts", ROW, [-100], (NAN, NAN), (0, 0)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.loss}: {case.what}")
def test_values_and_gradients(case, monkeypatch):
    theirs, ours = LOSSES[case.loss]
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    peer = needs(case.loss.split(",")[0])
    by_peer = _by_torch if "torch" in case.loss else _by_jax
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _assert_equal(by_peer(theirs(peer), case.logits, np.asarray(case.targets)), case.give, case.logits.dtype)
    _assert_equal(_by_jax(ours, case.logits, np.asarray(case.targets)), case.right, case.logits.dtype)


def _by_jax(loss, logits, targets):
    return jax.jit(jax.value_and_grad(lambda z: loss(z, jnp.asarray(targets)).sum()))(jnp.asarray(logits))


def _by_torch(loss, logits, targets):
    import torch

    logits = torch.tensor(logits.astype(np.float32)).to(getattr(torch, str(logits.dtype))).requires_grad_()
    value = loss(logits, torch.tensor(targets))
    return value.detach().float().numpy(), torch.autograd.grad(value, logits)[0].float().numpy()


def _assert_equal(result, expected, dtype):
    value, gradient = (np.asarray(array, float) for array in result)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6, atol=1e-12)
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(gradient, np.broadcast_to(expected[1], gradient.shape), rtol=tolerance, atol=1e-15)


# Derivatives of label 1 along a direction.
ALONG = np.float32([[1, 2, 3]])
SLOPE, CURVATURE = SOFTMAX @ [1, 2, 3] - 2, SOFTMAX @ [1, 4, 9] - (SOFTMAX @ [1, 2, 3]) ** 2


def _slope(loss, logits=ROW):
    return jax.jvp(jax.jit(loss), (jnp.asarray(logits),), (jnp.asarray(ALONG),))[1]


def test_forward_mode_of_a_safe_loss():
    assert jnp.isnan(_slope(lambda z: optax.safe_softmax_cross_entropy(z, HALVES)[0], ABSENT))
    np.testing.assert_allclose(_slope(lambda z: jaxce.cross_entropy(z, HALVES), ABSENT), -0.2310586, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # of PyTorch to itself
def test_derivatives_of_a_linear_head():
    """PyTorch's has a forward derivative of 0, without a word, and refuses the second."""
    loss = partial(_by_identity, y=np.array([1]))
    np.testing.assert_allclose(_slope(loss), SLOPE, rtol=1e-5)
    np.testing.assert_allclose(_slope(partial(_slope, loss)), CURVATURE, rtol=1e-5)
    torch = needs("torch")
    theirs = partial(_in_chunks(torch), y=torch.tensor([1]))
    assert torch.func.jvp(theirs, (torch.tensor(ROW),), (torch.tensor(ALONG),))[1] == 0
    with pytest.raises(RuntimeError):
        torch.func.hessian(theirs)(torch.tensor(ROW))


def test_derivative_by_class_weights():
    by_weights = jax.grad(lambda w: jaxce.cross_entropy(ROW, np.array([1]), class_weights=w, reduction="sum"))
    np.testing.assert_allclose(by_weights(jnp.ones(3)), [0, -np.log(SOFTMAX[1]), 0], rtol=1e-6)
    torch = needs("torch")
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.nn.functional.cross_entropy(torch.tensor(ROW), torch.tensor([1]), torch.ones(3, requires_grad=True))
