"""Patterns whose tokens lie apart: at multiples of a stride, chosen ones, blocks at random or from a table."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np

from longctx.ops.patterns.algebra import Everything, Pattern
from longctx.ops.patterns.arrays import known, larger, smaller, take
from longctx.ops.patterns.bands import Chunked, at_least_one, whole_number


@dataclasses.dataclass(frozen=True)
class Strided(Pattern):
    """Tokens at distances that are multiples of `stride`.

    Child et al., arXiv:1904.10509 (Sparse Transformer), section 4.2: together with the last `stride` tokens,
    `Causal() & (Window(stride) | Strided(stride))`.
    """

    stride: int = dataclasses.field()
    reach = None
    ahead = None

    def __post_init__(self):
        at_least_one(self, "stride")

    @property
    def inside(self):
        return Everything()

    def mask(self, q_positions, k_positions):
        return (q_positions - k_positions) % self.stride == 0

    def touches(self, q, k):
        return (q.last - k.first) // self.stride * self.stride >= q.first - k.last

    def covers(self, q, k):
        return self.touches(q, k) & (_single(q, k) if self.stride > 1 else True)


@dataclasses.dataclass(frozen=True)
class Fixed(Pattern):
    """The last `tokens` of every `size` tokens, seen from everywhere: they stand for the rest.

    Child et al., arXiv:1904.10509 (Sparse Transformer), section 4.2: together with the own group,
    `Causal() & (Chunked(size) | Fixed(size, tokens))`.
    """

    size: int
    tokens: int = 1
    reach = None
    ahead = None

    def __post_init__(self):
        at_least_one(self, "size", "tokens")
        if self.tokens > self.size:
            raise ValueError(f"{self} shows {self.tokens} of every {self.size} tokens; give at most {self.size}.")

    @property
    def inside(self):
        return Everything()

    def seen(self, positions):
        return positions % self.size >= self.size - self.tokens

    def _before(self, position):
        """How many tokens before a position are seen."""
        rest = position % self.size - (self.size - self.tokens)
        return position // self.size * self.tokens + rest * (rest > 0)

    def mask(self, q_positions, k_positions):
        return self.seen(k_positions) & (q_positions >= 0)

    def touches(self, q, k):
        return (self._before(k.last + 1) > self._before(k.first)) & (q.last >= 0)

    def covers(self, q, k):
        return (self._before(k.last + 1) - self._before(k.first) == k.last + 1 - k.first) & (q.first >= 0)


@dataclasses.dataclass(frozen=True)
class Dilated(Pattern):
    """Every `dilation`-th token of a segment of `segment` tokens sees the others; the rest sees nothing, nor is seen.

    Ding et al., arXiv:2307.02486 (LongNet), equations 4 to 6: pairs of (segment, dilation) of geometric growth, each
    an attention of its own, are mixed by the denominators of their softmax, and head h has offset h mod dilation.
    """

    segment: int
    dilation: int
    offset: int = 0

    def __post_init__(self):
        at_least_one(self, "segment", "dilation")
        whole_number(self, "offset", self.offset)
        if not 0 <= self.offset < self.dilation <= self.segment:
            raise ValueError(f"{self}: give an offset from 0 to dilation - 1, and a dilation of at most the segment.")

    @property
    def reach(self):
        return self.segment - 1

    @property
    def ahead(self):
        return self.segment - 1

    @property
    def inside(self):
        return Chunked(self.segment)

    def _chosen(self, positions):
        return positions % self.segment % self.dilation == self.offset

    def seeing(self, positions):
        return None if self.dilation == 1 else self._chosen(positions)

    seen = seeing

    def mask(self, q_positions, k_positions):
        same = q_positions // self.segment == k_positions // self.segment
        return same & self._chosen(q_positions) & self._chosen(k_positions)

    def touches(self, q, k):
        first = larger(q.first // self.segment, k.first // self.segment)
        last = -larger(-(q.last // self.segment), -(k.last // self.segment))
        # Of the segments that both ranges have a part of, all but the first and the last lie wholly in both.
        ends = (self._any(q, first) & self._any(k, first)) | (self._any(q, last) & self._any(k, last))
        return (first <= last) & (ends | (last - first > 1))

    def _any(self, side, segment):
        """Whether a chosen token of a segment lies in a range."""
        start = segment * self.segment + self.offset
        skipped = -((start - side.first) // self.dilation)  # chosen tokens before the range
        found = start + skipped * (skipped > 0) * self.dilation
        return (found <= side.last) & (found < (segment + 1) * self.segment)

    def covers(self, q, k):
        whole = self.inside.covers(q, k)
        return whole if self.dilation == 1 else whole & self.touches(q, k) & _single(q, k)


class _SeenFromEverywhere(Pattern):
    """Keys at chosen positions."""

    chosen: tuple[int, ...]
    reach = 0

    @property
    def ahead(self):
        return max(self.chosen)

    @property
    def anchors(self):
        return self.chosen

    @property
    def inside(self):
        return Everything()

    def seen(self, positions):
        return _among(self.chosen, positions)

    def mask(self, q_positions, k_positions):
        return self.seen(k_positions) & (q_positions >= 0)

    def touches(self, q, k):
        return (_count(self.chosen, k) > 0) & (q.last >= 0)

    def covers(self, q, k):
        return (_count(self.chosen, k) == k.last + 1 - k.first) & (q.first >= 0)


@dataclasses.dataclass(frozen=True)
class Sinks(_SeenFromEverywhere):
    """The first `tokens` tokens of the document, seen from everywhere (Xiao et al., arXiv:2309.17453)."""

    tokens: int

    def __post_init__(self):
        at_least_one(self, "tokens", most=_CHOSEN)

    @property
    def chosen(self):
        return tuple(range(self.tokens))


@dataclasses.dataclass(frozen=True)
class Keys(_SeenFromEverywhere):
    """Keys at chosen positions of the document, in order, seen from everywhere."""

    chosen: tuple[int, ...]

    def __post_init__(self):
        _in_order(self)


@dataclasses.dataclass(frozen=True)
class Queries(Pattern):
    """Queries at chosen positions of the document, in order, which see everything."""

    chosen: tuple[int, ...]
    ahead = None

    def __post_init__(self):
        _in_order(self)

    @property
    def reach(self):
        return max(self.chosen)

    @property
    def inside(self):
        return Everything()

    def seeing(self, positions):
        return _among(self.chosen, positions)

    def mask(self, q_positions, k_positions):
        return self.seeing(q_positions) & (k_positions >= 0)

    def touches(self, q, k):
        return (_count(self.chosen, q) > 0) & (k.last >= 0)

    def covers(self, q, k):
        return (_count(self.chosen, q) == q.last + 1 - q.first) & (k.first >= 0)


def Global(tokens: int | tuple[int, ...]) -> Pattern:
    """Tokens that see everything and are seen from everywhere: `Keys(...) | Queries(...)`.

    Args:
      tokens: how many of the document's first tokens, as in Zaheer et al., arXiv:2007.14062 (BigBird), or the positions
        of the chosen ones, as in Beltagy et al., arXiv:2004.05150 (Longformer).
    """
    chosen = tuple(sorted(tokens)) if isinstance(tokens, tuple | list) else Sinks(tokens).chosen
    return Keys(chosen) | Queries(chosen)


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Pattern):
    """`number` blocks of `block` tokens before the query's own, one from each of as many equal parts of what is before.

    Zaheer et al., arXiv:2007.14062 (BigBird) draw all of a query block's random blocks from the whole row; drawn part
    by part and from a hash they are distinct, lie behind the query, and do not change as the document grows.
    """

    block: int
    number: int
    seed: int = 0
    reach = None
    ahead = 0
    exact = False

    def __post_init__(self):
        at_least_one(self, "block")
        at_least_one(self, "number", most=_DRAWN)
        whole_number(self, "seed", self.seed, most=2**32 - 1)

    @property
    def scattered(self) -> int:
        return self.block

    def _drawn(self, row):
        """For each part of the blocks before block `row`: the block that is drawn, and whether there is any."""
        for part in range(self.number):
            first, end = row * part // self.number, row * (part + 1) // self.number
            size = end - first
            yield first + hashed(row, part, self.seed) % (size + (size == 0)), size > 0

    def mask(self, q_positions, k_positions):
        rows, columns = q_positions // self.block, k_positions // self.block
        visible = False
        for drawn, any_ in self._drawn(rows):
            visible |= (columns == drawn) & any_
        return visible

    def touches(self, q, k):
        row, last = q.first // self.block, q.last // self.block
        first_column, last_column = k.first // self.block, k.last // self.block
        found = (last - row >= _ROWS) & (first_column < last)  # too many to ask each
        for _ in range(_ROWS):
            for drawn, any_ in self._drawn(row):
                found |= (row <= last) & any_ & (first_column <= drawn) & (drawn <= last_column)
            row += 1
        return found

    def covers(self, q, k):
        one = (q.first // self.block == q.last // self.block) & (k.first // self.block == k.last // self.block)
        return one & self.touches(q, k)


@dataclasses.dataclass(frozen=True)
class Blocks(Pattern):
    """Any layout of blocks: query block i sees key block j where `layout[i, j]`; nothing beyond the layout.

    Args:
      layout: bool `[query blocks, key blocks]`, an array or nested sequences.
      block: tokens a block.
    """

    layout: tuple[tuple[bool, ...], ...]
    block: int

    def __post_init__(self):
        at_least_one(self, "block")
        layout = np.asarray(self.layout)
        if layout.ndim != 2 or layout.dtype != bool or not layout.any():
            raise ValueError(
                f"the layout of Blocks is {layout.dtype}{list(layout.shape)}; give bool[query blocks, key blocks] with "
                "at least one True."
            )
        object.__setattr__(self, "layout", tuple(map(tuple, layout.tolist())))

    @property
    def _distance(self):
        """In blocks, from query to key, of all visible pairs of blocks."""
        i, j = np.nonzero(np.asarray(self.layout))
        return i - j

    @property
    def reach(self):
        return max(0, int(self._distance.max()) * self.block + self.block - 1)

    @property
    def ahead(self):
        return max(0, int(-self._distance.min()) * self.block + self.block - 1)

    def mask(self, q_positions, k_positions):
        layout = np.pad(np.asarray(self.layout), ((0, 1), (0, 1)))
        i, j = (smaller(x // self.block, n - 1) for x, n in zip((q_positions, k_positions), layout.shape, strict=True))
        return take(layout, i, j)

    def _count(self, q, k):
        """True entries of the layout where the blocks of two ranges meet."""
        sums = np.pad(np.asarray(self.layout), ((1, 0), (1, 0))).cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
        (i, m), (j, n) = (
            (smaller(side.first // self.block, blocks), smaller(side.last // self.block + 1, blocks))
            for side, blocks in zip((q, k), np.subtract(sums.shape, 1), strict=True)
        )
        return take(sums, m, n) - take(sums, i, n) - take(sums, m, j) + take(sums, i, j)

    def touches(self, q, k):
        return self._count(q, k) > 0

    def covers(self, q, k):
        rows, columns = (side.last // self.block + 1 - side.first // self.block for side in (q, k))
        return self._count(q, k) == rows * columns


_CHOSEN = 2**16  # tokens that are seen from everywhere, at most: each is an anchor of a cache
_DRAWN = 1024  # random blocks of a query, at most: each is an operation
_ROWS = 4  # rows of random blocks that `touches` asks one by one


def _in_order(pattern):
    chosen = pattern.chosen
    if len(chosen) > _CHOSEN:
        raise ValueError(f"{type(pattern).__name__} has {len(chosen):,} positions; give at most {_CHOSEN:,}.")
    for one in chosen:
        whole_number(pattern, "a position", one)
    if not chosen or min(chosen) < 0 or any(b <= a for a, b in itertools.pairwise(chosen)):
        raise ValueError(f"{pattern} has positions {chosen}; give at least one, from 0 on, in ascending order.")


def _single(q, k):
    """Whether both ranges are one token."""
    return (q.first == q.last) & (k.first == k.last)


def _among(chosen: tuple[int, ...], positions):
    """Whether each position is chosen."""
    if chosen == tuple(range(len(chosen))):
        return positions < len(chosen)
    return (np.isin if known(positions) else jnp.isin)(positions, np.asarray(chosen))


def _count(chosen: tuple[int, ...], side):
    """How many chosen positions lie in a range."""
    if chosen == tuple(range(len(chosen))):
        return smaller(side.last + 1, len(chosen)) - smaller(side.first, len(chosen))
    search = np.searchsorted if known(*side) else jnp.searchsorted
    return search(np.asarray(chosen), side.last, side="right") - search(np.asarray(chosen), side.first)


def hashed(*numbers):
    """A 32-bit hash of integers, as int32 from 0 on; the same in numpy and jax (Appleby's finaliser, MurmurHash3)."""
    xp = np if known(*numbers) else jnp
    with np.errstate(over="ignore"):
        x = xp.uint32(0)
        for number in numbers:
            x = (x ^ xp.asarray(number).astype(xp.uint32)) * xp.uint32(0x9E3779B1) + xp.uint32(0x7F4A7C15)
            x = (x ^ (x >> 16)) * xp.uint32(0x85EBCA6B)
            x = (x ^ (x >> 13)) * xp.uint32(0xC2B2AE35)
            x ^= x >> 16
        return (x >> 1).astype(xp.int32)
