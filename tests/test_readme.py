"""The README's code, pasted into a script block by block, prints what its comments say, and its words are true."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def names():
    """What a script of all blocks has defined; each block has been compared."""
    for package in ("flax", "optax"):
        pytest.importorskip(package)
    printed = []
    names = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    for block in BLOCKS:
        printed.clear()
        exec(block, names)
        assert printed == SHOWN.findall(block), block
    return names


def test_blocks_print_what_their_comments_say(names):
    assert sum(block.count("print(") for block in BLOCKS) == len(SHOWN.findall("\n".join(BLOCKS))) >= 3
    assert {"masked_loss", "train_step"} <= names.keys()


@jax.numpy_dtype_promotion("standard")
def test_what_it_says_of_both_losses(names):
    by_hand, logits, labels = names["masked_loss"], names["logits"], names["labels"]

    def ours(logits, labels):
        return names["jaxce"].cross_entropy(logits, labels, ignore_index=-1)

    def gradients(logits, labels):
        return [jax.grad(loss)(logits, labels) for loss in (by_hand, ours)]

    padded = logits.at[2].set(jnp.nan)
    of_hand, of_ours = gradients(padded, labels)
    assert jnp.isnan(of_hand).any()
    assert ours(padded, labels) == ours(logits, labels)
    assert not of_ours[2].any()
    assert jnp.isfinite(of_ours).all()

    nothing = jnp.full(3, -1)
    assert jnp.isnan(by_hand(logits, nothing))
    assert ours(logits, nothing) == 0
    of_hand, of_ours = gradients(logits, nothing)
    assert jnp.isnan(of_hand).any()
    assert not of_ours.any()

    half = logits.astype(jnp.bfloat16)
    assert (by_hand(half, labels).dtype, ours(half, labels).dtype) == (jnp.bfloat16, jnp.float32)

    confident, label = jnp.array([[20.0, 0.0]]), jnp.array([0])
    assert by_hand(confident, label) == 0
    assert f"the loss is {ours(confident, label):.4g}, right to seven digits" in README
    assert ours(confident, label) == pytest.approx(2.0611536181902037e-09, rel=1e-7)


def test_it_fits_a_phone_and_a_reader():
    assert len(README.splitlines()) <= 170
    assert max(len(line) for block in BLOCKS for line in block.splitlines()) <= 60
