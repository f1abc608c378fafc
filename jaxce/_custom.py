"""Losses of one's own: the frame of every loss over classes, for a formula of a row's summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, SupportsIndex, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxce._arguments import check_bool, check_reduction, shown
from jaxce._autodiff import Structure
from jaxce._conventions import accumulator, silence
from jaxce._formula import evaluate, recomputes
from jaxce._inputs import ClassInputs, OnMesh, check_classes
from jaxce._logits import LinearLogits
from jaxce._mesh import varying
from jaxce._reduction import MeanParts, reduce_rows
from jaxce._rows import Rows, on_slices, read_classes
from jaxce._rule import over_rows
from jaxce._slice import Asked
from jaxce._split import aligned
from jaxce._summary import Summary, summarize_rows
from jaxce._targets import Targets
from jaxce._types import (
    AxisName,
    ClassVector,
    CustomOptions,
    Logits,
    PerRow,
    Reduction,
    RowAxisNames,
    RowMask,
    RowWeights,
    ToArray,
    ToParts,
)

_Aux = TypeVar("_Aux")


@overload
def custom_loss(
    formula: Callable[..., Array],
    logits: Logits | LinearLogits,
    targets: Targets,
    *,
    has_aux: Literal[False] = ...,
    reduction: ToArray = ...,
    **options: Unpack[CustomOptions],
) -> Array: ...
@overload
def custom_loss(
    formula: Callable[..., Array],
    logits: Logits | LinearLogits,
    targets: Targets,
    *,
    has_aux: Literal[False] = ...,
    reduction: ToParts,
    **options: Unpack[CustomOptions],
) -> MeanParts: ...
@overload
def custom_loss(
    formula: Callable[..., tuple[Array, _Aux]],
    logits: Logits | LinearLogits,
    targets: Targets,
    *,
    has_aux: Literal[True],
    reduction: ToArray = ...,
    **options: Unpack[CustomOptions],
) -> tuple[Array, _Aux]: ...
@overload
def custom_loss(
    formula: Callable[..., tuple[Array, object]],
    logits: Logits | LinearLogits,
    targets: Targets,
    *,
    has_aux: Literal[True],
    reduction: ToParts,
    **options: Unpack[CustomOptions],
) -> tuple[MeanParts, object]: ...
def custom_loss(
    formula: Callable[..., object],
    logits: Logits | LinearLogits,
    targets: Targets,
    *,
    rows: object = None,
    class_vector: ClassVector | None = None,
    entropy: bool = False,
    argmax: bool = False,
    has_aux: bool = False,
    axis: SupportsIndex = -1,
    weights: RowWeights | None = None,
    where: RowMask | None = None,
    ignore_index: SupportsIndex | None = None,
    num_classes: SupportsIndex | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: RowAxisNames | None = None,
    reduction: Reduction = "mean",
) -> Array | MeanParts | tuple[Array | MeanParts, object]:
    r"""A loss of your own over classes: a formula of the numbers that summarize a row of logits.

    For policy gradients, preferences, scaled cross entropies, and whatever else is arithmetic on log-probability,
    entropy and prediction. It has what the losses here have: their accuracy and every derivative, `LinearLogits`,
    masks, meshes and parts. Where the numbers of several rows meet in one loss, use `summarize`.

    The formula sees one row. It is mapped over the rows, and so cannot mix them. It gets a `Summary` of scalars: `nll`
    is −log p of the target, −`nll` its log-probability, and `rows`, if there are any, with the numbers of the same row.
    It may close over settings, traced or differentiated ones too.

    Args:
        formula: (summary) → loss, or (summary, rows) → loss where `rows` is given. With `has_aux` it returns a pair
            of the loss and a pytree of numbers to be logged.
        logits: (..., C), or the classes along `axis`, any floating dtype; or `LinearLogits`.
        targets: labels in [0, C), any integer dtype, the shape of `logits` without the class axis; or distributions,
            floating, the shape of `logits`; or `SparseTargets`.
        rows: a pytree of arrays of the losses' shape, any dtype: advantages, old log-probabilities. Differentiable.
        class_vector: (C,), real, for `summary.spread`, as in `summarize`.
        entropy: whether the formula reads `summary.entropy`, of the softmax in nats.
        argmax: whether it reads `summary.argmax`, the class of the largest logit.
        has_aux: whether it returns numbers beside the loss. They are reduced like the losses, in "parts" too, and have
            no derivative.
        axis: the class axis of `logits`.
        weights: weights of the rows, the shape of the losses.
        where: boolean, the shape of the losses; rows where it is false are not read, nor are their `rows`.
        ignore_index: label of rows that do not count.
        num_classes: how many classes are no padding, as in `cross_entropy`.
        class_axis_name: mesh axes that split the classes, as in `cross_entropy`.
        batch_axis_name: mesh axes that split the rows, as in `cross_entropy`.
        reduction: "mean", "sum", "none" or "parts".

    Returns:
        the loss as `cross_entropy` returns it; with `has_aux` a pair of it and the pytree of the formula, reduced.
        Outside of `jit` the formula is traced anew by every call. With `recompute=False` inside `shard_map`, a formula
        that closes over something traced recomputes; make it a pytree, as `jax.tree_util.Partial` does, or pass the
        setting in `rows`.

    Raises:
        TypeError: a dtype is wrong, or the formula does not return what it must.
        ValueError: a shape, `axis`, `reduction` or a NumPy label is wrong, or the formula reads a number that was not
            asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxce
        >>> def reinforce(summary, advantage):
        ...     return advantage * summary.nll - 0.01 * summary.entropy, {"entropy": summary.entropy}
        >>> logits, actions = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0])
        >>> advantages = jnp.array([1.0, -0.5])
        >>> loss, logged = jaxce.custom_loss(
        ...     reinforce, logits, actions, rows=advantages, entropy=True, has_aux=True
        ... )
        >>> print(f"{loss:.4f} {logged['entropy']:.4f}")
        -0.2696 0.4738
    """
    inputs = check_classes(
        logits,
        targets,
        axis=axis,
        weights=weights,
        where=where,
        class_vector=class_vector,
        ignore_index=ignore_index,
        extras=rows,
        on_mesh=OnMesh(num_classes, class_axis_name, batch_axis_name),
        may_be_lazy=True,
    )
    check_reduction(reduction)
    asked = Asked(check_bool("entropy", entropy), check_bool("argmax", argmax))
    custom = _custom(formula, asked, check_bool("has_aux", has_aux))
    inputs = jax.tree.map(jnp.asarray, inputs)  # as `jit` does, which would keep a formula and what it closes over
    if inputs.split.is_whole and (recomputes(inputs, reduction) or custom.closed(inputs) is not custom):
        loss, aux = _over_devices(custom, inputs, reduction)
    else:
        loss, aux = evaluate(custom, inputs, reduction, close=Custom.closed)
    return (loss, aux) if has_aux else loss


def _over_devices(custom: Custom, inputs: ClassInputs, reduction: str) -> tuple[Array | MeanParts, object]:
    """Where a mesh splits arrays that are whole: the summaries by every device, and the formula of all, outside.

    There it may close over whatever it likes, which inside could not be of an Explicit mesh.
    """

    def summarize_slice(inputs: ClassInputs, _: None) -> tuple[Summary, Array | None, Array | None]:
        rows = read_classes(inputs)
        numbers = custom.summarize(rows), rows.counts, rows.weights
        return jax.tree.map(lambda number: jnp.reshape(number, inputs.rows_shape), numbers)

    numbers = on_slices(summarize_slice, inputs, None, per_row=True)
    summary, counts, weights, extras = aligned((*numbers, jax.tree.map(jnp.asarray, inputs.extras)))
    losses, aux = custom.losses(summary, extras, counts)

    def reduced(numbers: Array) -> Array | MeanParts:
        return reduce_rows(numbers, counts, weights, reduction=reduction)

    return reduced(losses), jax.tree.map(reduced, lax.stop_gradient(aux))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["settings"],
    meta_fields=["structure", "others", "asked", "has_aux"],
)
@dataclass(frozen=True)
class Custom:
    """A user's formula as one of the house: its arrays are the pytree's, and all else is part of the program."""

    settings: list[Array | None]
    structure: Structure[Callable[..., object]]
    others: tuple[object, ...]
    asked: Asked
    has_aux: bool

    def __call__(self, rows: Rows) -> tuple[PerRow, object]:
        """The losses, and what the formula has beside them, in the dtype of the arithmetic; 0 of rows not counted."""
        return self.losses(self.summarize(rows), rows.extras, rows.counts)

    def summarize(self, rows: Rows) -> Summary:
        """The summary of the rows, with what was asked for."""
        entropy, argmax = self.asked.entropy, self.asked.argmax
        return summarize_rows(rows, class_vector=rows.class_vector, entropy=entropy, argmax=argmax)

    def losses(self, summary: Summary, extras: object, counts: Array | None) -> tuple[PerRow, object]:
        """As a call, given the summary."""

        def of_a_row_that_counts(numbers: Array) -> Array:
            # By no means 0, where a formula may have no value or no slope.
            return numbers if counts is None else jnp.where(counts, numbers, jnp.ones_like(numbers))

        arguments = jax.tree.map(of_a_row_that_counts, (_Asked(*summary), extras))
        result = over_rows(self._of_row, summary.nll.ndim, (0, 0))(*arguments)
        return jax.tree.map(lambda numbers: silence(counts, numbers.astype(summary.nll.dtype)), result)

    def closed(self, rows: Rows | ClassInputs) -> Custom | None:
        """The same formula with what it closes over, and is traced, among its settings; None if that cannot be.

        Inside `shard_map` it cannot: what is found in a closure would not be of the type of the rows.
        """
        number = jnp.zeros((), accumulator(rows.logits, rows.targets, rows.weights, rows.class_weights))
        spread = None if rows.class_vector is None else number
        argmax = jnp.zeros((), jnp.int32) if self.asked.argmax else None
        summary = _Asked(number, number, spread, number if self.asked.entropy else None, argmax)
        extras = jax.tree.map(lambda array: jnp.zeros((), array.dtype), rows.extras)
        converted, found = jax.closure_convert(lambda *row: self._of_row(*row), summary, extras)
        if found and varying(rows):
            return None

        def call(found: list[Array], summary: Summary, extras: object = None) -> object:
            loss, aux = converted(summary, extras, *found)
            return (loss, aux) if self.has_aux else loss

        return _custom(jax.tree_util.Partial(call, found), self.asked, self.has_aux) if found else self

    def _of_row(self, summary: Summary, extras: object) -> tuple[Array, object]:
        pairs = zip(self.settings, self.others, strict=True)
        formula = self.structure.unflatten([other if array is None else array for array, other in pairs])
        result = formula(summary) if extras is None else formula(summary, extras)
        if not self.has_aux:
            return _check_number("the loss", result), None
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"`formula` must return a pair, (loss, aux), with has_aux=True; got {shown(result)}.")
        loss, aux = result
        return _check_number("the loss", loss), jax.tree.map(partial(_check_number, "a number beside it"), aux)


_WORDS = {"spread": "class_vector", "entropy": "entropy=True", "argmax": "argmax=True"}


class _Asked(Summary):
    """A summary that says what to pass where it is asked for a number that it has not."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        if value is None and name in _WORDS:
            raise ValueError(
                f"`formula` reads `summary.{name}`, which is only there for who asks: pass {_WORDS[name]}."
            )
        return value


def _check_number(what: str, value: object) -> Array:
    """Checks what a formula returns for one row."""
    if not isinstance(value, Array | np.ndarray | np.generic | float | int) or jnp.shape(value):
        raise TypeError(
            f"`formula` must return one number for a row, and {what} is {shown(value)}. It sees one row: what there is "
            "of every row goes into `rows`, and comes one by one."
        )
    return jnp.asarray(value)


def _custom(formula: Callable[..., object], asked: Asked, has_aux: bool) -> Custom:
    if not callable(formula):
        raise TypeError(f"`formula` must be a function of a summary; got {shown(formula)}.")
    leaves, structure = jax.tree.flatten(formula)
    is_array = [isinstance(leaf, Array | float) for leaf in leaves]
    settings = [jnp.asarray(leaf) if is_it else None for leaf, is_it in zip(leaves, is_array, strict=True)]
    others = tuple(None if is_it else leaf for leaf, is_it in zip(leaves, is_array, strict=True))
    return Custom(settings, structure, others, asked, has_aux)
