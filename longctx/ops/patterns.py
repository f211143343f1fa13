r"""Patterns: which keys a query may see, as small frozen data composed with `&` and `|`.

    Causal() & (Window(512) | Global(4))        # the last 512 tokens, and the first 4 of the document

A pattern speaks of positions within a document; that query and key belong to the same document is the
attention op's part, not the pattern's. With p_q and p_k the two positions,

    Causal():   p_k <= p_q
    Window(w):  |p_q - p_k| < w
    Chunked(n): p_q // n = p_k // n
    Global(n):  p_k < n            (sink tokens; Longformer, arXiv:2004.05150, StreamingLLM, arXiv:2309.17453)

Every pattern answers four questions: its dense `mask` (the definition); its `block_map`, which blocks of keys
each block of queries touches; whether two ranges of positions are anywhere or everywhere visible to each other
(`touches`, `covers`), from which the same map follows when positions are known only at run time; and how far a
query looks, as three numbers: whatever it sees is a key with `-ahead <= p_q - p_k <= reach` or with
`p_k < global_tokens`. From those a sharded caller knows which keys to move: a bounded reach is a halo, global
tokens are a broadcast, an unbounded reach is a ring. Patterns that are exactly the band between `-ahead` and `reach`
say so (`band`).

Patterns are hashable, so that they can be static arguments of a jitted function.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int


class Range(NamedTuple):
    """Positions `first` to `last`, both included; integers or integer arrays of any one shape."""

    first: Any
    last: Any


class Pattern:
    """Which keys a query may see; see the module's docstring.

    Attributes:
      reach: how many tokens back a query may look, None for all of them, global tokens not counted.
      ahead: how many tokens forward a query may look; 0 for a causal pattern.
      global_tokens: keys at the start of the document that may be visible beyond `reach`.
      band: whether a query sees all that `reach` and `ahead` allow, and nothing else.
    """

    reach: int | None
    ahead: int
    global_tokens: int
    band: bool

    def __and__(self, other: Pattern) -> Pattern:
        return Both(self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return Either(self, other)

    def mask(self, q_positions: Int[Array, "..."], k_positions: Int[Array, "..."]) -> Bool[Array, "..."]:
        """True where the query may see the key. The positions broadcast, e.g. `[T, 1]` with `[S]` to `[T, S]`."""
        raise NotImplementedError

    def touches(self, q: Range, k: Range) -> Any:
        """False only where no query of the range `q` sees any key of the range `k`."""
        raise NotImplementedError

    def covers(self, q: Range, k: Range) -> Any:
        """True only where every query of the range `q` sees every key of the range `k`."""
        raise NotImplementedError

    def block_map(self, length: int, block: int | tuple[int, int], *, packed: bool = False) -> np.ndarray:
        """Which blocks of keys each block of queries touches, for queries and keys that are the same tokens.

        Args:
          length: T, of the row. The last block of each may be shorter.
          block: tokens a block, or (queries a block, keys a block).
          packed: the row holds documents that begin at places not known here. Distances within a document are
            distances in the row, so the map is still exact for a causal band; global tokens may lie anywhere, so
            with them no block is left out on account of `reach`.

        Returns:
          bool `[query blocks, key blocks]`. Every visible pair of tokens lies in a True block; without `packed`
          every True block holds a visible pair, unless a window cuts the pattern's global tokens off.
        """
        q_block, k_block = block if isinstance(block, tuple) else (block, block)
        q, k = _blocks(length, q_block), _blocks(length, k_block)
        q = Range(q.first[:, None], q.last[:, None])
        if not packed:
            return np.broadcast_to(self.touches(q, k), (q.first.size, k.first.size)).copy()
        near = np.subtract(k.first, q.last) <= self.ahead
        if self.reach is not None and not self.global_tokens:
            near &= np.subtract(q.first, k.last) <= self.reach
        return near


def _blocks(length: int, block: int) -> Range:
    first = np.arange(0, length, block)
    return Range(first, np.minimum(first + block, length) - 1)


@dataclasses.dataclass(frozen=True)
class Causal(Pattern):
    """The query's own token and all before it."""

    reach = None
    ahead = 0
    global_tokens = 0
    band = True

    def mask(self, q_positions, k_positions):
        return k_positions <= q_positions

    def touches(self, q, k):
        return k.first <= q.last

    def covers(self, q, k):
        return k.last <= q.first


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
    """Tokens less than `size` away, on both sides; with `Causal()` the last `size` tokens, the own included."""

    size: int
    global_tokens = 0
    band = True

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Window({self.size}) shows a query nothing; give at least 1, the query's own token.")

    @property
    def reach(self) -> int:
        return self.size - 1

    @property
    def ahead(self) -> int:
        return self.size - 1

    def mask(self, q_positions, k_positions):
        return (q_positions - k_positions < self.size) & (k_positions - q_positions < self.size)

    def touches(self, q, k):
        return (q.first - k.last < self.size) & (k.first - q.last < self.size)

    def covers(self, q, k):
        return (q.last - k.first < self.size) & (k.last - q.first < self.size)


@dataclasses.dataclass(frozen=True)
class Chunked(Pattern):
    """The query's own block of `size` tokens, blocks counted from the document's start."""

    size: int
    global_tokens = 0
    band = False

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Chunked({self.size}) shows a query nothing; give at least 1, the query's own token.")

    @property
    def reach(self) -> int:
        return self.size - 1

    @property
    def ahead(self) -> int:
        return self.size - 1

    def mask(self, q_positions, k_positions):
        return q_positions // self.size == k_positions // self.size

    def touches(self, q, k):
        return (q.first // self.size <= k.last // self.size) & (k.first // self.size <= q.last // self.size)

    def covers(self, q, k):
        return (q.first // self.size == k.last // self.size) & (k.first // self.size == q.last // self.size)


@dataclasses.dataclass(frozen=True)
class Global(Pattern):
    """The first `tokens` tokens of the document, visible from everywhere."""

    tokens: int
    reach = 0
    band = False

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"Global({self.tokens}) shows a query nothing; give at least 1 token, or leave it out.")

    @property
    def ahead(self) -> int:
        return self.tokens - 1

    @property
    def global_tokens(self) -> int:
        return self.tokens

    def mask(self, q_positions, k_positions):
        return (k_positions < self.tokens) & (q_positions >= 0)  # the second, always true, is for the shape

    def touches(self, q, k):
        return (k.first < self.tokens) & (q.last >= 0)

    def covers(self, q, k):
        return (k.last < self.tokens) & (q.first >= 0)


@dataclasses.dataclass(frozen=True)
class Both(Pattern):
    """What two patterns both show: `first & second`."""

    first: Pattern
    second: Pattern

    @property
    def band(self) -> bool:
        return self.first.band and self.second.band

    @property
    def _nearer(self) -> Pattern:
        # Beyond the shorter reach only that pattern's own global tokens can be visible in both.
        return min(self.first, self.second, key=lambda one: (_reach(one), -one.global_tokens))

    @property
    def reach(self) -> int | None:
        return self._nearer.reach

    @property
    def ahead(self) -> int:
        return min(self.first.ahead, self.second.ahead)

    @property
    def global_tokens(self) -> int:
        return self._nearer.global_tokens

    def mask(self, q_positions, k_positions):
        return self.first.mask(q_positions, k_positions) & self.second.mask(q_positions, k_positions)

    def touches(self, q, k):
        return self.first.touches(q, k) & self.second.touches(q, k)

    def covers(self, q, k):
        return self.first.covers(q, k) & self.second.covers(q, k)


@dataclasses.dataclass(frozen=True)
class Either(Pattern):
    """What one of two patterns shows: `first | second`."""

    first: Pattern
    second: Pattern

    @property
    def band(self) -> bool:
        return self.first.band and self.second.band

    @property
    def reach(self) -> int | None:
        return max(self.first, self.second, key=_reach).reach

    @property
    def ahead(self) -> int:
        return max(self.first.ahead, self.second.ahead)

    @property
    def global_tokens(self) -> int:
        return max(self.first.global_tokens, self.second.global_tokens)

    def mask(self, q_positions, k_positions):
        return self.first.mask(q_positions, k_positions) | self.second.mask(q_positions, k_positions)

    def touches(self, q, k):
        return self.first.touches(q, k) | self.second.touches(q, k)

    def covers(self, q, k):
        return self.first.covers(q, k) | self.second.covers(q, k)


def _reach(pattern: Pattern) -> float:
    return float("inf") if pattern.reach is None else pattern.reach
