"""Native sparse attention: the fast form against the definition, and the definition against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import nsa
from longctx.ops.key_blocks import KeyBlocks
from longctx.ops.row import WHOLE
from longctx.typing import Segments

HEADS, GROUPS, KEYS, VALUES = 4, 2, 8, 6
SIZE = 8  # of a compressed block
OPTIONS = [
    {"stride": 4, "selected": 12, "count": 3, "window": 5},
    {"stride": 2, "selected": 4, "count": 5, "window": 9},
]


def inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (2, length, HEADS, KEYS),
        (2, length, GROUPS, 3, KEYS),
        (2, length, GROUPS, 3, VALUES),
        (2, length, HEADS, 3),
        (SIZE, GROUPS, KEYS),
        (SIZE, GROUPS, VALUES),
    )
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def attend(arrays, segments, form, options):
    q, k, v, gates, *pools = arrays
    return nsa.NSA((q, gates), (k, v), pools, segments, form=form, **options).y


def packed(length):
    """A document, padding, a document that ends with the row; and one document with padding at both ends."""
    ids = np.zeros((2, length), int)
    ids[0, : length // 3], ids[0, length // 3 + 2 :] = 1, 2
    ids[1, 3 : length - 5] = 4
    positions = np.where(ids > 0, np.arange(length) - np.array([[0], [3]]), 0)
    positions[0, length // 3 + 2 :] -= length // 3 + 2
    return Segments.from_ids(ids, positions)


def softmax(x):
    weights = np.exp(x - max(x, default=0))
    return weights / weights.sum()


@pytest.mark.parametrize("options", OPTIONS)
def test_definition_is_the_formula(options):
    """Query by query, with equation 9 as the paper writes it, blocks numbered from 1.

    Seen to fail: the largest of the heads' scores for their sum; the block before the own left to its score; compressed
    blocks that end one token later.
    """
    length, (stride, selected, count, window) = 41, options.values()
    arrays = inputs(length)
    row = Segments.single(2, length)
    found = attend(arrays, row, "definition", options)
    q, k, v, gates, key_pool, value_pool = (np.asarray(x, np.float64) for x in arrays)
    scale, repeats = KEYS**-0.5, HEADS // GROUPS
    for b, t, g in np.ndindex(2, length, GROUPS):
        starts = range(0, t + 2 - SIZE, stride)
        keys = np.array([(k[b, s : s + SIZE, g, 0] * key_pool[:, g]).sum(0) for s in starts]).reshape(-1, KEYS)
        values = np.array([(v[b, s : s + SIZE, g, 0] * value_pool[:, g]).sum(0) for s in starts]).reshape(-1, VALUES)
        heads = range(g * repeats, (g + 1) * repeats)
        probabilities = {h: softmax(keys @ q[b, t, h] * scale) for h in heads}
        p = sum(probabilities.values())
        own, per_block, per_size = t // selected, selected // stride, SIZE // stride
        # The paper counts blocks from 1: p_slc[j] = Σ_m Σ_n p_cmp[(l' / d) j - m - n].
        score = [
            sum(
                p[i - 1] if 1 <= (i := per_block * (j + 1) - m - n) <= len(p) else 0
                for m in range(per_block)
                for n in range(per_size)
            )
            for j in range(own)
        ]
        blocks = {own, 0, max(own - 1, 0)}
        for j in sorted(range(own), key=lambda j: -score[j]):
            if len(blocks) < count and j not in blocks:
                blocks.add(j)
        fine = [s for s in range(t + 1) if s // selected in blocks]
        near = range(max(0, t + 1 - window), t + 1)
        for h in heads:
            out = gates[b, t, h, 0] * probabilities[h] @ values
            for branch, seen in ((1, fine), (2, list(near))):
                weights = softmax(k[b, seen, g, branch] @ q[b, t, h] * scale)
                out = out + gates[b, t, h, branch] * weights @ v[b, seen, g, branch]
            np.testing.assert_allclose(found[b, t, h], out, atol=1e-5)


@pytest.mark.parametrize(("length", "pack", "number"), [(9, 0, 0), (90, 1, 0), (90, 1, 1)])
def test_fast_form_is_the_definition(length, pack, number):
    """Outputs and gradients, and 0 for padding.

    Seen to fail: overlaps of compressed and selected blocks counted as 1, or taken from the compressed block one
    further; one head's scores for the group's; compressed blocks seen too early; blocks of another document selected.
    """
    arrays, options = inputs(length), OPTIONS[number]
    segments = packed(length) if pack else Segments.single(2, length)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((2, length, HEADS, VALUES)), jnp.float32)

    def run(form):
        def loss(arrays):
            y = attend(arrays, segments, form, options)
            return jnp.vdot(y, cotangent), y

        return jax.jit(jax.grad(loss, has_aux=True))(arrays)

    (gradients, y), (expected_gradients, expected) = run("chunked"), run("definition")
    for a, b in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1, float(jnp.abs(b).max())))
    assert (np.asarray(y)[np.asarray(segments.ids) == 0] == 0).all()


def test_the_numbers_of_the_paper():
    """l = 32, d = 16, m = 64: a selected block matters by 1, 2, 2, 2, 1 times the compressed blocks that overlap it."""
    segments = Segments.single(1, 256)
    coarse, _ = KeyBlocks.cut((), segments, 32, WHOLE, 256, 16)
    blocks, _ = KeyBlocks.cut((), segments, 64, WHOLE, 256)
    slots, strides = (np.stack(x) for x in zip(*nsa._shared(coarse, blocks, 32, 16, 64), strict=True))
    assert strides[:, 0, 1].tolist() == [1, 2, 2, 2, 1]
    starts = (np.asarray(coarse.last)[0, slots[:, 0, 1]] - 31).tolist()
    assert starts == [48, 64, 80, 96, 112]
    assert strides[:, 0, 0].tolist() == [0, 2, 2, 2, 1]
