"""Slices of a row's classes merge into the row, whatever the sizes and whatever they hold."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxce._rule import Row, merge, row_maximum, slice_row

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
    return slice_row(Row(logits, local, None, vector[start:stop], None, row_maximum(logits, logits.dtype)))


@pytest.mark.parametrize("edges", [(0, 3, 6), (0, 1, 6), (0, 1, 2, 3, 4, 5, 6), (0, 4, 5, 6)])
@pytest.mark.parametrize("name", ROWS)
def test_slices_merge_into_the_row(name, edges):
    logits = jnp.array(ROWS[name], jnp.float32)
    vector = jnp.array([0.0, 0.0, 0.0, 1.0, 2.0, 0.5])
    finite = jnp.isfinite(logits)
    distribution = jnp.where(finite, jnp.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.4]), 0)
    label = jnp.array(0 if finite[0] else 4)

    def merged(target, order):
        parts = [_slice(logits, target, vector, a, b) for a, b in itertools.pairwise(edges)][::order]
        result = parts[0]
        for part in parts[1:]:
            result = merge(result, part)
        return result

    @jax.jit
    def all_of_them(target):
        whole = _slice(logits, target, vector, 0, 6)
        return [
            (part.maximum, *part.numbers(has_label=target.ndim == 0)[:3])
            for part in (whole, merged(target, 1), merged(target, -1))
        ]

    for target in (label, distribution):
        whole, forward, backward = all_of_them(target)
        for part in (forward, backward):
            np.testing.assert_array_equal(part[0], whole[0])
            np.testing.assert_allclose(part[1:], whole[1:], rtol=2e-6)
            assert np.all(np.isfinite(part))
