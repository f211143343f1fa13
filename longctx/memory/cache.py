"""The key-value cache of softmax attention: a ring of the last S tokens of the document in progress.

A token's slot is its number modulo S, so appending never moves what is there. A slot knows its token's
position within the document (-1: empty), which is all that attention needs: order in the ring means nothing.
With S at least the length of a document the ring never wraps and holds all of it; with S = W it is the state
of sliding-window attention.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the last S tokens of the document in progress.

    Attributes:
      keys: `[B, S, G, K]`.
      values: `[B, S, G, V]`.
      positions: `[B, S]` int32, position within the document of the token in each slot, -1 where empty.
      count: `[B]` int32, tokens appended so far; the next one goes to slot `count % S`.
      decay: `[B, S, H]` float32, where logits decay: the sum of log decays up to each token (None: they do not).
    """

    keys: Float[Array, "B S G K"]
    values: Float[Array, "B S G V"]
    positions: Int[Array, "B S"]
    count: Int[Array, " B"]
    decay: Float[Array, "B S H"] | None = None

    @classmethod
    def empty(
        cls, batch: int, capacity: int, heads: int, key_width: int, value_width: int, dtype, decays: int = 0
    ) -> KVCache:
        """A cache of `capacity` empty slots; `decays` is the number H of heads whose logits decay."""
        return cls(
            jnp.zeros((batch, capacity, heads, key_width), dtype),
            jnp.zeros((batch, capacity, heads, value_width), dtype),
            jnp.full((batch, capacity), -1, jnp.int32),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros((batch, capacity, decays), jnp.float32) if decays else None,
        )

    def append(
        self,
        keys: Float[Array, "B T G K"],
        values: Float[Array, "B T G V"],
        segments: Segments,
        decay: Float[Array, "B T H"] | None = None,
    ) -> KVCache:
        """The cache after a span: its tokens added, padding left out, finished documents forgotten.

        A span of more than S tokens leaves its last S; a document of more than S tokens overwrites its oldest.
        """
        batch, capacity = self.positions.shape
        last = segments.runs[:, -1:]
        kept = segments.valid & (segments.runs == last)
        rank = jnp.cumsum(kept, axis=1, dtype=jnp.int32) - 1
        total = rank[:, -1:] + 1
        kept &= rank >= total - capacity
        slot = jnp.where(kept, (self.count[:, None] + rank) % capacity, capacity)  # out of range: not written
        row = jnp.arange(batch)[:, None]
        return KVCache(
            self.keys.at[row, slot].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[row, slot].set(values.astype(self.values.dtype), mode="drop"),
            jnp.where(last > 0, -1, self.positions).at[row, slot].set(segments.positions, mode="drop"),
            self.count + total[:, 0],
            None if decay is None else self.decay.at[row, slot].set(decay, mode="drop"),
        )

    @property
    def segments(self) -> Segments:
        """The slots as keys: id 1 for the document in progress, 0 for an empty slot."""
        held = self.positions >= 0
        return Segments(held.astype(jnp.int32), jnp.maximum(self.positions, 0), jnp.zeros_like(held))
