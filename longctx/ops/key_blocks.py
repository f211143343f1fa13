"""Blocks of keys of a packed row's documents, and choosing among them.

Blocks are counted from the start of each document, so that a packed row has the blocks that its documents have alone.
A block is there once its last token is; what a document has beyond its last block is seen by other means. Blocks begin
every `stride` tokens and have at least as many, so that the last tokens of any two, of different documents too, are
`stride` places apart: a row of T tokens, cut into cells of `stride` places, has at most one block that ends in each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from longctx.ops.row import Row
from longctx.ops.sizes import sizes
from longctx.typing import Segments


class KeyBlocks(NamedTuple):
    """Blocks in the order of the row, some of which are not there.

    Attributes:
      ids: `[B, N]` id of the document, 0 for a block that is not there.
      index: `[B, N]` number of the block within its document.
      last: `[B, N]` place in the row of its last token; ascending, those of blocks that are not there included.
    """

    ids: Int[Array, "B N"]
    index: Int[Array, "B N"]
    last: Int[Array, "B N"]

    @classmethod
    def cut(
        cls, tree: Any, segments: Segments, size: int, row: Row, length: int, stride: int | None = None
    ) -> tuple[KeyBlocks, Any]:
        """The blocks that end among the last `length` tokens of a part of a row.

        Args:
          tree: arrays `[B, S, ...]` by token, with `size - 1` tokens before those `length`, if there are any.
          segments: of these tokens; documents are contiguous.
          size: C, tokens a block.
          row: of which this is a part.
          length: tokens of the part.
          stride: tokens from one block to the next, at most C; None for C.

        Returns:
          N = ⌈length / stride⌉ blocks, and arrays `[B, N, C, ...]` of their tokens: any where there is no block.
        """
        stride = stride or size
        ids, positions = segments.ids, segments.positions
        before, blocks = ids.shape[1] - length, -(-length // stride)

        def opening(x):  # what stands where a block begins that ends here
            return jnp.pad(x, ((0, 0), (size - 1, 0)))[:, : x.shape[1]]

        ends = segments.valid & (opening(ids) == ids) & (opening(positions) == positions - (size - 1))
        ends &= (positions + 1 - size) % stride == 0
        cells = jnp.pad(ends[:, before:], ((0, 0), (0, blocks * stride - length))).reshape(-1, blocks, stride)
        last = jnp.arange(blocks, dtype=jnp.int32) * stride + jnp.argmax(cells, axis=2).astype(jnp.int32)
        places = (before + last[:, :, None] + jnp.arange(1 - size, 1)).clip(0, ids.shape[1] - 1)

        def take(x, places):
            index = places.reshape(len(places), -1, *(1,) * (x.ndim - 2))
            return jnp.take_along_axis(x, index, axis=1).reshape(*places.shape, *x.shape[2:])

        there = cells.any(axis=2)
        ids, index = (take(x, places[:, :, -1]) for x in (ids, (positions + 1 - size) // stride))
        found = cls(jnp.where(there, ids, 0), index, row.first + last)
        return found, jax.tree.map(lambda x: take(x, places), tree)


def choose(
    score: Callable[..., Float[Array, "B t G R N"]],
    queries: tuple[Shaped[Array, "B T ..."], ...],
    count: int,
) -> Int[Array, "B T G R n"]:
    """The blocks with the highest scores. The choice has no gradient, and memory is linear in T.

    Args:
      score: of the arrays `queries`, for some of the T; -inf for a block that the query may not choose.
      queries: arrays by query.
      count: blocks to choose; n is this, or N where there are fewer.

    Returns:
      indices of blocks, the best first, the first of equal ones; -1 where there are none left.
    """
    length = queries[0].shape[1]
    step = min(length, sizes().choosing)

    def chunks(x):
        x = jnp.pad(x.swapaxes(0, 1), ((0, -length % step), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, step, *x.shape[1:]).swapaxes(1, 2)

    def some(queries):
        scores = jax.lax.stop_gradient(score(*queries))
        best, index = jax.lax.top_k(scores, min(count, scores.shape[-1]))
        return jnp.where(jnp.isneginf(best), -1, index)

    chosen = jax.lax.map(some, jax.tree.map(chunks, queries)).swapaxes(1, 2)
    return chosen.reshape(-1, *chosen.shape[2:])[:length].swapaxes(0, 1)
