"""Logits that are never stored: hidden and kernel, standing where an array of logits would."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import SupportsIndex

import jax
import numpy as np

from jaxce._conventions import accumulator
from jaxce._types import AxisName, ClassVector, HeldArray, Hidden, Kernel, Scalar


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "kernel", "bias", "softcap", "temperature"],
    meta_fields=["feature_axis_name", "block_bytes", "recompute"],
)
@dataclass(frozen=True, init=False)
class LinearLogits:
    """The logits hidden · kernel + bias, which are never stored: use them where an array of logits would stand.

    For language models and other heads with many classes, where the logits and their gradient would be the largest
    arrays of the step. `cross_entropy`, `focal_loss`, `poly_loss`, `distillation_loss`, `custom_loss` and `summarize`
    take them in place of an array, with every option; the losses are those of the array. Where the logits are small,
    the array is simpler and as fast. A pytree: its arrays may be differentiated, mapped and sharded like any others.

    With softcap s and temperature T the logits are::

        z = (s / T) · tanh((hidden · kernel + bias) / s)

    There are two ways to the gradient. Recomputing goes through blocks of classes: the backward pass makes each block
    of logits a second time, four matrix multiplications in all. Beside the gradients it needs one float32 array of
    hidden's shape and a block, whatever V is. The other goes through blocks of rows and makes the gradients in the
    forward pass, three matrix multiplications in all, but holds float32 gradients of hidden and kernel until they are
    rounded. It is for scalar reductions and first derivatives: where another derivative is taken, or the losses of the
    rows are returned, the backward pass recomputes. Without a derivative, neither way computes a gradient.

    Rows that do not count cost nothing: those that count are brought together, and of tiles in which none does no
    logits are made. Of distributions, whose rows are not moved, stretches are left out. On a mesh every device does so
    by itself, if types or names say how the rows are split.

    Attributes:
        hidden: (..., D), any floating dtype. The products with `kernel` are in the dtype of both, accumulated in at
            least float32; their precision is that of `jax.default_matmul_precision`. Those of bfloat16 and float32 are
            in float32, or where that precision is "bfloat16" or "BF16_BF16_F32" in bfloat16, as in `flax`'s Dense.
        kernel: (D, V), any floating dtype, as in `flax`'s Dense. Of tied embeddings (V, D) pass `embedding.T`: GPUs
            and TPUs read it as it lies. A TPU may copy the finished gradient, where V is large.
        bias: (V,), floating. −inf leaves a class out, unless there is a softcap.
        softcap: s > 0, scalar. Gemma 2 has 30.
        temperature: T in [1e-9, 1e9], scalar, or an array of the rows' shape, which is hidden's without features.
        feature_axis_name: mesh axes that split the features of `kernel` (FSDP), and the rows too; hidden has all
            features. A block of the kernel is gathered when it is used and its gradient is scattered, so that no device
            holds the kernel whole; the backward pass recomputes. On an Explicit mesh the types say it.
        block_bytes: what one block of logits may take in float32. None is an eighth of all, but at least 4 MiB, and at
            most 32 MiB for blocks of classes and 512 MiB for blocks of rows; fewer than 1024 rows are one block of
            rows, and where features are split a block has at most an eighth of the classes, or 512. For N rows a block
            has max(1, block_bytes // 4N) classes, or max(1, block_bytes // 4V) rows. Of so many rows that it would have
            fewer than 512 classes, and fewer than N / 16, it has that many, and its rows come in tiles.
        recompute: whether the backward pass makes the logits again. None does so where `kernel` is narrower than
            float32, so that its float32 gradient would be an array of its own, the largest of the step; and not
            otherwise.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> logits = jaxce.LinearLogits(jnp.ones((4, 2)), jnp.eye(2, 1000), softcap=30.0)
        >>> print(logits.shape, logits.dtype)
        (4, 1000) float32
        >>> print(f"{jaxce.cross_entropy(logits, jnp.array([0, 1, 2, -1]), ignore_index=-1):.4f}")
        6.2448

    References:
        - Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.
        - Gemma Team, Gemma 2: Improving Open Language Models at a Practical Size, 2024 (soft-capping).
    """

    hidden: HeldArray
    kernel: HeldArray
    bias: HeldArray | None
    softcap: HeldArray | None
    temperature: HeldArray | None
    feature_axis_name: AxisName | None
    block_bytes: SupportsIndex | None
    recompute: bool | None

    def __init__(
        self,
        hidden: Hidden,
        kernel: Kernel,
        *,
        bias: ClassVector | None = None,
        softcap: Scalar | None = None,
        temperature: Scalar | None = None,
        feature_axis_name: AxisName | None = None,
        block_bytes: SupportsIndex | None = None,
        recompute: bool | None = None,
    ):
        # As they came: where the logits are read, the door makes arrays of them.
        arrays = {"hidden": hidden, "kernel": kernel, "bias": bias, "softcap": softcap, "temperature": temperature}
        names = tuple(feature_axis_name) if isinstance(feature_axis_name, list) else feature_axis_name  # to be hashable
        settings = {"feature_axis_name": names, "block_bytes": block_bytes, "recompute": recompute}
        for name, value in (arrays | settings).items():
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits, (..., V)."""
        return (*self.hidden.shape[:-1], self.kernel.shape[-1])

    @property
    def ndim(self) -> int:
        """The number of axes of the logits."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the logits, which is float64 where hidden, kernel or bias have it, and else float32."""
        return accumulator(self.hidden, self.kernel, self.bias)
