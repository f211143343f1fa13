"""Tokens that stand before a shard of the sequence: the last ones, and chosen ones of the document in progress.

For what looks back a bounded number of tokens, such as attention in a window. With `last` a device receives exactly
the tokens it asks for, each straight from the device that holds it: one message if a shard is at least that long,
⌈n/T⌉ otherwise. `anchors` is a prefix scan. The bytes of neither depend on the length of the sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from longctx.parallel import prefix
from longctx.typing import Segments


def last(tree: Any, n: int, axis_name: str) -> Any:
    """The last `n` tokens before this shard, inside a `jax.shard_map`.

    Args:
      tree: arrays `[B, T, ...]`, this device's shard of contiguous shards along `axis_name`.
      n: tokens to look back; may exceed T.
      axis_name: the mesh axis.

    Returns:
      Arrays `[B, n, ...]`, the latest token last; zeros in front of the sequence's first token.
    """
    devices = jax.lax.axis_size(axis_name)

    def fetch(x):
        length = x.shape[1]
        pieces, missing, hop = [], n, 1
        while missing > 0 and hop < devices:
            take = min(missing, length)
            pieces.insert(0, prefix.shift(x[:, length - take :], hop, axis_name))
            missing, hop = missing - take, hop + 1
        return jnp.concatenate([jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype), *pieces], axis=1)

    return jax.tree.map(fetch, tree)


def anchors(tree: Any, segments: Segments, chosen: tuple[int, ...], axis_name: str) -> Any:
    """The chosen tokens of the document in progress where this shard begins, inside a `jax.shard_map`.

    Args:
      tree: arrays `[B, T, ...]`, this device's shard of contiguous shards along `axis_name`.
      segments: of this shard's tokens, with positions within the whole document.
      chosen: n positions within the document.
      axis_name: the mesh axis.

    Returns:
      Arrays `[B, n, ...]`; zeros for positions that no earlier shard holds.
    """
    # Tokens of the shard's last document, each in the slot of its position.
    current = segments.valid & (segments.runs == segments.runs[:, -1:])
    found = current[:, None] & (segments.positions[:, None] == jnp.asarray(chosen)[:, None])  # [B, n, T]
    held = jnp.any(found, axis=2)
    index = jnp.argmax(found, axis=2)

    def gather(x):
        tail = (1,) * (x.ndim - 2)
        taken = jnp.take_along_axis(x, index.reshape(*index.shape, *tail), axis=1)
        return jnp.where(held.reshape(*held.shape, *tail), taken, 0)

    openings = _Opening(jax.tree.map(gather, tree), held, jnp.any(segments.starts, axis=1))
    return prefix.exclusive(_compose, openings, axis_name).tokens


class _Opening(NamedTuple):
    """What a span does to the chosen tokens of the document in progress: fills some slots, or begins anew."""

    tokens: Any  # [B, n, ...]
    held: Bool[Array, "B n"]
    fresh: Bool[Array, " B"]


def _compose(first: _Opening, then: _Opening) -> _Opening:
    keep = ~(then.held | then.fresh[:, None])

    def join(a, b):
        return jnp.where(keep.reshape(*keep.shape, *(1,) * (a.ndim - 2)), a, b)

    tokens = jax.tree.map(join, first.tokens, then.tokens)
    return _Opening(tokens, join(first.held, then.held), first.fresh | then.fresh)
