"""DeepSeek sparse attention (DeepSeek-AI, 2025) as a mixer: softmax attention to the keys that an indexer chooses.

Group: hierarchical and adaptive attention
Transition: the tokens themselves: concatenation
Devices: T·I index keys, gathered; then the chosen tokens
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers import reports
from longctx.layers.basic import (
    LayerNorm,
    Linear,
    Projections,
    State,
    convolved,
    document,
    empty_tail,
    like_queries,
)
from longctx.layers.positions import ROPE, Positions
from longctx.memory.store import Leaf, Ring, Store, extend, heads
from longctx.ops import indexer_topk as ops
from longctx.parallel import sequence
from longctx.typing import Segments


class IndexerTopK(Projections):
    """Causal softmax attention to the `count` tokens of the document so far that a small indexer scores highest.

    DeepSeek-V3.2 has 64 index heads of width 128, and queries see 2,048 tokens; it trains the indexer alone first, with
    `stage="dense"` and all else frozen, then all of it with `stage="sparse"`. The indexer reads x but no gradient goes
    back: it learns from a loss of its own, which it records (`layers/reports.py`). As in its authors'
    code index keys go through a layer norm, positions rotate a half of an index's channels, the first ones, and the
    weights of the index heads are x W / √(J I).

    What differs: index queries are made of x, there of the latent of multi-head latent attention that queries are made
    of; attention is over grouped keys and values; the Hadamard rotation and the eight bits that scores are computed in
    there are left out, as they change rounding alone.

    State: a store of `capacity` tokens: keys and values, [B, S, G, K] each, and indices, [B, S, I].
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Projections.Config):
        positions: Positions = ROPE  # rotary ones of `layers/positions.py`, of indices too; or {"kind": "nope"}
        index_share: float = 0.5  # of an index's channels that rotate, the first ones
        index_heads: int = 4  # J
        index_width: int = 16  # I
        count: int = 8  # keys that are visible to a query
        stage: str = "sparse"  # "dense": all keys are visible to a query, and to the indexer's loss
        kl_weight: float = 1.0  # of the indexer's loss, a mean over tokens, in the training loss

        def problems(self):
            yield from super().problems()
            if min(self.index_heads, self.index_width, self.count) < 1:
                yield f"index_heads, index_width and count must be at least 1, given {self}"
            yield from self.positions.rotary(self.head_width)
            if self.positions.kind != "nope" and (
                not 0 < self.index_share <= 1 or self.index_rotating % 2 or not self.index_rotating
            ):
                yield (
                    f"index_share is {self.index_share} of {self.index_width} channels; it must be an even number of "
                    f"them, at least 2"
                )
            if self.kl_weight < 0:
                yield f"kl_weight is {self.kl_weight}; it must not be negative"
            if self.stage not in ("dense", "sparse"):
                yield f"stage is '{self.stage}'; choose dense or sparse"

        @property
        def index_rotating(self) -> int:
            """Channels of an index that rotate."""
            return round(self.index_share * self.index_width)

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options, rngs)
        self.index_query = Linear(width, options.index_heads * options.index_width, ("embed", "heads"), rngs)
        like_index = like_queries(self.index_query, 1, options.index_width)
        self.index_key = Linear(width, options.index_width, ("embed", "head"), rngs, initial=like_index)
        self.index_norm = LayerNorm(options.index_width, ("head",))
        self.index_weight = Linear(width, options.index_heads, ("embed", "heads"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: Store | None = None):
        """Returns `(y[B, T, D], Store)`."""
        segments = document(segments, x, state)
        batch, length, _ = x.shape
        options = self.options
        parts, state, tail = convolved(self.conv, (self.query(x), self.key(x), self.value(x)), segments, state)
        norms = self.query_norm, self.key_norm, None
        q, k, v = (self.heads(part, norm) for part, norm in zip(parts, norms, strict=True))
        # Float32, as rounding should not choose the keys.
        index_q, index_k, weights = self._index(jax.lax.stop_gradient(x.astype(jnp.float32)))
        q, k = options.positions.rotate(q, k, segments)
        index_q, index_k = options.positions.sharing(options.index_share).rotate(index_q, index_k, segments)
        index_k = index_k[:, :, 0]
        if state is None:
            after, held = self._empty(batch, length, x.dtype).append((k, v, index_k), segments), None
        else:
            ((k, v, index_k), held), segments, after = extend(state, (k, v, index_k), segments, ordered=True)
        inputs = (q, index_q, weights), (k, v, index_k)
        count = ops.Options(None if options.stage == "dense" else options.count)
        read = sequence.attend(ops.INDEXER_TOPK, *inputs, segments=segments, key_segments=held, options=count)
        reports.record("indexer_kl", jnp.sum(read.loss), jnp.sum(segments.valid), options.kl_weight)
        return self.back(x, read.y), State(after, tail)

    def _index(self, x):
        """Index queries `[B, T, J, I]`, keys `[B, T, 1, I]` and weights `[B, T, J]`."""
        options = self.options
        parts = self.index_query(x), self.index_norm(self.index_key(x))
        q, k = (part.reshape(*x.shape[:2], -1, options.index_width) for part in parts)
        return q, k, self.index_weight(x) * (options.index_heads * options.index_width) ** -0.5

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> State:
        """The state before any token, with room for `capacity` tokens."""
        return State(self._empty(batch, capacity, dtype), empty_tail(self.conv, batch))

    def leaves(self, dtype) -> tuple[Leaf, ...]:
        """What a token leaves behind: its key, its value and its index."""
        options = self.options
        index = Leaf((options.index_width,), ("head",), dtype)
        return *heads(options.kv_heads, options.head_width, dtype), index

    def _empty(self, batch: int, capacity: int, dtype) -> Store:
        return Ring().make(self.leaves(dtype), batch, capacity)
