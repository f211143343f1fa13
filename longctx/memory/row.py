"""A cache and a span after it as one row of keys, in which documents are contiguous.

For what looks at neighbouring tokens, such as blocks of keys: slots of a cache that no token has taken yet would stand
between the tokens before a span and the span.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from longctx.memory.cache import KVCache
from longctx.typing import Segments

_LAST = np.iinfo(np.int32).max


def join(
    before: KVCache,
    after: KVCache,
    keys: Float[Array, "B T G K"],
    values: Float[Array, "B T G V"],
    segments: Segments,
) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G V"], Segments, Segments]:
    """The keys that a span's queries may see: each document's tokens next to one another in order, padding last.

    A single token is in the cache after it already, whose slots are taken as they are: in order, unless the document
    has more tokens than the cache.

    Args:
      before, after: the cache before and after the span, without anchors.
      keys, values: of the span.
      segments: of the span.

    Returns:
      `(keys, values, held, span)`: the row, its segments, and those of the span; in both the document in progress has
      id 1 and later ones 2, 3, ...
    """
    if keys.shape[1] == 1:  # its document is the one in progress, even where the token starts it
        span = dataclasses.replace(segments, ids=segments.valid.astype(jnp.int32))
        return after.keys, after.values, after.segments, span
    span = dataclasses.replace(segments, ids=jnp.where(segments.valid, segments.runs + 1, 0))
    cached = jnp.where(before.positions < 0, _LAST, before.positions - _LAST)  # all negative: ahead of the span
    own = jnp.where(span.valid, jnp.arange(keys.shape[1], dtype=jnp.int32), _LAST)
    order = jnp.argsort(jnp.concatenate([cached, own], axis=1), axis=1, stable=True)

    def row(cached, own):
        x = jnp.concatenate([cached, own.astype(cached.dtype)], axis=1)
        return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    return *jax.tree.map(row, (before.keys, before.values, before.segments), (keys, values, span)), span
