"""Targets of a few classes each: their numbers and their masses, standing where a distribution over all would."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Float, Integer

from jaxce._types import ArrayLike, Distributions, HeldArray, Labels


@partial(jax.tree_util.register_dataclass, data_fields=["classes", "masses"], meta_fields=[])
@dataclass(frozen=True, init=False)
class SparseTargets:
    """A distribution over K classes of every row, in place of one over all classes, which is never stored.

    For the K likeliest tokens of a teacher, for the two labels of mixup, and for labels that several raters gave. With
    classes c_k and masses m_k the target of a row is::

        t = Σ_k m_k · onehot(c_k)

    `cross_entropy`, `linear_cross_entropy`, `custom_loss`, `summarize` and `imbalance.expected_cost` take them in place
    of a distribution, with every option, and read K logits of a row: the losses are those of the distribution. A
    pytree: its arrays may be differentiated, mapped and sharded like any others.

    A class that is listed twice has the sum of both masses. Masses need not sum to 1. A class outside [0, C) makes its
    row's loss NaN, and a NumPy class an error at once, unless its mass is 0: then it is padding, and has no gradient. A
    row without classes, K = 0, has a loss of 0. Where a listed class leads the others, loss and gradient at it are as
    exact as a label's. Elsewhere p − t is a difference, as for distributions. Beside the gradient a step needs some
    arrays of the masses' shape, and on a CPU, for logits that are held in half precision, one of theirs.

    Attributes:
        classes: (..., K), any integer dtype; ... are the rows, which are the axes of the losses. K is last, whatever
            the class axis of the logits is. Where classes are split over a mesh they stay numbers of all classes.
        masses: (..., K), any floating dtype. The gradient is the true one, log_z − z at their classes, and 0 by
            convention where a mass is 0 on a logit of −inf.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> logits = jnp.array([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        >>> targets = jaxce.SparseTargets(jnp.array([[0, 2], [1, -1]]), jnp.array([[0.7, 0.3], [1.0, 0.0]]))
        >>> distribution = jnp.array([[0.7, 0.0, 0.3], [0.0, 1.0, 0.0]])
        >>> print(f"{jaxce.cross_entropy(logits, targets):.4f} {jaxce.cross_entropy(logits, distribution):.4f}")
        0.9031 0.9031

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """

    classes: HeldArray
    masses: HeldArray

    def __init__(self, classes: Integer[ArrayLike, "*rows listed"], masses: Float[ArrayLike, "*rows listed"]):
        # As they came: where the targets are read, the door makes arrays of them.
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "masses", masses)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the masses."""
        return self.masses.dtype


Targets = Labels | Distributions | SparseTargets
