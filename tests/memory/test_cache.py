"""The ring of keys and values, and its anchors, against a list of tokens."""

import jax.numpy as jnp
import numpy as np

from longctx.memory.cache import KVCache
from longctx.typing import Segments


def spans():
    """Spans of two rows as (ids, positions): documents that end inside a span, and padding before, between, after."""
    yield [[1, 1, 1], [0, 1, 1]], [[0, 1, 2], [0, 0, 1]]
    yield [[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]], [[3, 4, 0, 1, 2, 0], [2, 3, 4, 5, 6, 7]]
    yield [[2], [0]], [[3], [0]]
    yield [[2, 2], [3, 3]], [[4, 5], [0, 1]]


def test_holds_the_last_tokens_of_the_document_in_progress():
    """Fails if padding is written, a finished document stays, or the ring keeps one token fewer."""
    capacity = 4
    cache = KVCache.empty(2, capacity, heads=1, key_width=1, value_width=1, dtype=jnp.float32)
    held, number = [[], []], 0.0
    for ids, positions in spans():
        tokens = np.zeros((2, len(ids[0])), np.float32)
        for row in range(2):
            for t, (identity, position) in enumerate(zip(ids[row], positions[row], strict=True)):
                number += 1
                tokens[row, t] = number
                if identity:
                    held[row] = [*([] if position == 0 else held[row]), (position, number)][-capacity:]
        x = jnp.asarray(tokens)[..., None, None]
        cache = cache.append(x, -x, Segments.from_ids(np.array(ids), np.array(positions)))
        for row in range(2):
            slots = np.asarray(cache.positions[row]) >= 0
            found = zip(cache.positions[row][slots].tolist(), cache.keys[row, slots, 0, 0].tolist(), strict=True)
            assert sorted(found) == held[row]
            assert (cache.values[row, slots] == -cache.keys[row, slots]).all()
        assert (np.asarray(cache.segments.ids) == (np.asarray(cache.positions) >= 0)).all()


def test_holds_the_anchors_of_the_document_in_progress():
    """Whatever the ring has lost. Fails if an anchor in the ring counts twice, or one of a finished document stays."""
    cache = KVCache.empty(2, 2, heads=1, key_width=1, value_width=1, dtype=jnp.float32, anchors=(0, 3))
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
        cache = cache.append(x, x, Segments.from_ids(np.array(ids), np.array(positions)))
        for row in range(2):
            last = max(held[row])
            expected = {p: n for p, n in held[row].items() if p > last - 2 or p in (0, 3)}
            seen = np.asarray(cache.segments.ids[row]) == 1
            found = zip(cache.segments.positions[row][seen].tolist(), cache.keys[row, seen, 0, 0].tolist(), strict=True)
            assert sorted(found) == sorted(expected.items())
