"""Patterns whose tokens lie together: bands around the diagonal, and groups of neighbours."""

from __future__ import annotations

import dataclasses

import numpy as np

from longctx.ops.patterns.algebra import Pattern, Range


@dataclasses.dataclass(frozen=True)
class Causal(Pattern):
    """The query's own token and all before it."""

    reach = None
    ahead = 0
    band = True

    def mask(self, q_positions, k_positions):
        return k_positions <= q_positions

    def behind(self, positions):
        return Range(0, positions)

    def touches(self, q, k):
        return k.first <= q.last

    def covers(self, q, k):
        return k.last <= q.first


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
    """Tokens less than `size` away, on both sides; with `Causal()` the last `size` tokens, the own included.

    Beltagy et al., arXiv:2004.05150 (Longformer).
    """

    size: int
    band = True

    def __post_init__(self):
        at_least_one(self, "size")

    @property
    def reach(self) -> int:
        return self.size - 1

    @property
    def ahead(self) -> int:
        return self.size - 1

    def mask(self, q_positions, k_positions):
        return (q_positions - k_positions < self.size) & (k_positions - q_positions < self.size)

    def behind(self, positions):
        return Range(0, self.reach)

    def touches(self, q, k):
        return (q.first - k.last < self.size) & (k.first - q.last < self.size)

    def covers(self, q, k):
        return (q.last - k.first < self.size) & (k.last - q.first < self.size)


@dataclasses.dataclass(frozen=True)
class Chunked(Pattern):
    """The query's own group of `size` tokens and `back` groups before it, counted from the document's start."""

    size: int
    back: int = 0

    def __post_init__(self):
        at_least_one(self, "size")
        whole_number(self, "back", self.back, most=MOST // self.size - 1)

    @property
    def reach(self) -> int:
        return (self.back + 1) * self.size - 1

    @property
    def ahead(self) -> int:
        return self.size - 1

    @property
    def _shift(self) -> int:
        return 0

    def _group(self, positions):
        return (positions + self._shift) // self.size

    def mask(self, q_positions, k_positions):
        behind = self._group(q_positions) - self._group(k_positions)
        return (behind >= 0) & (behind <= self.back)

    def behind(self, positions):
        return Range(0, positions + self._shift - (self._group(positions) - self.back) * self.size)

    def touches(self, q, k):
        nearest, farthest = self._group(q.first) - self._group(k.last), self._group(q.last) - self._group(k.first)
        return (nearest <= self.back) & (farthest >= 0)

    def covers(self, q, k):
        nearest, farthest = self._group(q.first) - self._group(k.last), self._group(q.last) - self._group(k.first)
        return (nearest >= 0) & (farthest <= self.back)


@dataclasses.dataclass(frozen=True)
class ShiftedGroups(Chunked):
    """`Chunked` with its groups moved by half a group: the first has `size - size // 2` tokens.

    LongLoRA (Chen et al., arXiv:2309.12307) has half the heads attend within groups and the others within shifted
    ones. There the last half group joins the first; here it is a group of its own, so that nothing looks ahead.
    """

    @property
    def _shift(self) -> int:
        return self.size // 2


MOST = 2**31 - 1  # positions are int32


def at_least_one(pattern: Pattern, *names: str, most: int = MOST) -> None:
    """Refuses a pattern one of whose named fields is no whole number, less than 1, or above `most`.

    Raises:
      ValueError: with the field, what it is, and what to give.
    """
    for name in names:
        whole_number(pattern, name, getattr(pattern, name), 1, most)


def whole_number(pattern: Pattern, name: str, value: object, least: int = 0, most: int = MOST) -> None:
    """Refuses what is no whole number from `least` to `most`, as `at_least_one` does."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{type(pattern).__name__} has {name} {value!r}; give a whole number of at least {least}.")
    if value < least:
        raise ValueError(f"{pattern} has {name} {value}; give at least {least}.")
    if value > most:
        raise ValueError(f"{type(pattern).__name__} has {name} above {most:,}; give at most that.")
