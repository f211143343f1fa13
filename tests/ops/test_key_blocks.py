"""Blocks of keys of packed rows, and choosing among them, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.key_blocks import KeyBlocks, choose
from longctx.ops.row import WHOLE
from longctx.typing import Segments

LENGTHS = [13, -2, 4, 8, -1, 3, 21]  # of documents, negative for padding


def packed():
    """Segments of one row, and for each document where it begins and its length."""
    ids, positions, documents, at = [], [], [], 0
    for number, length in enumerate(LENGTHS, 1):
        ids += [number if length > 0 else 0] * abs(length)
        positions += list(range(length)) if length > 0 else [0] * -length
        documents += [(number, at, length)] if length > 0 else []
        at += abs(length)
    return Segments.from_ids(np.array([ids]), np.array([positions])), documents


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (4, 4), (5, 5), (8, 4), (6, 2), (60, 60)])
def test_cut_finds_every_block(size, stride):
    """Each whole block of each document once, with its tokens; the same from a part of the row that it ends in.

    Seen to fail: a block whose first tokens are not in the row; the last place of each cell taken for the block's.
    """
    segments, documents = packed()
    length = segments.ids.shape[1]
    expected = [
        (number, index, at + index * stride + size - 1)
        for number, at, length in documents
        for index in range((length - size) // stride + 1)
    ]
    cut = jax.jit(lambda x, part, own: KeyBlocks.cut(x, part, size, WHOLE, own, stride), static_argnums=2)
    blocks, tokens = cut(jnp.arange(length)[None], segments, length)
    there = np.asarray(blocks.ids[0]) > 0
    assert list(zip(*(np.asarray(x[0])[there].tolist() for x in blocks), strict=True)) == expected
    for (_, _, last), block in zip(expected, np.asarray(tokens[0])[there], strict=True):
        assert block.tolist() == list(range(last - size + 1, last + 1))
    assert (np.diff(blocks.last[0]) > 0).all()

    # A part of the row: with the tokens before it that its blocks may have, and without them.
    start = 33
    for before in (min(size - 1, start), 0):
        part = Segments(*(x[:, start - before :] for x in (segments.ids, segments.positions, segments.starts)))
        ends, _ = cut((), part, length - start)
        lasts = np.asarray(ends.last[0])[np.asarray(ends.ids[0]) > 0] + start
        assert lasts.tolist() == [last for *_, last in expected if last >= start and last - size + 1 >= start - before]


def test_choose_takes_the_best_and_the_first_of_equals():
    """Over several chunks of queries, the last one not full. Seen to fail: chunks put together in another order."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (2, 130, 1, 3, 9)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.5] = -np.inf
    run = jax.jit(lambda scores, count: choose(lambda scores: scores, (scores,), count), static_argnums=1)
    found = np.asarray(run(scores, 5))
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :5]
    order[np.isneginf(np.take_along_axis(scores, order, axis=-1))] = -1
    np.testing.assert_array_equal(found, order)
    assert run(scores, 20).shape[-1] == 9
