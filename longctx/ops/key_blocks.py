"""The whole blocks of keys of a packed row's documents, and choosing among them.

Blocks are counted from the start of each document, so that a packed row has the blocks that its documents have alone.
A block is whole once its last token is there; the rest of a document is seen by other means, so that a row of T tokens
has at most T // C blocks of C tokens to choose from.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from longctx.typing import Segments

_QUERIES = 256  # whose scores are held at once


class KeyBlocks(NamedTuple):
    """Whole blocks, in the order of the row.

    Attributes:
      start: `[B, N]` place in the row of the first token.
      ids: `[B, N]` id of the document, 0 where there is no block.
      index: `[B, N]` number of the block within its document.
    """

    start: Int[Array, "B N"]
    ids: Int[Array, "B N"]
    index: Int[Array, "B N"]

    @classmethod
    def of(cls, segments: Segments, size: int) -> KeyBlocks:
        """The whole blocks of `size` tokens of a row; N = T // size. Documents are contiguous."""
        length = segments.ids.shape[1]
        end = jnp.pad(segments.ids[:, size - 1 :], ((0, 0), (0, min(size - 1, length))))[:, :length]
        opens = segments.valid & (segments.positions % size == 0) & (end == segments.ids)
        start = jnp.argsort(~opens, axis=1, stable=True)[:, : length // size]
        opens, ids, positions = (
            jnp.take_along_axis(x, start, axis=1) for x in (opens, segments.ids, segments.positions)
        )
        return cls(start, jnp.where(opens, ids, 0), positions // size)

    def gather(self, x: Shaped[Array, "B T ..."], size: int) -> Shaped[Array, "B N C ..."]:
        """The tokens of each block; any tokens where there is none."""
        places = jnp.minimum(self.start[:, :, None] + jnp.arange(size), x.shape[1] - 1)
        places = places.reshape(len(places), -1, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, places, axis=1).reshape(*self.start.shape, size, *x.shape[2:])


def choose(
    q: Float[Array, "B T G R K"],
    keys: Float[Array, "B N G K"],
    may: Bool[Array, "B T N"],
    count: int,
    *,
    share: bool,
) -> Int[Array, "B T G R n"]:
    """The blocks with the largest products of query and key, of those that the query may choose.

    Args:
      q: queries, R heads to a group.
      keys: a key for each block.
      may: whether the query may choose the block.
      count: n, at most; all of them where there are fewer.
      share: whether the heads of a group choose together, by the sum of their scores.

    Returns:
      indices of blocks, the best first, the first of equal ones; -1 where there are none left. R is 1 if they share.
    """
    batch, length, groups, repeats, width = q.shape
    count = min(count, keys.shape[1])
    if not count:
        return jnp.full((batch, length, groups, 1 if share else repeats, 0), -1, jnp.int32)

    def some(args):
        q, may = args
        scores = jnp.einsum("tbgrk,bngk->tbgrn", q, keys, preferred_element_type=jnp.float32)
        scores = scores.sum(3, keepdims=True) if share else scores
        best, index = jax.lax.top_k(jnp.where(may[:, :, None, None], scores, -jnp.inf), count)
        return jnp.where(jnp.isneginf(best), -1, index)

    pad = -length % min(length, _QUERIES)
    chunks = [
        jnp.pad(x.swapaxes(0, 1), ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(-1, min(length, _QUERIES), *shape)
        for x, shape in ((q, (batch, groups, repeats, width)), (may, (batch, keys.shape[1])))
    ]
    chosen = jax.lax.map(some, tuple(chunks))
    return chosen.reshape(-1, *chosen.shape[2:])[:length].swapaxes(0, 1)
