"""Native sparse attention (Yuan et al., 2025) as a mixer: compressed, selected and near tokens, mixed by gates.

Group: hierarchical and adaptive attention
Transition: the tokens themselves: concatenation
Devices: T/d compressed keys and values, gathered (d tokens from one to the next); the chosen blocks; a halo
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import (
    Linear,
    RMSNorm,
    State,
    Taps,
    convolved,
    document,
    empty_tail,
    like_queries,
    short_conv,
    undo_values,
)
from longctx.layers.positions import ROPE, Positions
from longctx.memory.store import Leaf, Ring, Store, extend, heads
from longctx.ops import nsa as ops
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


class NSA(nnx.Module):
    """Three causal attentions, each with keys and values of its own, whose outputs are summed by gates σ(x W + b).

    See `longctx.ops.nsa`; the paper has compressed blocks of 32 tokens every 16, of which 16 blocks of 64 tokens are
    selected, and a window of 512. Keys are rotated by their positions before they are compressed. State: a store of
    `capacity` tokens with the keys and values of all three, [B, S, 3 G, K] each; a decoding step compresses those of
    the document again.

    What differs: compression is a weighted sum, and the gates are linear in x before σ, where the paper has an MLP for
    both.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        kv_heads: int = 2  # G, divides H; the heads of a group select the same blocks
        head_width: int = 32  # K
        compressed: int = 4  # l, tokens of a compressed block
        stride: int = 2  # d, from one compressed block to the next; divides both kinds of blocks
        selected: int = 4  # m, tokens of a block that is selected
        count: int = 4  # n, blocks selected, with the first, the own and the one before it
        window: int = 8  # w, the last tokens, the own included
        positions: Positions = ROPE  # rotary ones of `layers/positions.py`, or {"kind": "nope"}
        qk_norm: bool = True  # RMS norm of queries and keys, per head, with learned scales
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if min(self.heads, self.kv_heads, self.head_width) < 1 or self.heads % self.kv_heads:
                yield f"heads is {self.heads} and kv_heads is {self.kv_heads}; kv_heads must divide heads"
            if min(self.compressed, self.stride, self.selected, self.window) < 1:
                yield f"compressed, stride, selected and window must be at least 1, given {self}"
            elif self.compressed % self.stride or self.selected % self.stride:
                yield (
                    f"stride is {self.stride}; it must divide compressed, {self.compressed}, and selected, "
                    f"{self.selected}"
                )
            if self.count < 3:
                yield f"count is {self.count}; give at least 3: the first block, the own and the one before it"
            yield from self.positions.rotary(self.head_width)

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        queries, keys = options.heads * options.head_width, options.kv_heads * options.head_width
        self.query = Linear(width, queries, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.kv_heads, options.head_width)
        # The three begin alike.
        self.key = Linear(width, 3 * keys, ("embed", "heads"), rngs, initial=self._thrice(like_query))
        value = Linear(width, keys, ("embed", "heads"), rngs)
        self.value = Linear(width, 3 * keys, ("embed", "heads"), rngs, initial=self._thrice(value.weight[...]))
        lags = [0] * queries + [1] * 3 * keys + [0] * 3 * keys
        self.conv = short_conv(options.conv_width, lags, rngs)
        self.gate = Linear(width, 3 * options.heads, ("embed", "heads"), rngs, bias=0.0)
        back = undo_values(value, options.heads, options.head_width)
        self.out = Linear(queries, width, ("heads", "embed"), rngs, initial=back)
        mean = jnp.full((options.compressed, options.kv_heads, options.head_width), 1 / options.compressed)
        self.key_pool = nnx.Param(mean, axes=("taps", "heads", "head"))
        self.value_pool = nnx.Param(mean.copy(), axes=("taps", "heads", "head"))
        self.query_norm = RMSNorm(options.head_width, ("head",), initial=1.5) if options.qk_norm else None
        self.key_norm = RMSNorm(options.head_width, ("head",)) if options.qk_norm else None

    def _thrice(self, weight: Float[Array, "D G*K"]) -> Float[Array, "D G*3*K"]:
        options = self.options
        heads = weight.reshape(-1, options.kv_heads, 1, options.head_width)
        return jnp.tile(heads, (1, 1, 3, 1)).reshape(len(weight), -1)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: Store | None = None):
        """Returns `(y[B, T, D], Store)`."""
        segments = document(segments, x, state)
        batch, length, _ = x.shape
        options = self.options
        parts, state, tail = convolved(self.conv, (self.query(x), self.key(x), self.value(x)), segments, state)
        q, k, v = (part.reshape(batch, length, -1, options.head_width) for part in parts)
        if options.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = options.positions.rotate(q, k, segments)
        gates = jax.nn.sigmoid(self.gate(x).astype(jnp.float32)).reshape(batch, length, -1, 3)
        pools = self.key_pool[...], self.value_pool[...]
        if state is None:
            cache, held = self._empty(batch, length, x.dtype).append((k, v), segments), None
        else:
            ((k, v), held), segments, cache = extend(state, (k, v), segments, ordered=True)
        branches = tuple(x.reshape(*x.shape[:2], -1, 3, options.head_width) for x in (k, v))
        sizes = ops.Options(options.stride, options.selected, options.count, options.window)
        documents = {"segments": segments, "key_segments": held}
        y = sequence.attend(ops.NSA, (q, gates), branches, pools, options=sizes, **documents).y
        return self.out(y.reshape(batch, length, -1)), State(cache, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> State:
        """The state before any token, with room for `capacity` tokens."""
        return State(self._empty(batch, capacity, dtype), empty_tail(self.conv, batch))

    def leaves(self, dtype) -> tuple[Leaf, ...]:
        """What a token leaves behind: a key and a value for each of the three."""
        return heads(3 * self.options.kv_heads, self.options.head_width, dtype)

    def _empty(self, batch: int, capacity: int, dtype) -> Store:
        return Ring().make(self.leaves(dtype), batch, capacity)
