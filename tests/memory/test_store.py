"""The ring against a list of tokens, its anchors, and what a span may see beside it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.memory.store import ATTENDED, Ring, extend, heads
from longctx.typing import Segments

LEAVES = heads(1, 1, jnp.float32, ATTENDED)


def spans():
    """Spans of two rows as (ids, positions): documents that end inside a span, and padding before, between, after."""
    yield [[1, 1, 1], [0, 1, 1]], [[0, 1, 2], [0, 0, 1]]
    yield [[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]], [[3, 4, 0, 1, 2, 0], [2, 3, 4, 5, 6, 7]]
    yield [[2], [0]], [[3], [0]]
    yield [[2, 2], [3, 3]], [[4, 5], [0, 1]]


@pytest.mark.parametrize(("size", "anchors"), [(4, ()), (2, (0, 3))])
def test_holds_the_last_tokens_of_the_document_in_progress(size, anchors):
    """And its anchors, whatever the ring has lost.

    Fails if padding is written, a finished document stays, the ring keeps one token fewer, an anchor in the ring counts
    twice, or one of a finished document stays.
    """
    store = Ring().make(LEAVES, 2, 0, size - 1, anchors)
    held, number = [{}, {}], 0.0
    for ids, positions in spans():
        tokens = np.zeros((2, len(ids[0])), np.float32)
        for row in range(2):
            for t, (identity, position) in enumerate(zip(ids[row], positions[row], strict=True)):
                number += 1
                tokens[row, t] = number
                if identity:
                    held[row] = {**({} if position == 0 else held[row]), position: number}
        x = jnp.asarray(tokens)[..., None, None]
        store = store.append((x, -x), Segments.from_ids(np.array(ids), np.array(positions)))
        (keys, values), segments = store.read()
        assert store.tokens.tolist() == [max(row) + 1 for row in held]
        for row in range(2):
            last = max(held[row])
            expected = {p: n for p, n in held[row].items() if p > last - size or p in anchors}
            visible = np.asarray(segments.ids[row]) == 1
            found = zip(segments.positions[row][visible].tolist(), keys[row, visible, 0, 0].tolist(), strict=True)
            assert sorted(found) == sorted(expected.items())
            assert (values[row, visible] == -keys[row, visible]).all()


def test_slots_and_positions_are_two_things():
    """After positions 0, 3, 5 and 7 were kept in the first slots of 8, tokens 8 and 9 take the next two, and the ring
    wraps over the oldest. Fails if a token's slot is its position modulo 8: it overwrites 0 and 3.
    """
    x = jnp.arange(8.0)[None, :, None, None]
    store = Ring().make(LEAVES, 1, 8).append((x, x), Segments.single(1, 8))
    kept = np.array([0, 3, 5, 7, 1, 1, 1, 1])
    store = store.rewrite((x[:, kept], x[:, kept]))
    positions = jnp.array([[0, 3, 5, 7, -1, -1, -1, -1]])
    store = dataclasses.replace(store, positions=positions, written=jnp.array([4]))
    for first, expected in ((8, [0, 3, 5, 7, 8, 9]), (10, [0, 3, 5, 7, 8, 9, 10, 11]), (12, [5, *range(7, 14)])):
        new = first + jnp.arange(2.0)[None, :, None, None]
        store = store.append((new, new), Segments.single(1, 2, first))
        (keys, _), segments = store.read()
        visible = np.asarray(segments.ids[0]) == 1
        assert sorted(segments.positions[0][visible].tolist()) == expected
        np.testing.assert_array_equal(keys[0, visible, 0, 0], segments.positions[0][visible])


def tokens(names):
    """Segments of a row of tokens, and their keys: token 703 is that at position 3 of document 7, 0 is padding."""
    names = np.array([names])
    return Segments.from_ids(names // 100, names % 100), jnp.asarray(names[:, :, None, None], jnp.float32)


def extended(capacity, names):
    """What a span may see after six tokens of document 7: names and ids of the tokens, and ids of the span."""
    segments, keys = tokens(range(700, 706))
    store = Ring().make(LEAVES, 1, capacity).append((keys, -keys), segments)
    segments, keys = tokens(names)
    ((keys, values), held), span, _ = extend(store, (keys, -keys), segments, ordered=True)
    np.testing.assert_array_equal(values, -keys)
    np.testing.assert_array_equal(span.positions, segments.positions)
    found, ids = np.asarray(keys[0, :, 0, 0], int), np.asarray(held.ids[0])
    np.testing.assert_array_equal(held.positions[0][ids > 0], found[ids > 0] % 100)
    return found, ids, span.ids[0].tolist()


@pytest.mark.parametrize("capacity", [8, 4])
def test_a_span_follows_the_store(capacity):
    """In order and without gaps, from a ring with room and from one that has wrapped; padding last.

    Seen to fail: the slots of a wrapped ring taken in their order; padding left where it is; a span that starts a
    document given the id of the store's.
    """
    cached = list(range(max(700, 706 - capacity), 706))
    found, ids, span = extended(capacity, [0, 706, 707, 0, 900, 901])
    assert found[: len(cached) + 4].tolist() == [*cached, 706, 707, 900, 901]
    assert ids.tolist() == [1] * (len(cached) + 2) + [2, 2] + [0] * (capacity - len(cached) + 2)
    assert span == [0, 1, 1, 0, 2, 2]


@pytest.mark.parametrize("capacity", [8, 4])
def test_a_token_is_in_the_store(capacity):
    """A single token, of the same document, of another, or padding: the slots of the store after it."""
    last = range(706 - capacity, 707)
    found, ids, span = extended(capacity, [706])
    assert sorted(found[ids > 0]) == [name for name in last if name >= 700][-capacity:]
    assert span == [1]
    found, ids, span = extended(capacity, [900])
    assert (found[ids > 0].tolist(), span) == ([900], [1])
    found, ids, span = extended(capacity, [0])
    assert sorted(found[ids > 0]) == list(range(max(700, 706 - capacity), 706))
    assert span == [0]
