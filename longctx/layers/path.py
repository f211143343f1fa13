"""PaTH attention (Yang et al., 2025) as a mixer: softmax attention with positions that the tokens between make.

Group: softmax attention
Transition: the tokens themselves: concatenation
Devices: keys, values and H·K·K around a ring: grows with T
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, RMSNorm, ShortConv, document, l2_normalise, like_queries, undo_values
from longctx.memory.store import Leaf, Ring, Store, heads, join
from longctx.ops.path_attention import PATH
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PathState:
    """Values of the tokens so far with their keys as they are by now, and the last inputs of the convolution."""

    cache: Store
    conv: Float[Array, "B W-1 C"]


class Path(nnx.Module):
    """Causal softmax attention in which every token passed over turns the key (sections 2 and 3).

    logit_ij = q_i^T H_i ... H_{j+1} k_j / √K with H_t = I - β_t w_t w_t^T; w = silu(conv(x W_1 W_2)) normalised, with
    W_1 W_2 of low rank; β = 2 σ(x W_β + b). State: `capacity` keys, float32 since every token changes them, and
    values, [B, S, H, K] each; W-1 inputs of the convolution.

    What differs: the paper's variant with forget gates is left out, and β begins small.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        head_width: int = 32  # K
        rank: int = 32  # of the projection to w
        conv_width: int = 3  # taps of the convolution on w
        qk_norm: bool = True  # RMS norm of queries and keys, per head, with learned scales

        def problems(self):
            if min(self.heads, self.head_width, self.rank, self.conv_width) < 1:
                yield f"heads, head_width, rank and conv_width must be at least 1, given {self}"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        keys = options.heads * options.head_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.heads, options.head_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, keys, ("embed", "heads"), rngs)
        self.direction_in = Linear(width, options.rank, ("embed", "rank"), rngs)
        self.direction_out = Linear(options.rank, keys, ("rank", "heads"), rngs)
        self.conv = ShortConv(options.conv_width, [0] * keys, rngs)
        self.beta = Linear(width, options.heads, ("embed", "heads"), rngs)
        # β begins at 0.001 to 0.1, so that keys reach far; at 1 a token erases what is left of them along w.
        start = jnp.geomspace(1e-3, 1e-1, options.heads)
        self.beta_bias = nnx.Param(jnp.log(start / (2 - start)), axes=("heads",))
        self.query_norm = RMSNorm(options.head_width, ("head",), initial=1.5) if options.qk_norm else None
        self.key_norm = RMSNorm(options.head_width, ("head",)) if options.qk_norm else None
        back = undo_values(self.value, options.heads, options.head_width)
        self.out = Linear(keys, width, ("heads", "embed"), rngs, initial=back)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: PathState | None = None):
        """Returns `(y[B, T, D], PathState)`."""
        segments = document(segments, x, state)
        batch, length, _ = x.shape
        options = self.options
        tail = None if state is None else state.conv
        direction, tail = self.conv(self.direction_out(self.direction_in(x)), segments, tail)
        parts = self.query(x), self.key(x), self.value(x), jax.nn.silu(direction)
        q, k, v, w = (part.reshape(batch, length, -1, options.head_width) for part in parts)
        if options.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        w = l2_normalise(w.astype(jnp.float32))
        beta = 2 * jax.nn.sigmoid(self.beta(x).astype(jnp.float32) + self.beta_bias[...])
        if state is None:
            cache = self._empty(batch, length, x.dtype)
            read = sequence.attend(PATH, (q, w, beta), (k, v), segments=segments)
        else:
            cache = state.cache
            ((keys, values), held), span = join(cache.read(), (k, v), segments)
            read = sequence.attend(PATH, (q, w, beta), (keys, values), segments=span, key_segments=held)
            cache = cache.rewrite((read.keys[:, :-length], values[:, :-length]))
        cache = cache.append((read.keys[:, -length:], v), segments)
        return self.out(read.y.reshape(batch, length, -1)), PathState(cache, tail)

    def leaves(self, dtype) -> tuple[Leaf, ...]:
        """What a token leaves behind: its key, which later tokens change and is float32 for that, and its value."""
        key, value = heads(self.options.heads, self.options.head_width, dtype)
        return dataclasses.replace(key, dtype=jnp.float32, exact=True), value

    def _empty(self, batch: int, capacity: int, dtype) -> Store:
        return Ring().make(self.leaves(dtype), batch, capacity)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> PathState:
        """The state before any token, with room for `capacity` tokens; values in `dtype`."""
        return PathState(self._empty(batch, capacity, dtype), self.conv.init_state(batch))
