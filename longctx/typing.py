"""The notation that every public signature of longctx uses, and the documents of a packed row.

| letter | meaning                                   | letter | meaning                         |
|--------|-------------------------------------------|--------|---------------------------------|
| B      | batch                                     | D      | width of the model              |
| T      | tokens in the span                        | F      | hidden width of the MLP         |
| S      | keys a query may look at                  | N      | size of a vector state          |
| H      | heads                                     | C      | length of a chunk               |
| G      | key-value heads (G divides H)             | W      | window, or width of convolution |
| K      | key width per head                        | L      | layers                          |
| V      | value width per head (or the vocabulary)  |        |                                 |

Arrays are `[B, T, ...]`, batch and time first; heads are `[B, T, H, K]`.

A *span* is a run of consecutive tokens. A layer maps a span and the state before it to outputs and the
state after it. A row may hold several documents one after another (*packing*); what a layer must know of
them is in `Segments`, derived once per batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """Which document each token of a span belongs to.

    Documents are contiguous. Padding (id 0) may stand between documents and at the ends of a row; it never
    changes a state. Every layer reads document boundaries from here and nowhere else.

    Attributes:
      ids: `[B, T]` int32, 0 for padding, equal within a document, different for neighbouring documents.
      positions: `[B, T]` int32, index of the token within its document (0 for padding).
      starts: `[B, T]` bool, true where a document begins: what came before, the incoming state included,
        is forgotten. False on the first tokens of a span that continues the document the state comes from.
    """

    ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    starts: Bool[Array, "B T"]

    @property
    def valid(self) -> Bool[Array, "B T"]:
        """True for tokens of a document, false for padding."""
        return self.ids > 0

    @property
    def runs(self) -> Int[Array, "B T"]:
        """Documents begun so far in the span: 0 while it continues the state's document, then 1, 2, ..."""
        return jnp.cumsum(self.starts, axis=1, dtype=jnp.int32)

    @classmethod
    def single(cls, batch: int, length: int, offset: int | Int[Array, ""] = 0) -> Segments:
        """One document per row, of which the span is tokens `offset` to `offset + length`.

        Args:
          batch: B.
          length: T.
          offset: tokens of the document that came before the span; a document starts where it is 0.
        """
        positions = jnp.broadcast_to(offset + jnp.arange(length, dtype=jnp.int32), (batch, length))
        return cls(jnp.ones_like(positions), positions, positions == 0)

    @classmethod
    def from_ids(cls, ids: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None) -> Segments:
        """Segments from ids, and positions where they are known.

        Args:
          ids: `[B, T]`, 0 for padding.
          positions: `[B, T]`, index within the document; a document starts where it is 0. Without it a
            document starts where the id differs from that of the last token before it (padding passed over),
            the first document of the span continues the state, and positions count from the span's start.
        """
        ids = jnp.asarray(ids, jnp.int32)
        valid = ids > 0
        if positions is not None:
            positions = jnp.where(valid, jnp.asarray(positions, jnp.int32), 0)
            return cls(ids, positions, valid & (positions == 0))
        index = jnp.arange(ids.shape[1], dtype=jnp.int32)
        last = jax.lax.cummax(jnp.where(valid, index, -1), axis=1)  # the last token at or before each place
        before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        previous = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=1)
        starts = valid & (before >= 0) & (previous != ids)
        first = jnp.where(valid & (before < 0), index, 0)  # where the continued document enters the span
        origin = jax.lax.cummax(jnp.where(starts, index, first), axis=1)
        return cls(ids, jnp.where(valid, index - origin, 0), starts)

    @classmethod
    def of(cls, segment_ids: Int[Array, "B T"] | Segments | None, batch: int, length: int) -> Segments:
        """What an op makes of its `segment_ids`: ids, `Segments`, or None for a span of one document.

        A span of one document continues the state that is passed, so it has no start.
        """
        if segment_ids is None:
            return dataclasses.replace(cls.single(batch, length), starts=jnp.zeros((batch, length), bool))
        segments = segment_ids if isinstance(segment_ids, Segments) else cls.from_ids(segment_ids)
        if segments.ids.shape != (batch, length):
            raise ValueError(
                f"segment_ids have shape {segments.ids.shape}, the span has batch {batch} and length {length}; "
                "pass one id per token."
            )
        return segments
