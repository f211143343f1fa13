"""A row of tokens that one device holds or several share, as an op sees it.

An op is written once for both: what it needs of the rest of the row it asks of a `Row`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from jaxtyping import Array, Int

from longctx.ops.partial import Partial


class Row(Protocol):
    """How a part of a row reaches the rest: `WHOLE`, or `longctx.parallel.shards.Shards`.

    Attributes:
      parts: how many there are.
      index: number of this one.
      first: position in the row of its first token.
    """

    parts: int
    index: int | Int[Array, ""]
    first: int | Int[Array, ""]

    def near(self, tree: Any, count: int) -> Any:
        """Arrays `[B, T, ...]` by token with up to `count` tokens before them; zeros before the row's first."""

    def gather(self, tree: Any) -> Any:
        """Arrays `[B, N, ...]` of all parts, in the order of the row."""

    def fetch(self, tree: Any, chosen: Int[Array, "B T G n"]) -> Any:
        """The same for blocks `[B, N, C, G, ...]`, with anything in place of those that are not among the chosen."""

    def onward(self, tree: Any) -> Any:
        """What the part before this one has; the first gets that of the last."""

    def merged(self, partial: Callable[..., Partial], mine: Any, own: Any, of_mine: Any, of_own: Any) -> Partial:
        """`partial(mine, keys, of_mine, of_keys)` over the keys of every part, merged; see `longctx.parallel.ring`."""

    def attention(self, *call: Any) -> Any:
        """Softmax attention, as `longctx.parallel.attention` computes it."""


class _Whole:
    """A row of which nothing is elsewhere."""

    parts, index, first = 1, 0, 0

    def near(self, tree, count):
        return tree

    def gather(self, tree):
        return tree

    def fetch(self, tree, chosen):
        return tree

    def onward(self, tree):
        return tree

    def merged(self, partial, mine, own, of_mine, of_own):
        return partial(mine, own, of_mine, of_own)


WHOLE: Row = _Whole()
