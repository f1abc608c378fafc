"""Slices of a row's classes merge into the row, whatever the sizes and whatever they hold."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import daily

from jaxce._mesh import Classes
from jaxce._rule import Row, numbers_of, row_maximum, slice_row
from jaxce._slice import Asked, merge, merge_devices

ROWS = {
    "ordinary": [1.0, -2.0, 0.5, 3.0, 2.0, -1.0],
    "ties": [0.0] * 6,
    "a target far ahead": [40.0, 0.0, -1.0, 0.0, 2.0, 1.0],
    "an offset": [1e4, 1e4 - 2, 1e4 + 1, 1e4 - 1, 1e4, 1e4 - 3],
    "a slice of nothing": [-np.inf, -np.inf, -np.inf, 1.0, 2.0, 0.0],
    "slices far apart": [-1e4, -1e4, -1e4, 1e4, 0.0, 0.0],
}


def _slice(logits, target, vector, start, stop):
    logits = logits[start:stop]
    local = target - start if target.ndim == 0 else target[start:stop]
    maximum = row_maximum(logits, logits.dtype)
    row = Row(logits, local, None, vector[start:stop], None, maximum, None, Classes(6), ASKED)
    return slice_row(row).numbered_from(start)


# The edges of slices by name; those of devices are even.
EDGES = {"halves": (0, 3, 6), "one and the rest": (0, 1, 6), "ones": range(7), "shorter": (0, 4, 5, 6), "devices": None}
ASKED = Asked(entropy=True, argmax=True)
VECTOR = np.array([0.0, 0.0, 0.0, 1.0, 2.0, 0.5], np.float32)


@pytest.mark.parametrize("edges", daily(EDGES, ["halves", "ones", "devices"]))
@pytest.mark.parametrize("name", ROWS)
def test_slices_merge_into_the_row(name, edges):
    logits = np.array(ROWS[name], np.float32)
    finite = np.isfinite(logits)
    distribution = np.where(finite, np.float32([0.1, 0.2, 0.3, 0.1, 0.2, 0.4]), 0)
    for target in (np.array(0 if finite[0] else 4), distribution):
        (whole, argmax), *others = _merged(EDGES[edges])(logits, target)
        assert argmax == np.argmax(logits)
        for part, argmax_of_part in others:
            assert argmax_of_part == argmax
            np.testing.assert_array_equal(part[0], whole[0])
            np.testing.assert_allclose(part[1:], whole[1:], rtol=2e-6)
            assert np.all(np.isfinite(part))


@functools.cache
def _merged(edges):
    """The whole row, and the slices between the edges, merged from either end, or without edges those of devices."""

    @jax.jit
    def merged(logits, target):
        if edges is None:
            parts = [_by_devices(logits, target, number) for number in (1, 2, 3, 6)]
        else:
            slices = [_slice(logits, target, VECTOR, start, stop) for start, stop in itertools.pairwise(edges)]
            parts = [functools.reduce(merge, slices), functools.reduce(merge, slices[::-1])]
        whole = _slice(logits, target, VECTOR, 0, 6)
        numbers = [numbers_of(part, has_label=target.ndim == 0) for part in (whole, *parts)]
        return [((*each[:4], each.entropy, each.mean_depth), each.argmax) for each in numbers]

    return merged


def _by_devices(logits, target, slices):
    """Slices that devices hold, an axis of `vmap` in their place."""
    size = 6 // slices

    def on_device(logits, vector, start, q):
        local = target - start if target.ndim == 0 else q
        row = Row(logits, local, None, vector, None, row_maximum(logits, logits.dtype), None, Classes(6), ASKED)
        return merge_devices(slice_row(row).numbered_from(start), Classes(6, ("devices",), slices))

    arrays = (logits, VECTOR, jnp.arange(6), jnp.broadcast_to(target, 6))
    split = [array.reshape(slices, size) for array in arrays]
    split[2] = split[2][:, 0]
    return jax.tree.map(lambda number: number[0], jax.vmap(on_device, axis_name="devices")(*split))
