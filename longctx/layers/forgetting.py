"""The Forgetting Transformer's attention (Lin et al., 2025) as a mixer: softmax attention with forget gates.

Group: softmax attention
Transition: the tokens themselves: concatenation
Devices: keys, values and sums of log gates around a ring: grows with T (with a window: a halo); the sums by log₂P
    hops of 2·H; the last keys and values, for their shift
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.attention import attend
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
from longctx.memory.store import ATTENDED, Leaf, Ring, Store, extend, heads
from longctx.ops.causal_conv import CAUSAL_CONV
from longctx.ops.linear_scan import LINEAR_SCAN
from longctx.ops.patterns import Causal, Window
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForgettingState:
    """Keys, values and sums of log gates of the tokens so far; the sum over the document in progress, float32; and the
    last token's key and value before the shift (None without it), float32.
    """

    cache: Store
    total: Float[Array, "B H"]
    last: Float[Array, "B 1 2*G*K"] | None


class Forgetting(nnx.Module):
    """Causal softmax attention whose logits decay by a gate that depends on the tokens passed over (section 3).

    logit_ij = q_i · k_j / √K + Σ_{j < s <= i} log f_s with f = σ(x W_f + b) per head; no other positions. The rest is
    the paper's Pro block: keys become RMSNorm(α_t k_{t-1} + (1 - α_t) k_t) with α = σ(x W_α) per head, values the same
    but for the norm, queries RMSNorm(q); the output is y = (RMSNorm(o) σ(x W_g)) W. Norms are per head, and so are
    their scales. Without `qk_norm`, `output_gate` and `shift` it is the attention of the paper's block like LLaMA's.

    What differs: keys and values may have fewer heads than queries; initial values.
    State: keys and values [B, S, G, K], sums of log gates [B, S, H] and [B, H], with S = `window` or `capacity`; and
    the last key and value before the shift, [B, 1, 2 G K].
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        kv_heads: int = 4  # G, divides H
        head_width: int = 32  # K
        window: int = 0  # tokens a query looks back on, itself included; 0: the whole document
        qk_norm: bool = True  # RMS norm of queries and keys, per head, with learned scales
        output_gate: bool = True  # RMS norm of the output per head, and a gate on it
        shift: bool = True  # keys and values are mixed with those of the token before, by a gate per head
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if min(self.heads, self.kv_heads, self.head_width) < 1 or self.heads % self.kv_heads:
                yield f"heads is {self.heads} and kv_heads is {self.kv_heads}; kv_heads must divide heads"
            if self.window < 0:
                yield f"window is {self.window}; give at least 1 token, or 0 for the whole document"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        queries, keys = options.heads * options.head_width, options.kv_heads * options.head_width
        self.query = Linear(width, queries, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.kv_heads, options.head_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, keys, ("embed", "heads"), rngs)
        lags = [0] * queries + [1] * keys + [0] * keys
        self.conv = short_conv(options.conv_width, lags, rngs)
        self.forget = Linear(width, options.heads, ("embed", "heads"), rngs)
        # The heads begin with log gates of -1/1,000 to -1/10.
        step = jnp.geomspace(1e-3, 1e-1, options.heads)
        self.forget_bias = nnx.Param(-jnp.log(jnp.expm1(step)), axes=("heads",))
        per_query, per_key = (options.heads, options.head_width), (options.kv_heads, options.head_width)
        self.query_norm = RMSNorm(per_query, ("heads", "head"), initial=1.5) if options.qk_norm else None
        self.key_norm = RMSNorm(per_key, ("heads", "head")) if options.qk_norm else None
        self.norm = RMSNorm(per_query, ("heads", "head")) if options.output_gate else None
        half = jnp.zeros((width, 2 * options.kv_heads))
        self.shift = Linear(width, half.shape[1], ("embed", "heads"), rngs, initial=half) if options.shift else None
        self.gate = Linear(width, queries, ("embed", "heads"), rngs) if options.output_gate else None
        back = undo_values(self.value, options.heads, options.head_width)
        self.out = Linear(queries, width, ("heads", "embed"), rngs, initial=back)

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: ForgettingState | None = None
    ):
        """Returns `(y[B, T, D], ForgettingState)`."""
        segments = document(segments, x, state)
        batch, length, _ = x.shape
        options = self.options
        parts = self.query(x), self.key(x), self.value(x)
        (q, k, v), state, tail = convolved(self.conv, parts, segments, state)
        last = None
        if options.shift:
            (k, v), last = self._shifted(x, k, v, segments, None if state is None else state.last)
        q, k, v = (y.reshape(batch, length, -1, options.head_width) for y in (q, k, v))
        if options.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        log_gate = jax.nn.log_sigmoid(self.forget(x).astype(jnp.float32) + self.forget_bias[...])
        before = None if state is None else state.total
        # Log gates add up: nothing decays but at a document's start.
        decay, total = sequence.run(LINEAR_SCAN, (log_gate, jnp.zeros_like(log_gate)), state=before, segments=segments)
        pattern = Causal() & Window(options.window) if options.window else Causal()
        if state is None:
            since, held, cache = decay, None, self._empty(batch, length, x.dtype).append((k, v, decay), segments)
        else:
            ((k, v, since), held), segments, cache = extend(state.cache, (k, v, decay), segments)
        y = attend(q, k, v, pattern, segments, held, decay, since)
        if options.output_gate:
            y = self.norm(y) * jax.nn.sigmoid(self.gate(x)).reshape(y.shape)
        return self.out(y.reshape(batch, length, -1)), State(ForgettingState(cache, total, last), tail)

    def _shifted(self, x, k, v, segments: Segments, last: Float[Array, "B 1 2*G*K"] | None):
        """Keys and values mixed with those of the token before, and the last of them unmixed."""
        both = jnp.concatenate([k, v], axis=-1)
        lag = jnp.ones((2, both.shape[-1]), x.dtype).at[1].set(0)
        before, last = sequence.run(CAUSAL_CONV, (both,), (lag,), last, segments=segments)
        share = jnp.repeat(jax.nn.sigmoid(self.shift(x).astype(jnp.float32)), self.options.head_width, axis=-1)
        mixed = both.astype(jnp.float32) + share * (before.astype(jnp.float32) - both)
        return jnp.split(mixed.astype(x.dtype), 2, axis=-1), last

    def leaves(self, dtype) -> tuple[Leaf, ...]:
        """What a token leaves behind: its key, its value and the sums of log gates up to it."""
        options = self.options
        gates = Leaf((options.heads,), ("heads",), jnp.float32, exact=True)
        return *heads(options.kv_heads, options.head_width, dtype, ATTENDED), gates

    def _empty(self, batch: int, capacity: int, dtype) -> Store:
        reach = self.options.window - 1 if self.options.window else None
        return Ring().make(self.leaves(dtype), batch, capacity, reach, shared=True)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> ForgettingState:
        """The state before any token, with room for `capacity` tokens (a window needs no more than itself)."""
        options = self.options
        total = jnp.zeros((batch, options.heads), jnp.float32)
        last = jnp.zeros((batch, 1, 2 * options.kv_heads * options.head_width), jnp.float32) if options.shift else None
        state = ForgettingState(self._empty(batch, capacity, dtype), total, last)
        return State(state, empty_tail(self.conv, batch))
