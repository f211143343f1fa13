"""The mLSTM layer of xLSTM (Beck et al., 2024), in the form of xLSTM 7B (Beck et al., 2025), as a mixer.

Group: linear attention and matrix memories with elementwise decay
Transition: (m, a, B), stabilised in log space
Devices: log₂P hops of H·(K·(V+1)+2)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import (
    Linear,
    Taps,
    behind,
    convolved,
    empty_tail,
    like_queries,
    scaled,
    short_conv,
    undo_values,
)
from longctx.ops import mlstm as ops
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


class MLSTM(nnx.Module):
    """A matrix memory with an exponential input gate, and a normaliser.

    log i = cap(x W_i + b_i);  log f = log σ(cap(x W_f + b_f));  cap(z) = c tanh(z / c), c the soft cap;
    C_t = f_t C_{t-1} + i_t k_t v_tᵀ;  n_t = f_t n_{t-1} + i_t k_t;  h_t = C_tᵀ q_t / max(|n_t·q_t|, 1), q scaled by
    1/√K;  y = (σ(x W_o) ⊙ layernorm(h)) W_out, the norm per head, without a shift.
    State: `ops.mlstm.State`, float32: `[B, H, K, V]`, `[B, H, K]` and `[B, H]`.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        key_width: int = 16  # K; xLSTM 7B takes half of V
        value_width: int = 32  # V
        input_bias: float = 0.0  # of the input gate; -10 in xLSTM 7B, for large models' stability
        soft_cap: float = 15.0  # c, of the gates' logits
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if min(self.heads, self.key_width, self.value_width) < 1:
                yield f"heads, key_width and value_width must be at least 1, given {self}"
            if self.soft_cap <= 0:
                yield f"soft_cap is {self.soft_cap}; it must be above 0"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        heads = options.heads
        keys, values = heads * options.key_width, heads * options.value_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, heads, options.key_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        # The gates begin the same for all tokens, and the heads' memories with spans of 20 to 400 of them.
        closed = jnp.zeros((width, heads))
        self.input_gate = Linear(width, heads, ("embed", "heads"), rngs, bias=options.input_bias, initial=closed)
        self.forget_gate = Linear(width, heads, ("embed", "heads"), rngs, bias=0.0, initial=closed)
        self.forget_gate.bias[...] = jnp.linspace(3.0, 6.0, heads)
        self.output_gate = Linear(width, values, ("embed", "heads"), rngs)
        lags = [0] * keys + [1] * keys + [0] * values
        self.conv = short_conv(options.conv_width, lags, rngs)
        self.norm_scale = nnx.Param(jnp.ones(values), axes=("heads",))
        back = undo_values(self.value, heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: ops.State | None = None):
        """Returns `(y[B, T, D], ops.mlstm.State)`."""
        options = self.options
        batch, length, _ = x.shape

        def heads(y):
            return y.reshape(batch, length, options.heads, -1)

        def gate(projection):
            return options.soft_cap * jnp.tanh(projection(x).astype(jnp.float32) / options.soft_cap)

        parts, state, tail = convolved(self.conv, (self.query(x), self.key(x), self.value(x)), segments, state)
        q, k, v = map(heads, parts)
        q, v = q * options.key_width**-0.5, v.astype(jnp.float32)
        log_forget = jax.nn.log_sigmoid(gate(self.forget_gate))
        y, state = sequence.recurrence(ops, q, k, v, gate(self.input_gate), log_forget, state=state, segments=segments)
        y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        y = scaled(y.reshape(batch, length, -1), self.norm_scale[...])
        return self.out(y.astype(x.dtype) * jax.nn.sigmoid(self.output_gate(x))), behind(state, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> ops.State:
        """The empty memory; `capacity` does not matter."""
        options = self.options
        matrix = jnp.zeros((batch, options.heads, options.key_width, options.value_width), jnp.float32)
        state = ops.State(matrix, matrix[..., 0], matrix[..., 0, 0])
        return behind(state, empty_tail(self.conv, batch))
