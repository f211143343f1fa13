"""The key-value cache of softmax attention: a ring of the last S tokens of the document in progress.

A token's slot is its position within the document modulo S, so appending never moves what is there, and a slot knows
its token's position (-1: empty). With S at least the length of a document the ring never wraps and holds all of it, in
order; with S = W it is the state of sliding-window attention. Tokens at chosen positions, the anchors of a pattern,
have slots of their own after the ring's, which nothing overwrites.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.patterns import Keys
from longctx.parallel import rules
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the last S tokens of the document in progress, and of its n anchors; N = S + n.

    Attributes:
      keys: `[B, N, G, K]`.
      values: `[B, N, G, V]`.
      positions: `[B, N]` int32, position within the document of the token in each slot, -1 where empty.
      decay: `[B, N, H]` float32, where logits decay: the sum of log decays up to each token (None: they do not).
      anchors: positions within the document, ascending, of the tokens in the last n slots; part of the structure.
    """

    keys: Float[Array, "B N G K"]
    values: Float[Array, "B N G V"]
    positions: Int[Array, "B N"]
    decay: Float[Array, "B N H"] | None = None
    anchors: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        heads: int,
        key_width: int,
        value_width: int,
        dtype,
        decays: int = 0,
        anchors: tuple[int, ...] = (),
    ) -> KVCache:
        """A ring of `capacity` empty slots, and one for each anchor; `decays`: the number H of heads that decay."""
        slots = capacity + len(anchors)
        return cls(
            jnp.zeros((batch, slots, heads, key_width), dtype),
            jnp.zeros((batch, slots, heads, value_width), dtype),
            jnp.full((batch, slots), -1, jnp.int32),
            jnp.zeros((batch, slots, decays), jnp.float32) if decays else None,
            anchors,
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
        batch, slots = self.positions.shape
        capacity = slots - len(self.anchors)
        started = segments.runs[:, -1:]
        current = segments.valid & (segments.runs == started)
        last = jnp.where(current, segments.positions, -1).max(axis=1, keepdims=True)
        # Out of range: not written.
        slot = jnp.where(current & (segments.positions > last - capacity), segments.positions % capacity, slots)
        if self.anchors:
            number = jnp.searchsorted(jnp.array(self.anchors), segments.positions)
            anchor = jnp.where(current & Keys(self.anchors).seen(segments.positions), capacity + number, slots)
        row = jnp.arange(batch)[:, None]

        def write(held, new):
            new = new.astype(held.dtype)
            held = held.at[row, slot].set(new, mode="drop")
            return held.at[row, anchor].set(new, mode="drop") if self.anchors else held

        return KVCache(
            write(self.keys, keys),
            write(self.values, values),
            write(jnp.where(started > 0, -1, self.positions), segments.positions),
            None if decay is None else write(self.decay, decay),
            self.anchors,
        )

    def shared(self) -> KVCache:
        """The same, its slots split over the devices along `context`, where there are such and they divide them."""

        def split(x, *rest):
            return None if x is None else rules.constrain(x, ("batch", "slots", *rest))

        return dataclasses.replace(
            self,
            keys=split(self.keys, "heads", "head"),
            values=split(self.values, "heads", "head"),
            positions=split(self.positions),
            decay=split(self.decay, "heads"),
        )

    @property
    def segments(self) -> Segments:
        """The slots as keys: id 1 for the document in progress, 0 for an empty slot, or an anchor's in the ring."""
        held = self.positions >= 0
        if self.anchors:
            in_ring = jnp.arange(held.shape[1]) < held.shape[1] - len(self.anchors)
            held &= ~(in_ring & Keys(self.anchors).seen(self.positions))
        return Segments(held.astype(jnp.int32), jnp.maximum(self.positions, 0), jnp.zeros_like(held))
