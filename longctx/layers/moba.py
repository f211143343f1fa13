"""Mixture of block attention (Lu et al., 2025) as a mixer: softmax attention to blocks that each query chooses.

Group: hierarchical and adaptive attention
Transition: the tokens themselves: concatenation
Devices: T/C mean keys, gathered; then the chosen blocks
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.layers.attention import AttentionState
from longctx.layers.basic import Projections, document
from longctx.layers.positions import ROPE, Positions
from longctx.memory.store import Leaf, Ring, Store, extend, heads
from longctx.ops import moba as ops
from longctx.parallel import sequence
from longctx.typing import Segments


class MoBA(Projections):
    """Causal softmax attention to the query's own block of the document and to the earlier ones that suit it best.

    The paper has blocks of 512 tokens of which a query sees 3, own included, to blocks of 4,096 and 12. State: keys and
    values of `capacity` tokens, [B, S, G, K] each, and W-1 inputs of the convolution; a decoding step reads all the
    keys, for the means of their blocks.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Projections.Config):
        block: int = 4  # tokens a block
        count: int = 3  # blocks that are visible to a query, its own included
        positions: Positions = ROPE  # rotary ones of `layers/positions.py`, or {"kind": "nope"}

        def problems(self):
            yield from super().problems()
            if min(self.block, self.count) < 1:
                yield f"block is {self.block} and count is {self.count}; give at least 1 token and 1 block"
            yield from self.positions.rotary(self.head_width)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: AttentionState | None = None):
        """Returns `(y[B, T, D], AttentionState)`."""
        segments = document(segments, x, state)
        batch, length, _ = x.shape
        options = self.options
        q, k, v, tail = self.project(x, segments, None if state is None else state.conv)
        q, k = options.positions.rotate(q, k, segments)
        if state is None:
            cache, held = self._empty(batch, length, x.dtype).append((k, v), segments), None
        else:
            ((k, v), held), segments, cache = extend(state.cache, (k, v), segments, ordered=True)
        blocks = ops.Options(options.block, options.count)
        y = sequence.attend(ops.MOBA, (q,), (k, v), segments=segments, key_segments=held, options=blocks).y
        return self.back(x, y), AttentionState(cache, tail)

    def leaves(self, dtype) -> tuple[Leaf, ...]:
        """What a token leaves behind: its key and its value."""
        return heads(self.options.kv_heads, self.options.head_width, dtype)

    def _empty(self, batch: int, capacity: int, dtype) -> Store:
        return Ring().make(self.leaves(dtype), batch, capacity)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> AttentionState:
        """The state before any token, with room for `capacity` tokens."""
        tail = None if self.conv is None else self.conv.init_state(batch)
        return AttentionState(self._empty(batch, capacity, dtype), tail)
