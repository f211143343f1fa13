"""Patterns: the dense mask is the formula, and everything else that a pattern says of itself follows from the mask."""

import numpy as np
import pytest

from longctx.ops.patterns import Causal, Chunked, Global, Range, Window

LENGTH = 50
EXACT = [
    Causal(),
    Causal() & Window(1),
    Causal() & Window(7),
    Causal() & Global(3),
    Causal() & (Window(7) | Global(3)),
    (Causal() & Window(5)) | (Causal() & Global(20)),
    Window(7),
    Chunked(7),
    Causal() & Chunked(7),
    Global(3),
]
PATTERNS = [
    *EXACT,
    Window(7) | Global(3),
    Window(9) & Global(6),
    Causal() | Window(4),
    Causal() & (Chunked(6) | Global(9)),
    Causal() & (Window(16) | Global(9)) & Window(40),
]
BLOCKS = [1, 4, 16, 64, (16, 4), (4, 16)]


def dense(pattern, length=LENGTH):
    positions = np.arange(length)
    return pattern.mask(positions[:, None], positions[None, :])


def by_block(mask, block, reduce):
    q_block, k_block = block if isinstance(block, tuple) else (block, block)
    rows = [reduce(mask[i : i + q_block], axis=0) for i in range(0, mask.shape[0], q_block)]
    return np.stack([reduce(np.stack(rows)[:, j : j + k_block], axis=1) for j in range(0, mask.shape[1], k_block)], 1)


@pytest.mark.parametrize(
    ("pattern", "visible"),
    [
        (Causal(), lambda q, k: k <= q),
        (Window(7), lambda q, k: abs(q - k) < 7),
        (Chunked(7), lambda q, k: q // 7 == k // 7),
        (Global(3), lambda q, k: k < 3),
        (Causal() & (Window(7) | Global(3)), lambda q, k: k <= q and (q - k < 7 or k < 3)),
    ],
)
def test_mask_is_the_formula(pattern, visible):
    expected = [[visible(q, k) for k in range(LENGTH)] for q in range(LENGTH)]
    np.testing.assert_array_equal(dense(pattern), expected)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_block_map_covers_the_mask(pattern, block):
    """No touched block is missing; for the usual patterns none is superfluous. Fails with Window.touches off by one."""
    touched = by_block(dense(pattern), block, np.any)
    found = pattern.block_map(LENGTH, block)
    assert not (touched & ~found).any()
    if pattern in EXACT:
        np.testing.assert_array_equal(found, touched)


@pytest.mark.parametrize("block", [4, 16, (16, 4)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_packed_block_map_covers_every_packing(pattern, block):
    """Wherever documents begin; exact for one document under a causal band."""
    rng = np.random.default_rng(0)
    found = pattern.block_map(LENGTH, block, packed=True)
    for starts in (rng.choice(LENGTH, size, replace=False) for size in (0, 1, 3, 10)):
        document = np.isin(np.arange(LENGTH), starts).cumsum()
        first = np.array([np.flatnonzero(document == one)[0] for one in document])
        positions = np.arange(LENGTH) - first
        mask = pattern.mask(positions[:, None], positions[None, :]) & (document[:, None] == document[None, :])
        assert not (by_block(mask, block, np.any) & ~found).any()
    if pattern.ahead == 0 and pattern.band:
        np.testing.assert_array_equal(found, by_block(dense(pattern), block, np.any))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_covers_only_what_is_wholly_visible(pattern):
    mask = dense(pattern)
    rng = np.random.default_rng(1)
    for q_first, q_last, k_first, k_last in (np.sort(rng.integers(0, LENGTH, (300, 2, 2)), axis=-1)).reshape(-1, 4):
        part = mask[q_first : q_last + 1, k_first : k_last + 1]
        q, k = Range(q_first, q_last), Range(k_first, k_last)
        assert pattern.touches(q, k) or not part.any()
        assert part.all() or not pattern.covers(q, k)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_reach_bounds_what_is_visible(pattern):
    """What a query sees lies within reach and ahead, or is a global token; a band is all of it.

    Seen to fail: Chunked saying that it is a band.
    """
    q, k = np.indices((LENGTH, LENGTH))
    band = (k - q <= pattern.ahead) & (True if pattern.reach is None else q - k <= pattern.reach)
    mask = dense(pattern)
    assert not (mask & ~(band | (k < pattern.global_tokens))).any()
    if pattern.band:
        np.testing.assert_array_equal(mask, band)


@pytest.mark.parametrize(
    ("pattern", "reach", "ahead", "global_tokens"),
    [
        (Causal(), None, 0, 0),
        (Causal() & Window(512), 511, 0, 0),
        (Causal() & (Window(512) | Global(4)), 511, 0, 4),
        (Causal() & Global(4), 0, 0, 4),
        (Window(8), 7, 7, 0),
        (Chunked(8), 7, 7, 0),
        (Causal() & Chunked(8), 7, 0, 0),
        (Causal() | Window(8), None, 7, 0),
    ],
)
def test_reach_is_as_short_as_can_be(pattern, reach, ahead, global_tokens):
    assert (pattern.reach, pattern.ahead, pattern.global_tokens) == (reach, ahead, global_tokens)


def test_patterns_are_values():
    """Equal patterns are equal keys, so that a jitted function traces once for them."""
    assert Causal() & (Window(8) | Global(2)) == Causal() & (Window(8) | Global(2))
    assert len({Causal() & Window(8), Causal() & Window(8), Causal() & Window(9)}) == 2


@pytest.mark.parametrize("make", [lambda: Window(0), lambda: Chunked(0), lambda: Global(0)])
def test_empty_patterns_are_refused(make):
    with pytest.raises(ValueError, match="at least 1"):
        make()
