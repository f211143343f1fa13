"""Infini-attention (Munkhdalai et al., 2024) as a mixer: attention within a segment, and a memory of those before.

Group: softmax attention
Transition: S ↦ a ⊙ S + B; with `delta` none: the state does not compose
Devices: a halo of W-1 keys and values; log₂P hops of 2·H·K·(V+1); with `delta` the memory device after device
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.attention import attend
from longctx.layers.basic import State, Taps, convolved, document, empty_tail
from longctx.layers.positions import ROPE, Positions
from longctx.layers.recurrent import projections, qkv_conv
from longctx.memory.store import ATTENDED, Leaf, Ring, Store, extend, heads
from longctx.ops import infini as ops
from longctx.ops.infini_delta import INFINI_DELTA
from longctx.ops.patterns import Causal, Chunked
from longctx.parallel import sequence
from longctx.schema import Options, Size
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InfiniState:
    """Keys and values of the segment in progress; the memory of finished segments and of that one, float32."""

    cache: Store
    memory: ops.State


class Infini(nnx.Module):
    """Softmax attention within segments of the document, mixed with what a linear memory holds of all earlier ones.

    y = σ(g) M^T f(q) / (z · f(q)) + (1 - σ(g)) softmax(q K^T / √K) V, with g learned per head and f = ELU + 1; M and z
    sum f(k) v^T and f(k) over finished segments, which are counted from the document's start; with `delta`, v less what
    the memory held for k when the segment began. Rotary positions, if any, rotate queries and keys of the softmax only.
    State: a cache of `segment` tokens, and [B, H, K, V+1] float32 twice.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        head_width: Size = 32  # K and V
        segment: Size = 64  # tokens a segment
        positions: Positions = ROPE  # rotary ones of `layers/positions.py`, or {"kind": "nope"}
        delta: bool = False  # write only what the memory does not hold yet: devices then take turns
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            yield from self.positions.rotary(self.head_width)

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        size = options.head_width
        self.query, self.key, self.value, self.out = projections(width, options.heads, size, size, rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        self.balance = nnx.Param(jnp.zeros(options.heads), axes=("heads",))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: InfiniState | None = None):
        """Returns `(y[B, T, D], InfiniState)`."""
        segments = document(segments, x, state)
        batch, length, _ = x.shape
        options = self.options
        parts, state, tail = convolved(self.conv, (self.query(x), self.key(x), self.value(x)), segments, state)
        q, k, v = (part.reshape(batch, length, options.heads, options.head_width) for part in parts)
        before = None if state is None else state.memory
        rule = INFINI_DELTA if options.delta else ops.INFINI
        static = ops.Options(options.segment)
        recalled, memory = sequence.run(rule, (q, k, v), state=before, segments=segments, options=static)
        q, k = options.positions.rotate(q, k, segments)
        pattern = Causal() & Chunked(options.segment)
        if state is None:
            cache, held = self._empty(batch, x.dtype).append((k, v), segments), None
        else:
            ((k, v), held), segments, cache = extend(state.cache, (k, v), segments)
        near = attend(q, k, v, pattern, segments, held)
        share = jax.nn.sigmoid(self.balance[...])[:, None].astype(x.dtype)
        y = share * recalled + (1 - share) * near
        return self.out(y.reshape(batch, length, -1)), State(InfiniState(cache, memory), tail)

    def leaves(self, dtype) -> tuple[Leaf, ...]:
        """What a token leaves behind: its key and its value."""
        return heads(self.options.heads, self.options.head_width, dtype, ATTENDED)

    def _empty(self, batch: int, dtype) -> Store:
        return Ring().make(self.leaves(dtype), batch, 0, reach=self.options.segment - 1)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> InfiniState:
        """The state before any token; `capacity` does not matter."""
        options = self.options
        empty = jnp.zeros((batch, options.heads, options.head_width, options.head_width + 1), jnp.float32)
        state = InfiniState(self._empty(batch, dtype), ops.State(empty, empty))
        return State(state, empty_tail(self.conv, batch))
