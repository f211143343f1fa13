r"""What a pattern is, and how patterns combine: `&`, `|`, `~` and `+`."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

from longctx.ops.patterns.arrays import larger, smaller


class Range(NamedTuple):
    """Positions `first` to `last`, both included; integers or integer arrays of any one shape."""

    first: Any
    last: Any


class Pattern:
    """Which keys a query may see; see the package's docstring.

    Attributes:
      reach: how many tokens back a query may look, None for all of them, anchors not counted.
      ahead: how many tokens forward a query may look, None for all of them; 0 for a causal pattern.
      anchors: positions, in order, of the keys that may be visible beyond `reach`.
      band: whether a query sees all that `reach` and `ahead` allow, and nothing else.
      stride: the distance of a query from a key that it sees is a multiple of this.
      exact: whether `touches` is True only where something is visible.
      scattered: tokens a block, if what is far away are whole blocks here and there; 0 if not.
    """

    reach: int | None
    ahead: int | None
    anchors: tuple[int, ...] = ()
    band: bool = False
    stride: int = 1
    exact: bool = True
    scattered: int = 0

    def __and__(self, other: Pattern) -> Pattern:
        return Both(self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return Either(self, other)

    def __add__(self, other: Pattern) -> Pattern:
        return Sum(self, other)

    def __invert__(self) -> Pattern:
        return Not(self)

    def mask(self, q_positions: Int[Array, "..."], k_positions: Int[Array, "..."]) -> Bool[Array, "..."]:
        """True where the query may see the key. The positions broadcast, e.g. `[T, 1]` with `[S]` to `[T, S]`."""
        raise NotImplementedError

    def times(self, q_positions: Int[Array, "..."], k_positions: Int[Array, "..."]) -> Array:
        """How many times the query sees the key: more than once only where patterns are added."""
        return self.mask(q_positions, k_positions)

    def touches(self, q: Range, k: Range) -> Any:
        """False only where no query of the range `q` sees any key of the range `k`."""
        raise NotImplementedError

    def covers(self, q: Range, k: Range) -> Any:
        """True only where every query of the range `q` sees every key of the range `k`."""
        raise NotImplementedError

    def near(self, q: Range, k: Range) -> Any:
        """`touches` for ranges of places in a row whose documents begin at places not known: distances alone tell.

        Reach and stride hold for distances in the row too. Anchors may lie anywhere, so that with them nothing is out
        of reach.
        """
        most, least = q.last - k.first, q.first - k.last
        if self.ahead is not None:
            least = np.maximum(least, -self.ahead)
        if self.reach is not None and not self.anchors:
            most = np.minimum(most, self.reach)
        return most // self.stride * self.stride >= least

    def seeing(self, positions: Int[Array, "..."]) -> Bool[Array, "..."] | None:
        """False only for queries that see nothing; None if there are none such."""
        return None

    def seen(self, positions: Int[Array, "..."]) -> Bool[Array, "..."] | None:
        """False only for keys that nothing sees; None if there are none such."""
        return None

    def behind(self, positions: Int[Array, "..."]) -> Range | None:
        """Of the keys not after it, a query sees those at distances of this range, integers or as `positions`.

        None if they are not all of a range. A distance greater than the query's position leads out of its document.
        """
        return None

    @property
    def inside(self) -> Pattern:
        """A simpler pattern that agrees with it at distances of `stride`, among queries `seeing` and keys `seen`."""
        return self

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """Patterns whose union is this one."""
        return (self,)

    @property
    def summands(self) -> tuple[Pattern, ...]:
        """Patterns whose sum this one is, none of which counts a key twice."""
        return (self,)

    @property
    def union(self) -> Pattern:
        """What any head sees: itself, as all heads have it."""
        return self

    @property
    def thin(self) -> bool:
        """Whether it leaves out whole queries, keys or distances, so that in another order its tokens lie together."""
        return self.stride > 1 or self.seeing(np.zeros(1, int)) is not None or self.seen(np.zeros(1, int)) is not None

    def pairs(
        self, length: int, block: int | tuple[int, int], *, packed: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of keys that each block of queries may touch, for queries and keys that are the same tokens.

        Args:
          length: T, of the row. The last block of each may be shorter.
          block: tokens a block, or (queries a block, keys a block).
          packed: the row holds documents that begin at places not known here: by `near`, not by `touches`.

        Returns:
          `(i, j)`: indices of the blocks of queries, ascending, and of the keys, ascending for each i. Every visible
          pair of tokens lies in one of these pairs of blocks.
        """
        sizes = block if isinstance(block, tuple) else (block, block)
        return touched_pairs(
            self.near if packed else self.touches,
            *(Range(*_blocks(length, size)) for size in sizes),
        )

    def block_map(self, length: int, block: int | tuple[int, int]) -> np.ndarray:
        """Which blocks of keys each block of queries touches, in a row that is one document.

        Args:
          length, block: as in `pairs`.

        Returns:
          bool `[query blocks, key blocks]`, True exactly where a query sees a key.
        """
        sizes = block if isinstance(block, tuple) else (block, block)
        q, k = (Range(*_blocks(length, size)) for size in sizes)
        i, j = self.pairs(length, block)
        found = np.zeros((q.first.size, k.first.size), bool)
        found[i, j] = True
        if not self.exact:
            unsure = np.flatnonzero(~np.broadcast_to(self.covers(_at(q, i), _at(k, j)), i.shape))
            for some in np.array_split(unsure, 1 + unsure.size * sizes[0] * sizes[1] // 2**24):
                rows = q.first[i[some], None] + np.arange(sizes[0])
                columns = k.first[j[some], None] + np.arange(sizes[1])
                valid = (rows < length)[:, :, None] & (columns < length)[:, None, :]
                visible = self.mask(rows[:, :, None], columns[:, None, :]) & valid
                found[i[some], j[some]] = visible.any((1, 2))
        return found


def touched_pairs(touches: Callable[[Range, Range], Any], q: Range, k: Range) -> tuple[np.ndarray, np.ndarray]:
    """Pairs `(i, j)` of blocks whose ranges touch, without asking about all pairs: coarse blocks first.

    Args:
      touches: of two ranges; True for ranges if it is for any of their parts.
      q, k: ranges of the blocks, int `[blocks]`.

    Returns:
      as `Pattern.pairs`.
    """
    levels = [(q, k)]
    while max(len(levels[-1][0].first), len(levels[-1][1].first)) > 32:
        levels.append(tuple(_halved(side) for side in levels[-1]))
    i, j = (side.reshape(-1) for side in np.indices([len(side.first) for side in levels[-1]]))
    for level, (q, k) in reversed(list(enumerate(levels))):
        if level < len(levels) - 1:
            i, j = (2 * i[:, None] + [0, 0, 1, 1]).reshape(-1), (2 * j[:, None] + [0, 1, 0, 1]).reshape(-1)
            inside = (i < len(q.first)) & (j < len(k.first))
            i, j = i[inside], j[inside]
        touched = np.broadcast_to(touches(_at(q, i), _at(k, j)), i.shape)
        i, j = i[touched], j[touched]
    order = np.lexsort((j, i))
    return i[order], j[order]


def _halved(side: Range) -> Range:
    """Ranges of two neighbours each."""
    first, last = (np.append(x, x[-1:]) if len(x) % 2 else x for x in side)
    return Range(np.minimum(first[::2], first[1::2]), np.maximum(last[::2], last[1::2]))


def _at(side: Range, index: np.ndarray) -> Range:
    return Range(side.first[index], side.last[index])


def _blocks(length: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.arange(0, length, block)
    return first, np.minimum(first + block, length) - 1


def _all_of(first, second):
    """`first & second`, None being all True."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _any_of(first, second):
    """`first | second`, None being all True."""
    return None if first is None or second is None else first | second


def _none_as_inf(bound: int | None) -> float:
    return math.inf if bound is None else bound


@dataclasses.dataclass(frozen=True)
class Everything(Pattern):
    """All tokens of the document."""

    reach = None
    ahead = None
    band = True

    def mask(self, q_positions, k_positions):
        return (q_positions >= 0) & (k_positions >= 0)

    def touches(self, q, k):
        return (q.last >= 0) & (k.last >= 0)

    covers = touches

    def behind(self, positions):
        return Range(0, positions)

    def __and__(self, other):
        return other


@dataclasses.dataclass(frozen=True, repr=False)
class Both(Pattern):
    """What two patterns both show: `first & second`."""

    first: Pattern
    second: Pattern

    def __repr__(self):
        return f"{_within(self.first, Either)} & {_within(self.second, Both | Either)}"

    @property
    def band(self) -> bool:
        return self.first.band and self.second.band

    @property
    def exact(self) -> bool:
        return self.band

    @property
    def _nearer(self) -> Pattern:
        # Beyond the shorter reach only that pattern's own anchors can be visible in both.
        return min(self.first, self.second, key=lambda one: (_none_as_inf(one.reach), len(one.anchors)))

    @property
    def reach(self) -> int | None:
        return self._nearer.reach

    @property
    def ahead(self) -> int | None:
        return min(self.first, self.second, key=lambda one: _none_as_inf(one.ahead)).ahead

    @property
    def anchors(self) -> tuple[int, ...]:
        return self._nearer.anchors

    @property
    def stride(self) -> int:
        return math.lcm(self.first.stride, self.second.stride)

    @property
    def scattered(self) -> int:
        return self.first.scattered or self.second.scattered

    def mask(self, q_positions, k_positions):
        return self.first.mask(q_positions, k_positions) & self.second.mask(q_positions, k_positions)

    def touches(self, q, k):
        return self.first.touches(q, k) & self.second.touches(q, k)

    def covers(self, q, k):
        return self.first.covers(q, k) & self.second.covers(q, k)

    def times(self, q_positions, k_positions):
        return self.first.times(q_positions, k_positions) * self.second.times(q_positions, k_positions)

    def seeing(self, positions):
        return _all_of(self.first.seeing(positions), self.second.seeing(positions))

    def seen(self, positions):
        return _all_of(self.first.seen(positions), self.second.seen(positions))

    def behind(self, positions):
        first, second = self.first.behind(positions), self.second.behind(positions)
        if first is None or second is None:
            return None
        return Range(larger(first.first, second.first), smaller(first.last, second.last))

    @property
    def inside(self) -> Pattern:
        first, second = self.first.inside, self.second.inside
        return first if isinstance(second, Everything) else first & second

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """A union within either is one of intersections."""
        return self._distributed(self.first.parts, self.second.parts)

    @property
    def summands(self) -> tuple[Pattern, ...]:
        """A sum within either is one of intersections."""
        return self._distributed(self.first.summands, self.second.summands)

    def _distributed(self, firsts, seconds):
        if len(firsts) == len(seconds) == 1:
            return (self,)
        return tuple(first & second for first in firsts for second in seconds)


@dataclasses.dataclass(frozen=True, repr=False)
class Either(Pattern):
    """What one of two patterns shows: `first | second`."""

    first: Pattern
    second: Pattern

    def __repr__(self):
        return f"{self.first} | {_within(self.second, Either)}"

    @property
    def band(self) -> bool:
        return self.first.band and self.second.band

    @property
    def exact(self) -> bool:
        return self.first.exact and self.second.exact

    @property
    def reach(self) -> int | None:
        return max(self.first, self.second, key=lambda one: _none_as_inf(one.reach)).reach

    @property
    def ahead(self) -> int | None:
        return max(self.first, self.second, key=lambda one: _none_as_inf(one.ahead)).ahead

    @property
    def anchors(self) -> tuple[int, ...]:
        return tuple(sorted({*self.first.anchors, *self.second.anchors}))

    @property
    def stride(self) -> int:
        return math.gcd(self.first.stride, self.second.stride)

    def mask(self, q_positions, k_positions):
        return self.first.mask(q_positions, k_positions) | self.second.mask(q_positions, k_positions)

    def touches(self, q, k):
        return self.first.touches(q, k) | self.second.touches(q, k)

    def covers(self, q, k):
        return self.first.covers(q, k) | self.second.covers(q, k)

    def seeing(self, positions):
        return _any_of(self.first.seeing(positions), self.second.seeing(positions))

    def seen(self, positions):
        return _any_of(self.first.seen(positions), self.second.seen(positions))

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self.first.parts + self.second.parts


@dataclasses.dataclass(frozen=True, repr=False)
class Sum(Either):
    """What one of two patterns shows, and twice what both show: `first + second`.

    Attention under a sum is that under each pattern, mixed by the denominators of their softmax; a key that is seen
    n times has log n added to its logit.
    """

    band = False

    def __repr__(self):
        first = self.first if isinstance(self.first, Sum) else _within(self.first, Either)
        return f"{first} + {_within(self.second, Either)}"

    def times(self, q_positions, k_positions):
        first, second = (one.times(q_positions, k_positions) for one in (self.first, self.second))
        return first.astype(np.int32) + second.astype(np.int32)

    @property
    def summands(self) -> tuple[Pattern, ...]:
        return self.first.summands + self.second.summands


@dataclasses.dataclass(frozen=True, repr=False)
class Not(Pattern):
    """What a pattern does not show: `~pattern`."""

    pattern: Pattern
    reach = None
    ahead = None
    exact = False

    def __repr__(self):
        return f"~({self.pattern})" if isinstance(self.pattern, Both | Either) else f"~{self.pattern}"

    def mask(self, q_positions, k_positions):
        return ~self.pattern.mask(q_positions, k_positions)

    def touches(self, q, k):
        return ~self.pattern.covers(q, k)

    def covers(self, q, k):
        return ~self.pattern.touches(q, k)

    def behind(self, positions):
        found = self.pattern.behind(positions)
        if found is None or np.ndim(found.first) or found.first > 0:  # on both sides of it
            return None
        return Range(found.last + 1, positions)

    def __invert__(self):
        return self.pattern


def terms(pattern: Pattern) -> tuple[Pattern, ...]:
    """Patterns whose attentions, merged, are that under `pattern`: its summands, each taken apart where it pays.

    The parts of a summand share no pair of tokens. The first is what has no better order of tokens than their own, and
    lies together; each of the others is thin or scattered.
    """
    return tuple(part for summand in pattern.summands for part in _disjoint(summand))


def _within(pattern: Pattern, kinds: type | types.UnionType) -> str:
    """The text of a pattern in that of another, in parentheses if it is one of these kinds."""
    return f"({pattern})" if isinstance(pattern, kinds) else str(pattern)


def _disjoint(pattern: Pattern) -> tuple[Pattern, ...]:
    parts = pattern.parts
    apart = [part for part in parts if part.thin or part.scattered]
    if pattern.thin or not apart:
        return (pattern,)
    plain = [part for part in parts if part not in apart]
    found = [functools.reduce(operator.or_, plain)] if plain else []
    for part in apart:
        found.append(part & ~functools.reduce(operator.or_, found) if found else part)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Patterns that heads take in turn: head h has `patterns[h % len(patterns)]`."""

    patterns: tuple[Pattern, ...]

    def __post_init__(self):
        if not self.patterns:
            raise ValueError("Heads has no patterns; give at least one.")

    def __str__(self):
        return ", ".join(map(str, self.patterns)) + "," * (len(self.patterns) == 1)

    @property
    def union(self) -> Pattern:
        """What any head sees."""
        return functools.reduce(operator.or_, self.patterns)

    def groups(self, heads: int) -> tuple[tuple[Pattern, tuple[int, ...]], ...]:
        """Each different pattern, and the heads of so many that have it."""
        found: dict[Pattern, list[int]] = {}
        for head in range(heads):
            found.setdefault(self.patterns[head % len(self.patterns)], []).append(head)
        return tuple((pattern, tuple(chosen)) for pattern, chosen in found.items())
