"""Mixture of block attention (Lu et al., 2025) as a mixer: softmax attention to blocks that each query chooses."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.attention import AttentionState
from longctx.layers.basic import Linear, RMSNorm, ShortConv, like_queries, undo_values
from longctx.layers.rotary import rotate
from longctx.memory import row
from longctx.memory.cache import KVCache
from longctx.ops import moba
from longctx.parallel import sequence
from longctx.typing import Segments


class MoBA(nnx.Module):
    """Causal softmax attention to the query's own block of the document and to the earlier ones that suit it best.

    The paper has blocks of 512 tokens of which a query sees 3, own included, to blocks of 4,096 and 12. State: keys and
    values of `capacity` tokens, [B, S, G, K] each, and W-1 inputs of the convolution; a decoding step reads all the
    keys, for the means of their blocks.
    """

    @dataclasses.dataclass(frozen=True)
    class Config:
        heads: int = 4  # H
        kv_heads: int = 4  # G, divides H
        head_width: int = 32  # K
        block: int = 4  # tokens a block
        count: int = 3  # blocks that a query sees, its own included
        rope_base: float = 10_000.0  # of the rotary frequencies; 0: no positions (NoPE)
        conv_width: int = 0  # taps of a causal convolution on queries, keys and values; 0: none
        qk_norm: bool = True  # RMS norm of queries and keys, per head, with learned scales

        def problems(self):
            if min(self.heads, self.kv_heads, self.head_width) < 1 or self.heads % self.kv_heads:
                yield f"heads is {self.heads} and kv_heads is {self.kv_heads}; kv_heads must divide heads"
            if min(self.block, self.count) < 1:
                yield f"block is {self.block} and count is {self.count}; give at least 1 token and 1 block"
            if self.rope_base and self.head_width % 2:
                yield f"head_width is {self.head_width}; rotary positions need an even one"
            if min(self.conv_width, self.rope_base) < 0:
                yield "conv_width and rope_base must not be negative"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        queries, keys = options.heads * options.head_width, options.kv_heads * options.head_width
        self.query = Linear(width, queries, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.kv_heads, options.head_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, keys, ("embed", "heads"), rngs)
        back = undo_values(self.value, options.heads, options.head_width)
        self.out = Linear(queries, width, ("heads", "embed"), rngs, initial=back)
        # A convolution begins by showing queries and values as they are, and keys as those of the token before.
        lags = [0] * queries + [1] * keys + [0] * keys
        self.conv = ShortConv(options.conv_width, lags, rngs) if options.conv_width else None
        self.query_norm = RMSNorm(options.head_width, ("head",), initial=1.5) if options.qk_norm else None
        self.key_norm = RMSNorm(options.head_width, ("head",)) if options.qk_norm else None

    def __call__(self, x: Float[Array, "B T D"], segments: Segments, state: AttentionState | None = None):
        """Returns `(y[B, T, D], AttentionState)`."""
        batch, length, _ = x.shape
        options = self.options
        parts = [self.query(x), self.key(x), self.value(x)]
        tail = None
        if self.conv is not None:
            mixed, tail = self.conv(jnp.concatenate(parts, axis=-1), segments, None if state is None else state.conv)
            sizes = [part.shape[-1] for part in parts]
            parts = jnp.split(mixed, [sizes[0], sizes[0] + sizes[1]], axis=-1)
        q, k, v = (part.reshape(batch, length, -1, options.head_width) for part in parts)
        if options.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if options.rope_base:
            q, k = (rotate(part, segments.positions, options.rope_base) for part in (q, k))
        blocks = {"block": options.block, "count": options.count}
        if state is None:
            cache = self._empty(batch, length, x.dtype).append(k, v, segments)
            y = sequence.chosen_blocks(moba, q, k, v, segments=segments, **blocks)
        else:
            cache = state.cache.append(k, v, segments)
            k, v, held, span = row.join(state.cache, cache, k, v, segments)
            y = moba.chunked(q, k, v, span, held, **blocks)
        return self.out(y.reshape(batch, length, -1)), AttentionState(cache, tail)

    def _empty(self, batch: int, capacity: int, dtype) -> KVCache:
        width = self.options.head_width
        return KVCache.empty(batch, capacity, self.options.kv_heads, width, width, dtype)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> AttentionState:
        """The state before any token, with room for `capacity` tokens."""
        tail = None if self.conv is None else self.conv.init_state(batch)
        return AttentionState(self._empty(batch, capacity, dtype), tail)
