"""A coarser row and back: the groups of every document, told to the tokens that may know them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.resolution import coarsen, refine
from longctx.typing import Segments

FACTOR = 3


def packed(*lengths):
    """Segments `[1, T]` of documents of these lengths; a negative one is padding."""
    ids = np.concatenate([np.full(abs(n), i if n > 0 else 0) for i, n in enumerate(lengths, 1)])[None]
    positions = np.concatenate([np.arange(abs(n)) for n in lengths])[None]
    return Segments.from_ids(ids, positions)


ROWS = [packed(-2, 7, 1, 3, -1, 2, 11, -2), packed(29), packed(1, 2, 3, 4, 5, 6, 7, -1)]


@pytest.mark.parametrize("segments", ROWS, ids=str)
def test_groups_of_every_document(segments):
    """Coarse tokens are the groups' last tokens, in order, and what tokens are told is of the last whole group.

    Seen to fail: groups counted from the row's start; a group told one token before it is whole.
    """
    ids, positions = np.asarray(segments.ids[0]), np.asarray(segments.positions[0])
    length = len(ids)
    x = np.random.default_rng(0).standard_normal((1, length, 2)).astype(np.float32)
    z, coarse = coarsen(x, segments, FACTOR)
    ends = [t for t in range(length) if ids[t] and positions[t] % FACTOR == FACTOR - 1]
    valid = np.asarray(coarse.valid[0])
    np.testing.assert_array_equal(z[0][valid], x[0][ends])
    np.testing.assert_array_equal(coarse.ids[0][valid], ids[ends])
    np.testing.assert_array_equal(coarse.positions[0][valid], positions[ends] // FACTOR)
    assert not np.asarray(z[0][~valid]).any()

    u = np.random.default_rng(1).standard_normal((1, len(valid), FACTOR, 2)).astype(np.float32)
    found = refine(u, np.full((1, 2, FACTOR, 2), np.nan, np.float32), segments)
    of_end = dict(zip(ends, u[0][valid], strict=True))
    for t in range(length):
        before = [e for e in ends if e <= t and ids[e] == ids[t]]
        expected = of_end[before[-1]][t - before[-1]] if ids[t] and before else np.zeros(2)
        np.testing.assert_array_equal(found[0, t], expected)


@pytest.mark.parametrize("cut", [1, 4, 9, 10, 14])
def test_a_span_is_told_what_the_last_one_made(cut):
    """Padding in front of a span that goes on with a document changes nothing."""
    segments = ROWS[1]
    u = np.random.default_rng(1).standard_normal((1, 10, FACTOR, 2)).astype(np.float32)
    whole = refine(u, jnp.zeros((1, 2, FACTOR, 2)), segments)
    rest = jax.tree.map(lambda x: jnp.pad(x[:, cut:], ((0, 0), (2, 0))), segments)
    _, coarse = coarsen(jnp.zeros((1, 31 - cut, 2)), rest, FACTOR)
    shown = np.zeros((1, coarse.ids.shape[1], FACTOR, 2), np.float32)
    shown[0][np.asarray(coarse.valid[0])] = u[0, cut // FACTOR : 9]
    last = u[:, max(cut // FACTOR - 1, 0)] if cut >= FACTOR else np.zeros_like(u[:, 0])
    found = refine(shown, jnp.stack([last, last], axis=1), rest)
    np.testing.assert_array_equal(found[0, 2:], whole[0, cut:])
