"""A cache and a span after it as one row of keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.memory import row
from longctx.memory.cache import KVCache
from longctx.typing import Segments


def tokens(names):
    """Segments of a row of tokens, and their keys: token 703 is that at position 3 of document 7, 0 is padding."""
    names = np.array([names])
    return Segments.from_ids(names // 100, names % 100), jnp.asarray(names[:, :, None, None], jnp.float32)


def joined(capacity, names):
    """The row of a cache that has read six tokens of document 7, and of a span: names and ids of its keys, and ids of
    the span."""
    segments, keys = tokens(range(700, 706))
    before = KVCache.empty(1, capacity, 1, 1, 1, jnp.float32).append(keys, -keys, segments)
    segments, keys = tokens(names)
    after = before.append(keys, -keys, segments)
    keys, values, held, span = row.join(before, after, keys, -keys, segments)
    np.testing.assert_array_equal(values, -keys)
    np.testing.assert_array_equal(span.positions, segments.positions)
    found, ids = np.asarray(keys[0, :, 0, 0], int), np.asarray(held.ids[0])
    np.testing.assert_array_equal(held.positions[0][ids > 0], found[ids > 0] % 100)
    return found, ids, span.ids[0].tolist()


@pytest.mark.parametrize("capacity", [8, 4])
def test_a_span_follows_the_cache(capacity):
    """In order and without gaps, from a ring with room and from one that has wrapped; padding last.

    Seen to fail: the slots of a wrapped ring taken in their order; padding left where it is; a span that starts a
    document given the id of the cache's.
    """
    cached = list(range(max(700, 706 - capacity), 706))
    found, ids, span = joined(capacity, [0, 706, 707, 0, 900, 901])
    assert found[: len(cached) + 4].tolist() == [*cached, 706, 707, 900, 901]
    assert ids.tolist() == [1] * (len(cached) + 2) + [2, 2] + [0] * (capacity - len(cached) + 2)
    assert span == [0, 1, 1, 0, 2, 2]


@pytest.mark.parametrize("capacity", [8, 4])
def test_a_token_is_in_the_cache(capacity):
    """A single token, of the same document, of another, or padding: the slots of the cache after it."""
    last = range(706 - capacity, 707)
    found, ids, span = joined(capacity, [706])
    assert sorted(found[ids > 0]) == [name for name in last if name >= 700][-capacity:]
    assert span == [1]
    found, ids, span = joined(capacity, [900])
    assert (found[ids > 0].tolist(), span) == ([900], [1])
    found, ids, span = joined(capacity, [0])
    assert sorted(found[ids > 0]) == list(range(max(700, 706 - capacity), 706))
    assert span == [0]
