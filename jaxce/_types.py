"""Names for the shapes that pass between the modules.

`*rows` are the axes of the losses (batch, sequence, space: any number of them, or none), `classes` is the class axis.
The annotations are documentation for the reader and are enforced by the tests, never at run time.
"""

from typing import Literal, Protocol, SupportsIndex, TypedDict

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Real


class HoldsArray(Protocol):
    """What JAX takes for the array that it holds: a variable of Flax."""

    def __jax_array__(self) -> jax.Array: ...


HeldArray = jax.Array | np.ndarray  # what the door makes of an `ArrayLike`
ArrayLike = jax.Array | np.ndarray | np.generic | HoldsArray
AxisName = str | tuple[str, ...] | list[str]
RowAxisNames = AxisName | jax.sharding.PartitionSpec
Scalar = float | ArrayLike

Logits = Float[ArrayLike, "*rows classes"]
Labels = Integer[ArrayLike | int, "*rows"]
Distributions = Float[ArrayLike, "*rows classes"]
Hidden = Float[ArrayLike, "*rows features"]
Kernel = Float[ArrayLike, "features classes"]
RowWeights = Float[ArrayLike, "*rows"]
RowMask = Bool[ArrayLike | bool, "*rows"]
ClassVector = Float[ArrayLike, " classes"]
ClassCounts = Real[ArrayLike, " classes"]
Costs = Real[ArrayLike, "classes classes"]
Elements = Float[ArrayLike, "*elements"]
ElementMask = Bool[ArrayLike | bool, "*elements"]

PerRow = Float[Array, "*rows"]
MaskPerRow = Bool[Array, "*rows"]

Reduction = Literal["none", "sum", "mean", "parts"]
ToArray = Literal["none", "sum", "mean"]
ToParts = Literal["parts"]
Divergence = Literal["forward", "reverse", "jensen_shannon"]


class RowOptions(TypedDict, total=False):
    """Options of every loss; for the overloads that tell the two return types apart."""

    weights: RowWeights | None
    where: RowMask | None


class ReductionOptions(TypedDict, total=False):
    """Options of `reduce_losses`, whose second argument are the weights."""

    where: ElementMask | None
    batch_axis_name: RowAxisNames | None


class LabelOptions(RowOptions, total=False):
    """Options of every loss with labels, for whatever the logits are."""

    class_weights: ClassVector | None
    ignore_index: SupportsIndex | None


class MeshOptions(TypedDict, total=False):
    """Options of losses whose classes may be split over a mesh."""

    num_classes: SupportsIndex | None
    class_axis_name: AxisName | None
    batch_axis_name: RowAxisNames | None


class ScoreOptions(LabelOptions, total=False):
    """Options of every loss with labels over the classes of an array."""

    axis: SupportsIndex


class ClassOptions(ScoreOptions, MeshOptions, total=False):
    """Options of the losses that are arithmetic on a summary."""


class CustomOptions(RowOptions, MeshOptions, total=False):
    """Options of a loss of one's own."""

    rows: object
    class_vector: ClassVector | None
    entropy: bool
    argmax: bool
    axis: SupportsIndex
    ignore_index: SupportsIndex | None


class HeadOptions(TypedDict, total=False):
    """Options of every loss of a linear head."""

    bias: ClassVector | None
    softcap: Scalar | None
    temperature: Scalar | None
    feature_axis_name: AxisName | None
    block_bytes: SupportsIndex | None
    recompute: bool | None


class LinearOptions(LabelOptions, HeadOptions, MeshOptions, total=False):
    """Options of a linear head's losses over classes."""


class DistillationOptions(RowOptions, MeshOptions, total=False):
    """Options of the distance between two models' logits."""

    divergence: Divergence
    mixture: Scalar
