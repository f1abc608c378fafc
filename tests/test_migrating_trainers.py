"""The formulas of docs/migrating_trainers.md are the functions of the trainers, where these are installed.

haliax is Levanter's library of named arrays, and has the part of its loss that is compared here.
"""

import contextlib
import io
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_migrating import DOCS, _blocks

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("promotion")]


@pytest.fixture
def promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@cache
def _page():
    """What the page binds outside of the blocks that say something by jaxce."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in _blocks((DOCS / "migrating_trainers.md").read_text()):
            for example in block.examples if block.owner in (None, "Formula") else ():
                exec(compile(example.source, "migrating_trainers.md", "single"), names)
    return names


def _assert_same(actual, expected):
    jax.tree.map(lambda *both: np.testing.assert_allclose(*both, rtol=1e-6, atol=1e-7), actual, expected)


def test_levanter():
    hax = pytest.importorskip("haliax")
    from haliax.nn import cross_entropy_loss_and_log_normalizers

    page = _page()
    batch, position, vocabulary = hax.Axis("batch", 2), hax.Axis("position", 4), hax.Axis("vocabulary", 6)
    labels = hax.roll(hax.named(page["targets"], (batch, position)), -1, position)
    one_hots = hax.nn.one_hot(labels, vocabulary, dtype=jnp.float32)

    def loss(logits, weight, penalty):
        named = hax.named(logits, (batch, position, vocabulary))
        losses, log_z = cross_entropy_loss_and_log_normalizers(named, vocabulary, one_hots)
        weight = hax.named(weight.at[:, -1].set(0), (batch, position))
        return (hax.sum((losses + penalty * log_z**2) * weight) / hax.sum(weight)).scalar()

    arguments = page["logits"], page["weight"], 1e-2
    expected = jax.value_and_grad(loss)(*arguments)
    actual = jax.value_and_grad(page["levanter_loss"])(page["logits"], page["targets"], *arguments[1:])
    _assert_same(actual, expected)


def test_tunix():
    pytest.importorskip("tunix")
    from tunix.distillation.strategies.logit import LogitStrategy
    from tunix.sft.peft_trainer import _default_loss_fn

    page = _page()
    logits, targets, one_hots = page["logits"], page["targets"], page["one_hots"]

    def loss(logits, tokens, mask):
        return _default_loss_fn(lambda *_: (logits, None), tokens, mask, positions=None, attention_mask=None)

    for mask in (page["mask"], page["mask"] / 2, 0 * page["mask"]):
        arguments = logits, targets, mask
        _assert_same(jax.value_and_grad(page["tunix_loss"])(*arguments), jax.value_and_grad(loss)(*arguments))
    half = logits.astype(jnp.bfloat16)
    assert page["tunix_loss"](half, targets, page["mask"]).dtype == loss(half, targets, page["mask"]).dtype
    for top_k in (0, 3):
        options = {"temperature": 2.0, "alpha": 0.5, "distill_top_k": top_k}
        strategy = LogitStrategy(_unused, _unused, _unused, **options)
        expected, _ = strategy.compute_loss(logits, page["teacher"], one_hots)
        _assert_same(page["tunix_distillation"](logits, page["teacher"], one_hots, top_k), expected)


def _unused(*_):
    """In place of a model."""


def test_easydel():
    pytest.importorskip("easydel")
    from easydel.infra.loss_utils import ForCausalLMLoss, LossConfig

    def loss(logits, labels, attention=None, **options):
        return ForCausalLMLoss(logits, labels, attention_mask=attention, config=LossConfig(**options)).loss

    page = _page()
    logits, labels, answers, attention = (page[name] for name in ("logits", "labels", "answers", "attention"))
    formula = page["easydel_loss"]
    _assert_same(formula(logits, labels, z_loss=1e-2), loss(logits, labels, z_loss=1e-2))
    _assert_same(
        formula(logits, labels, alpha=0.1, z_loss=1e-2), loss(logits, labels, label_smoothing=0.1, z_loss=1e-2)
    )
    arguments = logits, answers, attention
    _assert_same(formula(*arguments, z_loss=1e-2), loss(*arguments, z_loss=1e-2))
    _assert_same(formula(*arguments, mean=True), loss(*arguments, z_loss=1e-2, reduction="mean"))
    assert loss(logits.astype(jnp.bfloat16), labels).dtype == jnp.bfloat16
    assert loss(logits.astype(jnp.bfloat16), labels, compute_dtype="fp32").dtype == jnp.float32
    assert jnp.isnan(loss(logits, page["ignored"]))

    by_number = loss(*arguments, loss_normalizing_factor=16)  # the mask is not read
    _assert_same(by_number, loss(logits, answers, reduction="sum") / 16)

    blocks, dense = (
        jax.grad(lambda logits, size=size: loss(logits, answers, attention, chunk_block_size=size))(logits)
        for size in (4096, None)
    )
    prompt = jax.nn.softmax(logits[0, :2]) / attention[:, 1:].sum()
    np.testing.assert_array_equal(blocks[0, :2], 0)
    _assert_same(dense[0, :2], prompt)
    _assert_same(dense[0, 2:], blocks[0, 2:])


def test_easydel_distillation():
    pytest.importorskip("easydel")
    from easydel.trainers.distillation_trainer._fn import distillation_loss

    page = _page()
    for labels in (page["labels"], page["ignored"]):
        arguments = page["logits"], page["teacher"]
        expected, _ = distillation_loss(*arguments, labels=labels, use_hard_labels=True)
        _assert_same(page["easydel_distillation"](*arguments, labels), expected)
