"""Every wrong call says what was expected, what came, and what to do: the texts in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lazy import linear, linear_distillation

import jaxce

LOGITS = jnp.zeros((8, 10))
LABELS = jnp.zeros(8, jnp.int32)
TARGETS = jnp.full((8, 10), 0.1)
TOKENS = jnp.zeros((8, 128, 320))
LISTED = jaxce.SparseTargets(jnp.zeros((8, 3), jnp.int32), jnp.ones((8, 3)))
LAZY = jaxce.LinearLogits(LOGITS, jnp.eye(10))


def _ce(*arguments, **options):
    return lambda: jaxce.cross_entropy(*arguments, **options)


def _on_mesh(call, *arguments, kind=AxisType.Auto, **options):
    """A call inside `shard_map`, or on whole arrays where no `in_specs` are given."""

    def run():
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh):
            return (jax.shard_map(call, out_specs=P(), **options) if options else call)(*arguments)

    return run


def _of_two_meshes():
    meshes = jax.make_mesh((2, 4), ("data", "model")), jax.make_mesh((8,), ("rest",))
    hidden = jax.device_put(jnp.zeros((8, 4)), NamedSharding(meshes[0], P("data")))
    kernel = jax.device_put(jnp.zeros((4, 16)), NamedSharding(meshes[1], P(None, "rest")))
    return jaxce.linear_cross_entropy(hidden, kernel, LABELS)


CASES = {
    "shard_map without types": (
        _on_mesh(
            lambda z: jaxce.cross_entropy(z, LABELS, class_axis_name="model"),
            jnp.zeros((8, 12)),
            in_specs=P(None, "model"),
            check_vma=False,
        ),
        ValueError,
        "`shard_map` with check_vma=False, and `pmap`, do not know what differs along 'model', and would get the gradients "
        "wrong. Leave check_vma at True, its default. For `vmap` and `pmap` pass reduction='parts', and add the parts up "
        "by their `psum`.",
    ),
    "an axis of vmap": (
        lambda: jax.vmap(lambda z, y: jaxce.cross_entropy(z, y, batch_axis_name="rows"), axis_name="rows")(
            LOGITS, LABELS
        ),
        ValueError,
        "'rows' must be an axis of a mesh: of the `shard_map` around the loss, whose arguments are slices, or of "
        "`jax.set_mesh`, whose arrays are whole; here are none. For `vmap` and `pmap` pass reduction='parts', and add the "
        "parts up by their `psum`.",
    ),
    "classes that are not split": (
        _on_mesh(
            lambda h, k: jaxce.linear_cross_entropy(h, k, LABELS, class_axis_name="model"),
            jnp.zeros((8, 4)),
            jnp.zeros((4, 12)),
            in_specs=P(),
        ),
        ValueError,
        "`class_axis_name` names 'model', but all devices along it hold the same `kernel`: its classes are not split. "
        "Split them by the in_specs of `shard_map`, or leave the name out.",
    ),
    "labels that may differ where classes are split": (
        _on_mesh(
            lambda z, y: jaxce.cross_entropy(z, jax.lax.all_gather(y, "model", tiled=True), class_axis_name="model"),
            jnp.zeros((8, 12)),
            LABELS,
            in_specs=(P(None, "model"), P("model")),
        ),
        ValueError,
        "`targets` may differ along 'model', over which the classes are split, and must be the same there, by its type "
        "too. If it is, cast it: jax.lax.pmax(targets, 'model').",
    ),
    "a setting that may differ where classes are split": (
        _on_mesh(
            lambda z, gamma: jaxce.focal_loss(z, LABELS, gamma=gamma[0], class_axis_name="model"),
            jnp.zeros((8, 12)),
            jnp.ones(4),
            in_specs=(P(None, "model"), P("model")),
        ),
        ValueError,
        "`gamma` may differ along 'model', over which the classes are split, and must be the same there, by its type too. "
        "If it is, cast it: jax.lax.pmean(gamma, 'model').",
    ),
    "a teacher whose classes are not split": (
        _on_mesh(
            lambda h, k, t: linear_distillation(h, k, h, t, class_axis_name="model"),
            jnp.zeros((8, 4)),
            jnp.zeros((4, 12)),
            jnp.zeros((4, 3)),
            in_specs=(P(), P(None, "model"), P()),
        ),
        ValueError,
        "`class_axis_name` names 'model', but all devices along it hold the same `teacher_logits.kernel`: its "
        "classes are not split. Split them by the in_specs of `shard_map`, or leave the name out.",
    ),
    "one axis for rows and classes": (
        _on_mesh(lambda: jaxce.cross_entropy(LOGITS, LABELS, class_axis_name="data", batch_axis_name="data")),
        ValueError,
        "An axis of the mesh splits the rows or the classes, once: `class_axis_name` is 'data' and `batch_axis_name` is "
        "'data'.",
    ),
    "a set of axes, which has no order": (
        lambda: jaxce.cross_entropy(LOGITS, LABELS, class_axis_name={"model"}),
        TypeError,
        "`class_axis_name` must be the name of a mesh axis, or a tuple of names; got {'model'}.",
    ),
    "axes of rows that are no PartitionSpec": (
        lambda: jaxce.cross_entropy(LOGITS, LABELS, batch_axis_name=(None, "data")),
        TypeError,
        "`batch_axis_name` must be the name of a mesh axis, or a tuple of names, or a PartitionSpec where several axes of "
        "rows are split; got (None, 'data').",
    ),
    "arrays of two meshes": (
        _of_two_meshes,
        ValueError,
        "`hidden` and `kernel` are split over 'data', 'rest' by their types, and the mesh in force has 'data', 'model'. "
        "Put both on one mesh.",
    ),
    "rows that are not split": (
        _on_mesh(lambda z: jaxce.cross_entropy(z, LABELS, batch_axis_name="data"), LOGITS, in_specs=P()),
        ValueError,
        "`batch_axis_name` names 'data', but all devices along it hold the same rows. Split them by the in_specs of "
        "`shard_map`, or leave the name out.",
    ),
    "losses that are not split": (
        _on_mesh(lambda losses: jaxce.reduce_losses(losses, batch_axis_name="data"), jnp.zeros(8), in_specs=P()),
        ValueError,
        "`batch_axis_name` names 'data', but all devices along it hold the same rows. Split them by the in_specs of "
        "`shard_map`, or leave the name out.",
    ),
    "a shard_map over too few axes": (
        _on_mesh(
            lambda z: jaxce.cross_entropy(z, LABELS[:4], batch_axis_name="data", class_axis_name="model"),
            jnp.zeros((8, 12)),
            in_specs=P("data"),
            axis_names={"data"},
        ),
        ValueError,
        "Rows and classes are split over 'data', 'model', and the `shard_map` around the loss splits its arguments over "
        "'data' alone. Pass it axis_names={'data', 'model'}, and split the arguments by its in_specs.",
    ),
    "classes that devices cannot share": (
        _on_mesh(lambda: jaxce.cross_entropy(LOGITS, LABELS, class_axis_name="model")),
        ValueError,
        "4 devices along 'model' cannot share 10 classes of `logits` evenly. Fill them up to 12 and pass num_classes=10.",
    ),
    "rows that devices cannot share": (
        _on_mesh(lambda: jaxce.cross_entropy(LOGITS[:7], LABELS[:7], batch_axis_name="data")),
        ValueError,
        "2 devices along 'data' cannot share 7 rows of `logits` evenly. Fill them up with rows that `where` leaves out.",
    ),
    "more axes of rows than there are": (
        _on_mesh(lambda: jaxce.cross_entropy(LOGITS, LABELS, batch_axis_name=P("data", "model"))),
        ValueError,
        "`batch_axis_name` splits 2 axes of rows, and `logits` has 1, of lengths (8,).",
    ),
    "class weights of all classes beside a slice": (
        _on_mesh(
            lambda z: jaxce.cross_entropy(z, LABELS, class_weights=jnp.ones(12), class_axis_name="model"),
            jnp.zeros((8, 12)),
            in_specs=P(None, "model"),
        ),
        ValueError,
        "`class_weights` must have shape (3,), one weight for each class along axis 1 of `logits`; got (12,). Weights of "
        "rows go into `weights`. Inside `shard_map` it is a slice, split like the classes.",
    ),
    "more classes than there are": (
        _ce(LOGITS, LABELS, num_classes=11),
        ValueError,
        "`num_classes` must be in [1, 10], the number of classes that `logits` has in all; got 11.",
    ),
    "a label of padding": (
        _ce(LOGITS, np.full(8, 9), num_classes=9),
        ValueError,
        "`targets` must be class indices in [0, 9); got 9 at position (0,). If 9 marks rows to leave out, pass "
        "where=targets != 9.",
    ),
    "shifted targets": (
        _ce(TOKENS, jnp.zeros((8, 127), jnp.int32)),
        ValueError,
        "`targets` must have shape (8, 128) for class indices or (8, 128, 320) for probabilities, with `logits` of shape "
        "(8, 128, 320) and class axis 2; got (8, 127). Were the targets shifted and the logits not?",
    ),
    "class axis elsewhere": (
        _ce(jnp.zeros((2, 5, 4, 4)), jnp.zeros((2, 4, 4), jnp.int32)),
        ValueError,
        "`targets` must have shape (2, 5, 4) for class indices or (2, 5, 4, 4) for probabilities, with `logits` of shape "
        "(2, 5, 4, 4) and class axis 3; got (2, 4, 4). Is the class axis another one? Pass axis=1.",
    ),
    "a kernel the other way round": (
        lambda: jaxce.linear_cross_entropy(jnp.zeros((8, 64)), jnp.zeros((320, 64)), LABELS),
        ValueError,
        "`kernel` must have shape (64, V), features of `hidden` first and classes last; got (320, 64) with `hidden` of "
        "shape (8, 64). Is it (V, D)? Pass kernel.T.",
    ),
    "labels of other tokens than hidden": (
        lambda: jaxce.linear_cross_entropy(jnp.zeros((8, 128, 64)), jnp.zeros((64, 320)), jnp.zeros((8, 127), int)),
        ValueError,
        "`targets` must have shape (8, 128) for class indices or (8, 128, 320) for probabilities, with `hidden · kernel` "
        "of shape (8, 128, 320) and class axis 2; got (8, 127). Were the targets shifted and the hidden not?",
    ),
    "a bias of other classes": (
        lambda: jaxce.linear_cross_entropy(jnp.zeros((8, 64)), jnp.zeros((64, 320)), LABELS, bias=jnp.zeros(64)),
        ValueError,
        "`bias` must have shape (320,), one number for each class; got (64,).",
    ),
    "a softcap of 0": (
        lambda: linear(jaxce.focal_loss)(jnp.zeros((8, 64)), jnp.zeros((64, 320)), LABELS, softcap=0.0),
        ValueError,
        "`softcap` must be in (0, inf); got 0.0.",
    ),
    "no bytes for a block": (
        lambda: linear(jaxce.poly_loss)(jnp.zeros((8, 64)), jnp.zeros((64, 320)), LABELS, block_bytes=0),
        ValueError,
        "`block_bytes` must be positive; got 0.",
    ),
    "recompute that is no bool": (
        lambda: jaxce.linear_cross_entropy(jnp.zeros((8, 64)), jnp.zeros((64, 320)), LABELS, recompute="auto"),
        TypeError,
        "`recompute` must be True, False or None, known when the function is traced; got 'auto'.",
    ),
    "a teacher of other rows": (
        lambda: linear_distillation(jnp.zeros((8, 64)), jnp.zeros((64, 320)), jnp.zeros((7, 32)), jnp.zeros((32, 320))),
        ValueError,
        "`teacher_logits` must have the shape of `hidden · kernel`, (8, 320); got (7, 320). Do both models share the rows "
        "and the classes?",
    ),
    "a teacher of other classes": (
        lambda: linear_distillation(jnp.zeros((8, 64)), jnp.zeros((64, 320)), jnp.zeros((8, 32)), jnp.zeros((32, 300))),
        ValueError,
        "`teacher_logits` must have the shape of `hidden · kernel`, (8, 320); got (8, 300). Do both models share the rows "
        "and the classes?",
    ),
    "a teacher's kernel the other way round": (
        lambda: jaxce.distillation_loss(LOGITS, jaxce.LinearLogits(jnp.zeros((8, 64)), jnp.zeros((10, 64)))),
        ValueError,
        "`teacher_logits.kernel` must have shape (64, V), features of `teacher_logits.hidden` first and classes last; got "
        "(10, 64) with `teacher_logits.hidden` of shape (8, 64). Is it (V, D)? Pass teacher_logits.kernel.T.",
    ),
    "lazy logits with the classes elsewhere": (
        _ce(LAZY, jnp.zeros(10, int), axis=0),
        ValueError,
        "`axis` must be -1 for LinearLogits, whose classes are last; got 0 of 2 axes.",
    ),
    "a held teacher with the classes elsewhere": (
        lambda: jaxce.distillation_loss(LOGITS, LAZY, axis=-2),
        ValueError,
        "`axis` must be -1 for LinearLogits, whose classes are last; got 0 of 2 axes.",
    ),
    "lazy log-probabilities": (
        lambda: jaxce.nll_loss(LAZY, LABELS),
        TypeError,
        "`log_probs` must be an array here; got LinearLogits, which are never stored. `cross_entropy`, `focal_loss`, "
        "`poly_loss`, `distillation_loss`, `custom_loss` and `summarize` take them as logits. Elsewhere pass hidden @ kernel.",
    ),
    "lazy scores": (
        lambda: jaxce.multi_margin_loss(LAZY, LABELS),
        TypeError,
        "`logits` must be an array here; got LinearLogits, which are never stored. `cross_entropy`, `focal_loss`, "
        "`poly_loss`, `distillation_loss`, `custom_loss` and `summarize` take them as logits. Elsewhere pass hidden @ kernel.",
    ),
    "an infinite temperature of lazy logits": (
        _ce(jaxce.LinearLogits(LOGITS, jnp.eye(10), temperature=np.inf), LABELS),
        ValueError,
        "`temperature` must be in [1e-09, 1e+09]; got inf.",
    ),
    "temperatures of classes": (
        _ce(jaxce.LinearLogits(LOGITS, jnp.eye(10), temperature=jnp.ones(10)), LABELS),
        ValueError,
        "`temperature` must be a scalar, or have the shape of the losses, (8,); got (10,). Nothing is broadcast.",
    ),
    "temperatures with a last axis of 1": (
        lambda: jaxce.distillation_loss(LOGITS, jaxce.LinearLogits(LOGITS, jnp.eye(10), temperature=jnp.ones((8, 1)))),
        ValueError,
        "`teacher_logits.temperature` must be a scalar, or have the shape of the losses, (8,); got (8, 1). Nothing is "
        "broadcast. Drop the last axis: teacher_logits.temperature.squeeze(-1).",
    ),
    "integer temperatures": (
        _ce(jaxce.LinearLogits(LOGITS, jnp.eye(10), temperature=LABELS), LABELS),
        TypeError,
        "`temperature` must have a floating dtype; got int32. Cast them: temperature.astype(jnp.float32).",
    ),
    "a wrong NumPy temperature": (
        _ce(
            jaxce.LinearLogits(LOGITS, jnp.eye(10), temperature=np.array([0, 1, -1, np.nan, 1, 1, 1, 1.0])),
            np.arange(8),
            where=np.arange(8) > 1,
            ignore_index=2,
        ),
        ValueError,
        "`temperature` must be in [1e-09, 1e+09]; got nan at position (3,).",
    ),
    "a wrong NumPy temperature of a teacher": (
        lambda: jaxce.distillation_loss(LOGITS, jaxce.LinearLogits(LOGITS, jnp.eye(10), temperature=np.zeros(8))),
        ValueError,
        "`teacher_logits.temperature` must be in [1e-09, 1e+09]; got 0 at position (0,).",
    ),
    "temperatures that may differ where classes are split": (
        _on_mesh(
            lambda h, k, t: jaxce.linear_cross_entropy(h, k, LABELS, temperature=t, class_axis_name="model"),
            jnp.zeros((8, 4)),
            jnp.zeros((4, 12)),
            jnp.ones(32),
            in_specs=(P(), P(None, "model"), P("model")),
        ),
        ValueError,
        "`temperature` may differ along 'model', over which the classes are split, and must be the same there, by its type "
        "too. If it is, cast it: jax.lax.pmean(temperature, 'model').",
    ),
    "labels with a last axis of 1": (
        _ce(LOGITS, jnp.zeros((8, 1), jnp.int32)),
        ValueError,
        "`targets` must have shape (8,) for class indices or (8, 10) for probabilities, with `logits` of shape (8, 10) and "
        "class axis 1; got (8, 1). Drop the last axis: targets.squeeze(-1).",
    ),
    "float labels": (
        _ce(LOGITS, jnp.zeros(8)),
        TypeError,
        "`targets` of dtype float32 are probabilities and must have the shape of `logits`, (8, 10); got (8,), the shape of "
        "class indices. Class indices are integers: targets.astype(jnp.int32).",
    ),
    "integer one-hot": (
        _ce(LOGITS, jnp.zeros((8, 10), jnp.int32)),
        TypeError,
        "`targets` of dtype int32 are class indices and must have shape (8,); got (8, 10), the shape of `logits`. "
        "Probabilities and one-hot vectors are floating: targets.astype(jnp.float32).",
    ),
    "bool targets": (
        _ce(LOGITS, jnp.zeros(8, bool)),
        TypeError,
        "`targets` must be class indices of an integer dtype, or probabilities of a floating dtype; got bool. Cast them: "
        "targets.astype(jnp.int32).",
    ),
    "bool one-hot": (
        _ce(LOGITS, jnp.zeros((8, 10), bool)),
        TypeError,
        "`targets` must be class indices of an integer dtype, or probabilities of a floating dtype; got bool. Cast them: "
        "targets.astype(jnp.float32).",
    ),
    "bool one-hot of a loss of labels": (
        lambda: jaxce.poly_loss(LOGITS, jnp.zeros((8, 10), bool)),
        TypeError,
        "`poly_loss` is defined for class indices: `targets` must be integers of shape (8,); got bool of shape (8, 10). "
        "Of one-hot vectors it takes the class: targets.argmax(1).",
    ),
    "integer one-hot of a loss of labels": (
        lambda: jaxce.nll_loss(LOGITS, jnp.zeros((8, 10), int)),
        TypeError,
        "`nll_loss` is defined for class indices: `targets` must be integers of shape (8,); got int32 of shape (8, 10). "
        "Of one-hot vectors it takes the class: targets.argmax(1).",
    ),
    "integer logits": (
        _ce(jnp.zeros((8, 10), jnp.int32), LABELS),
        TypeError,
        "`logits` must have a floating dtype; got int32. Cast them: logits.astype(jnp.float32).",
    ),
    "a list": (
        _ce([[0.0, 1.0]], LABELS),
        TypeError,
        "`logits` must be a jax.Array or a NumPy array; got builtins.list. Wrap it: jnp.asarray(logits).",
    ),
    "no class axis": (_ce(jnp.zeros(()), LABELS), ValueError, "`logits` must have a class axis; got shape ()."),
    "no classes": (
        _ce(jnp.zeros((8, 0)), LABELS),
        ValueError,
        "`logits` must have at least one class; got shape (8, 0) with class axis 1.",
    ),
    "axis out of range": (
        _ce(LOGITS, LABELS, axis=2),
        ValueError,
        "`axis` must be in [-2, 2) for `logits` of shape (8, 10); got 2.",
    ),
    "axis that is no integer": (
        _ce(LOGITS, LABELS, axis=1.0),
        TypeError,
        "`axis` must be a Python int, known when the function is traced; got 1.0.",
    ),
    "class weights of another length": (
        _ce(LOGITS, LABELS, class_weights=jnp.ones(8)),
        ValueError,
        "`class_weights` must have shape (10,), one weight for each class along axis 1 of `logits`; got (8,). Weights of "
        "rows go into `weights`, and class weights are made of counts: class_weights(class_counts(targets, num_classes)).",
    ),
    "class weights that are a mask": (
        _ce(LOGITS, LABELS, class_weights=jnp.ones(10, bool)),
        TypeError,
        "`class_weights` must hold real numbers; got bool. A mask of rows goes into `where`.",
    ),
    "weights with a last axis of 1": (
        _ce(LOGITS, LABELS, weights=jnp.ones((8, 1))),
        ValueError,
        "`weights` must have the shape of the losses, (8,); got (8, 1). Nothing is broadcast. Drop the last axis: "
        "weights.squeeze(-1).",
    ),
    "where of another shape": (
        _ce(LOGITS, LABELS, where=jnp.ones((8, 10), bool)),
        ValueError,
        "`where` must have the shape of the losses, (8,); got (8, 10). Nothing is broadcast.",
    ),
    "where of numbers": (
        _ce(LOGITS, LABELS, where=jnp.ones(8)),
        TypeError,
        "`where` must be boolean; got float32. Of a mask that is 0 where nothing counts, pass where=mask != 0.",
    ),
    "where of 0 and 1": (
        lambda: jaxce.reduce_losses(jnp.zeros(8), where=LABELS),
        TypeError,
        "`where` must be boolean; got int32. Of a mask that is 0 where nothing counts, pass where=mask != 0.",
    ),
    "weights that are ids": (
        _ce(LOGITS, LABELS, weights=LABELS),
        TypeError,
        "`weights` must have a floating dtype, a factor for each loss; got int32. Cast them if that is what they are: "
        "weights.astype(jnp.float32). Of ids of segments make a mask: where=ids != 0.",
    ),
    "an ignore_index that labels cannot hold": (
        _ce(LOGITS, np.full(8, 255, np.uint8), ignore_index=-1),
        ValueError,
        "`ignore_index` must be a number that `targets` of dtype uint8 can hold, in [0, 255]; got -1, which no row has. "
        "Were the labels cast? A cast to uint8 makes 255 of it.",
    ),
    "an ignore_index of 64 bits on a device": (
        lambda: jax.jit(lambda y: jaxce.cross_entropy(LOGITS, y, ignore_index=-(2**63)))(LABELS),
        ValueError,
        "`ignore_index` must be a number that `targets` of dtype int32 can hold, in [-2147483648, 2147483647]; got "
        "-9223372036854775808, which no row has. Were the labels cast? A cast to int32 makes 0 of it.",
    ),
    "labels with a mask of their own": (
        _ce(LOGITS, np.ma.masked_equal(np.zeros(8, int), 0)),
        TypeError,
        "`targets` must be an array without a mask of its own, which would be lost. Pass targets.data, and the rows that "
        "count as a boolean `where`.",
    ),
    "times": (
        _ce(LOGITS, np.zeros(8, "m8[s]")),
        TypeError,
        "`targets` must have a dtype that JAX has; got timedelta64[s]. Cast them: targets.astype(np.int64).",
    ),
    "long doubles": (
        lambda: jaxce.mse_loss(np.zeros(8, np.longdouble), np.zeros(8)),
        TypeError,
        f"`predictions` must have a dtype that JAX has; got {np.dtype(np.longdouble)}. Cast them: "
        "predictions.astype(np.float64).",
    ),
    "an array for a reduction": (
        _ce(LOGITS, LABELS, reduction=jnp.ones(8)),
        ValueError,
        "`reduction` must be 'none', 'sum', 'mean' or 'parts'; got an array of shape (8,) and dtype float32.",
    ),
    "a long text for a reduction": (
        _ce(LOGITS, LABELS, reduction="mean" * 99),
        ValueError,
        "`reduction` must be 'none', 'sum', 'mean' or 'parts'; got 'meanmeanmean...nmeanmeanmean'.",
    ),
    "a list for a number": (
        _ce(LOGITS, LABELS, z_loss=[0.1] * 99),
        TypeError,
        "`z_loss` must be a number; got [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, ...].",
    ),
    "an array for an axis": (
        _ce(LOGITS, LABELS, axis=np.zeros(99)),
        TypeError,
        "`axis` must be a Python int, known when the function is traced; got an array of shape (99,) and dtype float64.",
    ),
    "a bool for an axis": (
        _ce(LOGITS, LABELS, axis=True),
        TypeError,
        "`axis` must be a Python int, known when the function is traced; got True.",
    ),
    "an array for recompute": (
        lambda: jaxce.linear_cross_entropy(LOGITS, jnp.eye(10), LABELS, recompute=jnp.ones(99)),
        TypeError,
        "`recompute` must be True, False or None, known when the function is traced; got an array of shape (99,) and "
        "dtype float32.",
    ),
    "an infinite softcap": (
        lambda: jaxce.linear_cross_entropy(LOGITS, jnp.eye(10), LABELS, softcap=np.inf),
        ValueError,
        "`softcap` must be in (0, inf); got inf.",
    ),
    "an infinite temperature": (
        lambda: jaxce.distillation_loss(LOGITS, LOGITS, temperature=np.float32(np.inf)),
        ValueError,
        "`temperature` must be in [1e-09, 1e+09]; got inf.",
    ),
    "a softcap that vanishes": (
        lambda: jaxce.linear_cross_entropy(LOGITS, jnp.eye(10), LABELS, softcap=1e-40),
        ValueError,
        "`softcap` must be in (0, inf); got 1e-40, which is 0 in float32.",
    ),
    "an infinite tau": (
        lambda: jaxce.imbalance.logit_adjustment(np.array([3, 2]), tau=-np.inf),
        ValueError,
        "`tau` must be in (-inf, inf); got -inf.",
    ),
    "a complex number": (
        _ce(LOGITS, LABELS, z_loss=np.complex64(1)),
        TypeError,
        "`z_loss` must be a number; got complex64.",
    ),
    "ignore_index with probabilities": (
        _ce(LOGITS, TARGETS, ignore_index=-100),
        ValueError,
        "`ignore_index` needs class indices, and `targets` are probabilities of shape (8, 10). Pass `where`, a boolean mask "
        "of shape (8,), to leave rows out.",
    ),
    "ignore_index with listed classes": (
        _ce(LOGITS, LISTED, ignore_index=-100),
        ValueError,
        "`ignore_index` needs class indices, and `targets` are SparseTargets. Pass `where`, a boolean mask of shape (8,), to "
        "leave rows out.",
    ),
    "listed classes without an axis of their own": (
        _ce(LOGITS, jaxce.SparseTargets(LABELS, jnp.ones(8))),
        ValueError,
        "`targets.classes` must have shape (8, K), K classes for each row of `logits`; got (8,). Add an axis: "
        "targets.classes[..., None].",
    ),
    "listed classes along the axis of the classes": (
        _ce(jnp.zeros((2, 10, 4)), jaxce.SparseTargets(jnp.zeros((2, 3, 4), int), jnp.ones((2, 3, 4))), axis=1),
        ValueError,
        "`targets.classes` must have shape (2, 4, K), K classes for each row of `logits`; got (2, 3, 4). K is last, whatever "
        "the class axis of the logits is.",
    ),
    "listed classes of other rows": (
        _ce(LAZY, jaxce.SparseTargets(jnp.zeros((7, 3), int), jnp.ones((7, 3)))),
        ValueError,
        "`targets.classes` must have shape (8, K), K classes for each row of `hidden · kernel`; got (7, 3).",
    ),
    "masses of another shape": (
        _ce(LOGITS, jaxce.SparseTargets(jnp.zeros((8, 1), int), jnp.ones(8))),
        ValueError,
        "`targets.masses` must have the shape of `targets.classes`, (8, 1); got (8,). Nothing is broadcast. Add an axis: "
        "targets.masses[..., None].",
    ),
    "listed classes that are floats": (
        _ce(LOGITS, jaxce.SparseTargets(jnp.ones((8, 3)), jnp.ones((8, 3)))),
        TypeError,
        "`targets.classes` must have an integer dtype; got float32. Cast them: targets.classes.astype(jnp.int32).",
    ),
    "masses that are integers": (
        _ce(LOGITS, jaxce.SparseTargets(jnp.ones((8, 3), int), jnp.ones((8, 3), int))),
        TypeError,
        "`targets.masses` must have a floating dtype; got int32. Cast them: targets.masses.astype(jnp.float32).",
    ),
    "listed classes in a list": (
        _ce(LOGITS, jaxce.SparseTargets([[0]] * 8, jnp.ones((8, 1)))),
        TypeError,
        "`targets.classes` must be a jax.Array or a NumPy array; got builtins.list. Wrap it: jnp.asarray(targets.classes).",
    ),
    "a wrong NumPy class that is listed": (
        _ce(LOGITS, jaxce.SparseTargets(np.full((8, 2), [10, 0]), np.full((8, 2), 0.5)), where=np.arange(8) > 2),
        ValueError,
        "`targets.classes` must be class indices in [0, 10); got 10 at position (3, 0), where the mass is 0.5. Padding has a "
        "mass of 0.",
    ),
    "focal loss of listed classes": (
        lambda: jaxce.focal_loss(LOGITS, LISTED),
        TypeError,
        "`targets` must be an array here; got SparseTargets. `cross_entropy`, `linear_cross_entropy`, `custom_loss`, "
        "`summarize` and `imbalance.expected_cost` take them as targets.",
    ),
    "a teacher of listed classes": (
        lambda: jaxce.distillation_loss(LOGITS, LISTED),
        TypeError,
        "`teacher_logits` must be an array here; got SparseTargets. `cross_entropy`, `linear_cross_entropy`, `custom_loss`, "
        "`summarize` and `imbalance.expected_cost` take them as targets.",
    ),
    "listed classes that may differ where classes are split": (
        _on_mesh(
            lambda z, c: jaxce.cross_entropy(z, jaxce.SparseTargets(c, jnp.ones((8, 1))), class_axis_name="model"),
            jnp.zeros((8, 12)),
            jnp.zeros((32, 1), int),
            in_specs=(P(None, "model"), P("model")),
        ),
        ValueError,
        "`targets.classes` may differ along 'model', over which the classes are split, and must be the same there, by its "
        "type too. If it is, cast it: jax.lax.pmax(targets.classes, 'model').",
    ),
    "wrong NumPy label": (
        _ce(LOGITS, np.array([0, 1, 2, 3, -100, 5, 6, 7])),
        ValueError,
        "`targets` must be class indices in [0, 10); got -100 at position (4,). If -100 marks rows to leave out, pass "
        "where=targets != -100.",
    ),
    "smoothing above 1": (
        _ce(LOGITS, LABELS, label_smoothing=1.5),
        ValueError,
        "`label_smoothing` must be in [0, 1]; got 1.5.",
    ),
    "NaN smoothing": (
        _ce(LOGITS, LABELS, label_smoothing=float("nan")),
        ValueError,
        "`label_smoothing` must be in [0, 1]; got nan.",
    ),
    "smoothing by class": (
        _ce(LOGITS, LABELS, label_smoothing=jnp.ones(10)),
        ValueError,
        "`label_smoothing` must be a scalar; got shape (10,).",
    ),
    "negative z-loss": (_ce(LOGITS, LABELS, z_loss=-1.0), ValueError, "`z_loss` must be in [0, inf); got -1.0."),
    "boolean setting": (_ce(LOGITS, LABELS, z_loss=True), TypeError, "`z_loss` must be a number; got bool."),
    "unknown reduction": (
        _ce(LOGITS, LABELS, reduction="avg"),
        ValueError,
        "`reduction` must be 'none', 'sum', 'mean' or 'parts'; got 'avg'.",
    ),
    "focal loss of distributions": (
        lambda: jaxce.focal_loss(LOGITS, TARGETS),
        TypeError,
        "`focal_loss` is defined for class indices: `targets` must be integers of shape (8,); got float32 of shape (8, 10). "
        "Of one-hot vectors it takes the class: targets.argmax(1).",
    ),
    "poly loss of float labels": (
        lambda: jaxce.poly_loss(LOGITS, jnp.zeros(8)),
        TypeError,
        "`poly_loss` is defined for class indices: `targets` must be integers of shape (8,); got float32 of shape (8,).",
    ),
    "negative gamma": (
        lambda: jaxce.focal_loss(LOGITS, LABELS, gamma=-1),
        ValueError,
        "`gamma` must be in [0, inf); got -1.",
    ),
    "temperature 0": (
        lambda: jaxce.distillation_loss(LOGITS, LOGITS, temperature=0.0),
        ValueError,
        "`temperature` must be in [1e-09, 1e+09]; got 0.0.",
    ),
    "an unknown divergence": (
        lambda: jaxce.distillation_loss(LOGITS, LOGITS, divergence="kl"),
        ValueError,
        "`divergence` must be 'forward', 'reverse' or 'jensen_shannon'; got 'kl'.",
    ),
    "a mixture of one": (
        lambda: jaxce.distillation_loss(LOGITS, LOGITS, divergence="jensen_shannon", mixture=1),
        ValueError,
        "`mixture` must be in (0, 1); got 1.",
    ),
    "a mixture without the teacher": (
        lambda: jaxce.distillation_loss(LOGITS, LAZY, divergence="jensen_shannon", mixture=0.0),
        ValueError,
        "`mixture` must be in (0, 1); got 0.0.",
    ),
    "a mixture that vanishes": (
        lambda: jaxce.distillation_loss(LOGITS, LOGITS, divergence="jensen_shannon", mixture=1e-40),
        ValueError,
        "`mixture` must be in (0, 1); got 1e-40, which is 0 in float32.",
    ),
    "a mixture in which the student vanishes": (
        lambda: jaxce.distillation_loss(LOGITS, LOGITS, divergence="jensen_shannon", mixture=1 - 1e-9),
        ValueError,
        "`mixture` must be in (0, 1); got 0.999999999, which is 1 in float32.",
    ),
    "a mixture of every row": (
        lambda: jaxce.distillation_loss(LOGITS, LOGITS, divergence="jensen_shannon", mixture=jnp.full(8, 0.5)),
        ValueError,
        "`mixture` must be a scalar; got shape (8,).",
    ),
    "a mixture that may differ where classes are split": (
        _on_mesh(
            lambda z, mixture: jaxce.distillation_loss(
                z, z, divergence="jensen_shannon", mixture=mixture[0], class_axis_name="model"
            ),
            jnp.zeros((8, 12)),
            jnp.full(4, 0.5),
            in_specs=(P(None, "model"), P("model")),
        ),
        ValueError,
        "`mixture` may differ along 'model', over which the classes are split, and must be the same there, by its type "
        "too. If it is, cast it: jax.lax.pmean(mixture, 'model').",
    ),
    "teacher of another shape": (
        lambda: jaxce.distillation_loss(LOGITS, LOGITS[:, :5]),
        ValueError,
        "`teacher_logits` must have the shape of `logits`, (8, 10); got (8, 5). Do both models share the rows and the "
        "classes?",
    ),
    "margin loss with another p": (
        lambda: jaxce.multi_margin_loss(LOGITS, LABELS, p=3),
        ValueError,
        "`p` must be 1 or 2; got 3.",
    ),
    "margin loss with an array for p": (
        lambda: jaxce.torch.multi_margin_loss(LOGITS, LABELS, p=jnp.ones(2)),
        TypeError,
        "`p` must be a Python int, known when the function is traced; got an array of shape (2,) and dtype float32.",
    ),
    "margin loss with a bool for p": (
        lambda: jaxce.multi_margin_loss(LOGITS, LABELS, p=True),
        TypeError,
        "`p` must be a Python int, known when the function is traced; got True.",
    ),
    "log-probabilities are named": (
        lambda: jaxce.nll_loss(jnp.zeros((8, 10), jnp.int8), LABELS),
        TypeError,
        "`log_probs` must have a floating dtype; got int8. Cast them: log_probs.astype(jnp.float32).",
    ),
    "binary targets with a last axis of 1": (
        lambda: jaxce.binary_cross_entropy(jnp.zeros(8), jnp.zeros((8, 1))),
        ValueError,
        "`targets` must have the shape of `logits`, (8,); got (8, 1). Nothing is broadcast. Drop the last axis: "
        "targets.squeeze(-1).",
    ),
    "predictions with a last axis of 1": (
        lambda: jaxce.mse_loss(jnp.zeros((8, 1)), jnp.zeros(8)),
        ValueError,
        "`targets` must have the shape of `predictions`, (8, 1); got (8,). Nothing is broadcast. Add an axis: "
        "targets[..., None].",
    ),
    "absolute error likewise": (
        lambda: jaxce.l1_loss(jnp.zeros((8, 1)), jnp.zeros(8)),
        ValueError,
        "`targets` must have the shape of `predictions`, (8, 1); got (8,). Nothing is broadcast. Add an axis: "
        "targets[..., None].",
    ),
    "integer binary targets": (
        lambda: jaxce.binary_cross_entropy(jnp.zeros(8), LABELS),
        TypeError,
        "`targets` must have a floating dtype; got int32. Cast them: targets.astype(jnp.float32).",
    ),
    "pos_weight that would broadcast the logits": (
        lambda: jaxce.binary_cross_entropy(jnp.zeros(8), jnp.zeros(8), pos_weight=jnp.ones((8, 1))),
        ValueError,
        "`pos_weight` must be a scalar, or broadcast to the shape of `logits`, (8,); got (8, 1). One number for each output "
        "is a vector of the last axis' length.",
    ),
    "class vector of another length": (
        lambda: jaxce.summarize(LOGITS, LABELS, class_vector=jnp.ones(3)),
        ValueError,
        "`class_vector` must have shape (10,), one number for each class; got (3,).",
    ),
    "a number for a flag": (
        lambda: jaxce.summarize(LOGITS, LABELS, entropy=1),
        TypeError,
        "`entropy` must be True or False, known when the function is traced; got 1.",
    ),
    "an array for a flag": (
        lambda: jaxce.summarize(LAZY, LABELS, argmax=jnp.ones(8, bool)),
        TypeError,
        "`argmax` must be True or False, known when the function is traced; got an array of shape (8,) and dtype bool.",
    ),
    "integer losses": (
        lambda: jaxce.reduce_losses(LABELS),
        TypeError,
        "`losses` must have a floating dtype; got int32. Cast them: losses.astype(jnp.float32).",
    ),
    "weights of reduce_losses": (
        lambda: jaxce.reduce_losses(jnp.zeros(8), jnp.zeros((8, 1))),
        ValueError,
        "`weights` must have the shape of the losses, (8,); got (8, 1). Nothing is broadcast. Drop the last axis: "
        "weights.squeeze(-1).",
    ),
    "counts of no labels": (
        lambda: jaxce.imbalance.class_counts(TARGETS, 10),
        TypeError,
        "`targets` must be class indices of an integer dtype; got float32. The mass that distributions give to the classes "
        "is targets.sum(axis=0).",
    ),
    "counts of a mask": (
        lambda: jaxce.imbalance.class_counts(LABELS == 0, 10),
        TypeError,
        "`targets` must be class indices of an integer dtype; got bool.",
    ),
    "counts of no classes": (
        lambda: jaxce.imbalance.class_counts(LABELS, 0),
        ValueError,
        "`num_classes` must be in [1, 2147483647]; got 0.",
    ),
    "counts of more classes than labels can name": (
        lambda: jaxce.imbalance.class_counts(LABELS, 2**31),
        ValueError,
        "`num_classes` must be in [1, 2147483647]; got 2147483648.",
    ),
    "a long power": (
        lambda: jaxce.multi_margin_loss(LOGITS, LABELS, p=10**400),
        ValueError,
        "`p` must be 1 or 2; got 100000000000000000...0000000000000000000.",
    ),
    "where of long doubles": (
        _ce(LOGITS, LABELS, where=np.ones(8, np.longdouble)),
        TypeError,
        f"`where` must be boolean; got {np.dtype(np.longdouble)}. Of a mask that is 0 where nothing counts, pass "
        "where=mask != 0.",
    ),
    "PyTorch's ignore_index that is no integer": (
        lambda: jaxce.torch.cross_entropy(LOGITS, TARGETS, ignore_index=-1.5),
        TypeError,
        "`ignore_index` must be a Python int, known when the function is traced; got -1.5.",
    ),
    "an option that is none, with a long number": (
        lambda: jaxce.summarize(LOGITS, LABELS, ignore=2**40),
        TypeError,
        "summarize() got an unexpected keyword argument 'ignore'",
    ),
    "counts of a wrong NumPy label": (
        lambda: jaxce.imbalance.class_counts(np.array([[0, 255]]), 10),
        ValueError,
        "`targets` must be class indices in [0, 10); got 255 at position (0, 1). If 255 marks rows to leave out, pass "
        "where=targets != 255.",
    ),
    "counts under a mask of another shape": (
        lambda: jaxce.imbalance.class_counts(LABELS, 10, where=jnp.ones((8, 1), bool)),
        ValueError,
        "`where` must have the shape of `targets`, (8,); got (8, 1). Nothing is broadcast. Drop the last axis: "
        "where.squeeze(-1).",
    ),
    "weights of labels": (
        lambda: jaxce.imbalance.class_weights(TARGETS),
        ValueError,
        "`counts` must have shape (C,), one number for each class; got (8, 10).",
    ),
    "negative count": (
        lambda: jaxce.imbalance.class_weights(np.array([3, 0, -2])),
        ValueError,
        "`counts` must be finite and ≥ 0; got -2 for class 2.",
    ),
    "infinite count": (
        lambda: jaxce.imbalance.logit_adjustment(np.array([3, np.inf])),
        ValueError,
        "`counts` must be finite and ≥ 0; got inf for class 1.",
    ),
    "counts that are a mask": (
        lambda: jaxce.imbalance.class_weights(np.array([True])),
        TypeError,
        "`counts` must hold real numbers; got bool.",
    ),
    "unknown scheme": (
        lambda: jaxce.imbalance.class_weights(np.array([3, 2]), scheme="inverse"),
        ValueError,
        "`scheme` must be 'balanced', 'inverse_sqrt', 'effective_number' or 'median_frequency'; got 'inverse'.",
    ),
    "beta of 1": (
        lambda: jaxce.imbalance.class_weights(np.array([3, 2]), scheme="effective_number", beta=1.0),
        ValueError,
        "`beta` must be in [0, 1); got 1.0.",
    ),
    "tau of every class": (
        lambda: jaxce.imbalance.logit_adjustment(np.array([3, 2]), tau=jnp.ones(2)),
        ValueError,
        "`tau` must be a scalar; got shape (2,).",
    ),
    "no tau": (
        lambda: jaxce.imbalance.logit_adjustment(np.array([3, 2]), tau=None),
        TypeError,
        "`tau` must be a number; got None.",
    ),
    "boolean costs": (
        lambda: jaxce.imbalance.expected_cost(LOGITS, LABELS, ~jnp.eye(10, dtype=bool)),
        TypeError,
        "`costs` must hold real numbers; got bool. Cast them: costs.astype(jnp.float32).",
    ),
    "costs of one class": (
        lambda: jaxce.imbalance.expected_cost(LOGITS, LABELS, jnp.ones(10)),
        ValueError,
        "`costs` must have shape (10, 10), a row for each true class and a column for each predicted one; got (10,).",
    ),
    "a reduction of PyTorch that is an array": (
        lambda: jaxce.torch.kl_div(LOGITS, TARGETS, reduction=np.ones(2)),
        ValueError,
        "`reduction` must be 'none', 'mean', 'sum' or 'batchmean'; got an array of shape (2,) and dtype float64.",
    ),
    "PyTorch's names": (
        lambda: jaxce.torch.cross_entropy(LOGITS, LABELS, weight=jnp.ones(8)),
        ValueError,
        "`weight` must have shape (10,), one weight for each class along dim 1 of `input`; got (8,).",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error_text(name):
    call, kind, text = CASES[name]
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == text


def test_a_mixture_that_is_not_read():
    for divergence in ("forward", "reverse"):
        assert jaxce.distillation_loss(LOGITS, LOGITS, divergence=divergence, mixture=7.0) == 0


def test_traced_settings():
    with pytest.raises(
        TypeError, match=r"^`ignore_index` must be a Python int, known when the function is traced; got"
    ):
        jax.jit(lambda i: jaxce.cross_entropy(LOGITS, LABELS, ignore_index=i))(3)
    with pytest.raises(TypeError, match=r"^`axis` must be a Python int"):
        jax.jit(lambda i: jaxce.cross_entropy(LOGITS, LABELS, axis=i))(1)
    with pytest.raises(TypeError, match=r"^`num_classes` must be a Python int, known when the function is traced"):
        jax.jit(lambda i: jaxce.imbalance.class_counts(LABELS, i))(3)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("how", [{"block_bytes": np.array([64, 64])}, {"block_bytes": 64.0}, {"recompute": 1}])
def test_lazy_logits_are_looked_at_on_every_call(how, is_first):
    """What a pytree holds beside its arrays is part of the key under which JAX finds a compiled call."""
    rows = 3 + is_first  # of shapes that no other test has compiled
    hidden, kernel, labels = jnp.ones((rows, 3)), jnp.ones((3, 6)), jnp.zeros(rows, int)

    def loss(**how):
        return jaxce.cross_entropy(jaxce.LinearLogits(hidden, kernel, **how), labels)

    if not is_first:
        loss(block_bytes=64, recompute=True)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"^`(block_bytes|recompute)` must be"):
            loss(**how)
        np.testing.assert_allclose(loss(), np.log(6), rtol=1e-6)
        np.testing.assert_allclose(loss(block_bytes=64, recompute=True), np.log(6), rtol=1e-6)


def test_numpy_integers_are_integers():
    loss = jaxce.cross_entropy(LOGITS, LABELS, axis=np.int64(-1), ignore_index=np.int8(3))
    assert loss == jaxce.cross_entropy(LOGITS, LABELS)


def test_wrong_calls_fail_inside_jit_and_grad_alike():
    with pytest.raises(TypeError, match="are class indices and must have shape"):
        jax.jit(jax.grad(lambda z: jaxce.cross_entropy(z, jnp.zeros((8, 10), jnp.int32))))(LOGITS)
