"""The Block-Recurrent Transformer's layer (Hutchins et al., 2022) as a mixer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.attention import attend_with_cache
from longctx.layers.basic import Linear, document, like_queries, undo_values
from longctx.layers.rotary import rotate
from longctx.memory.cache import KVCache
from longctx.ops import block_recurrent as ops
from longctx.ops.patterns import Causal, Window
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockRecurrentState:
    """Keys and values of the last `block` tokens; the state vectors and the block in progress, float32."""

    cache: KVCache
    cell: ops.State


class BlockRecurrent(nnx.Module):
    """Softmax attention in a window of `block` tokens, and to state vectors that are updated once per block.

    y = window(q, k, v) W_o + cell(x W_q, k, v) W_c, with the cell of `ops/block_recurrent.py`, which shares keys and
    values with the window; its positions are rotary, the cell has none. State: 2 [B, W, H, K] in a cache, and float32
    vectors [B, R, D] and 2 [B, W, H, K], W = `block`.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        head_width: int = 32  # K
        block: int = 16  # W, tokens between two updates of the state vectors, and of the window
        vectors: int = 8  # R
        rope_base: float = 10_000.0  # of the rotary frequencies in the window; 0: no positions

        def problems(self):
            if min(self.heads, self.head_width, self.block, self.vectors) < 1:
                yield f"heads, head_width, block and vectors must be at least 1, given {self}"
            if self.rope_base < 0 or (self.rope_base and self.head_width % 2):
                yield f"rope_base is {self.rope_base}; give 0, or more than 0 and an even head_width"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        shape = options.heads, options.head_width
        keys = options.heads * options.head_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, *shape)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, keys, ("embed", "heads"), rngs)
        self.out = Linear(keys, width, ("heads", "embed"), rngs, initial=undo_values(self.value, *shape))
        self.cell_query = Linear(width, keys, ("embed", "heads"), rngs)
        self.cell_out = Linear(keys, width, ("heads", "embed"), rngs)
        normal = jax.nn.initializers.normal(width**-0.5)
        # Apart from each other from the start, or the vectors would all learn the same.
        self.initial = nnx.Param(jax.random.normal(rngs.params(), (options.vectors, width)), axes=("taps", "width"))
        names = ("cell_key", "cell_value", "query_states", "query_tokens")
        for name in names:
            setattr(
                self,
                name,
                nnx.Param(normal(rngs.params(), (width, *shape)), axes=("embed", "heads", "head"), decays=True),
            )
        mixed = (2 * keys) ** -0.5 * jax.random.normal(rngs.params(), (2, *shape, width))
        self.update = nnx.Param(mixed, axes=("taps", "heads", "head", "embed"), decays=True)
        self.bias = nnx.Param(jnp.zeros(width), axes=("width",))
        self.gate = nnx.Param(jnp.full(width, 2.0), axes=("width",))  # a ninth is replaced at every update

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: BlockRecurrentState | None = None
    ):
        """Returns `(y[B, T, D], BlockRecurrentState)`."""
        segments = document(segments, x, state)
        batch, length, _ = x.shape
        options = self.options
        parts = self.query(x), self.key(x), self.value(x), self.cell_query(x)
        q, k, v, asked = (part.reshape(batch, length, options.heads, options.head_width) for part in parts)
        parameters = self.initial, self.cell_key, self.cell_value, self.query_states, self.query_tokens
        cell = ops.Cell(*(parameter[...] for parameter in (*parameters, self.update, self.bias, self.gate)))
        before = None if state is None else state.cell
        told, after = sequence.recurrence(
            ops, asked, k, v, parameters=(cell,), state=before, segments=segments, block=options.block
        )
        if options.rope_base:
            q, k = rotate(q, segments.positions, options.rope_base), rotate(k, segments.positions, options.rope_base)
        pattern = Causal() & Window(options.block)
        if state is None:
            cache = self._empty(batch, x.dtype).append(k, v, segments)
            near = sequence.attention(q, k, v, pattern, segments)
        else:
            cache = state.cache.append(k, v, segments)
            near = attend_with_cache(q, k, v, pattern, segments, state.cache, cache)
        y = self.out(near.reshape(batch, length, -1)) + self.cell_out(told.reshape(batch, length, -1))
        return y, BlockRecurrentState(cache, after)

    def _empty(self, batch: int, dtype) -> KVCache:
        options = self.options
        return KVCache.empty(batch, options.block, options.heads, options.head_width, options.head_width, dtype)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> BlockRecurrentState:
        """The state before any token; `capacity` does not matter."""
        options = self.options
        block = jnp.zeros((batch, options.block, options.heads, options.head_width), jnp.float32)
        cell = ops.State(jnp.zeros((batch, *self.initial.shape), jnp.float32), block, block)
        return BlockRecurrentState(self._empty(batch, dtype), cell)
