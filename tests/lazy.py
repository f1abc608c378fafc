"""Losses of lazy logits as functions of the arrays that these consist of."""

import functools

import jaxce


def linear(loss):
    """The loss of hidden and kernel in place of logits."""

    @functools.wraps(loss)
    def of_head(
        hidden,
        kernel,
        targets,
        *,
        bias=None,
        softcap=None,
        temperatures=None,
        block_bytes=None,
        recompute=None,
        **options,
    ):
        of_head = {"bias": bias, "softcap": softcap, "temperature": temperatures}
        how = {"block_bytes": block_bytes, "recompute": recompute}
        return loss(jaxce.LinearLogits(hidden, kernel, **of_head, **how), targets, **options)

    return of_head


def listed(loss):
    """The loss of listed classes and their masses in place of targets."""

    @functools.wraps(loss)
    def of_listed(*arrays, **options):
        *logits, classes, masses = arrays
        return loss(*logits, jaxce.SparseTargets(classes, masses), **options)

    return of_listed


def linear_distillation(
    hidden,
    kernel,
    teacher_hidden,
    teacher_kernel,
    *,
    bias=None,
    softcap=None,
    temperatures=None,
    teacher_bias=None,
    teacher_softcap=None,
    teacher_temperatures=None,
    block_bytes=None,
    recompute=None,
    **options,
):
    """The distillation loss of two heads."""
    how = {"block_bytes": block_bytes, "recompute": recompute}
    of_student = {"bias": bias, "softcap": softcap, "temperature": temperatures}
    of_teacher = {"bias": teacher_bias, "softcap": teacher_softcap, "temperature": teacher_temperatures}
    student = jaxce.LinearLogits(hidden, kernel, **of_student, **how)
    teacher = jaxce.LinearLogits(teacher_hidden, teacher_kernel, **of_teacher, **how)
    return jaxce.distillation_loss(student, teacher, **options)
