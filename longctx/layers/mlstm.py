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

from longctx.layers.basic import Linear, State, Taps
from longctx.layers.recurrent import Recurrent, by_head, flat, projections, qkv_conv, standardised
from longctx.ops import mlstm as ops
from longctx.ops.backend import scaled
from longctx.schema import Options, Size
from longctx.typing import Segments


class MLSTM(Recurrent):
    """A matrix memory with an exponential input gate, and a normaliser.

    log i = cap(x W_i + b_i);  log f = log σ(cap(x W_f + b_f));  cap(z) = c tanh(z / c), c the soft cap;
    C_t = f_t C_{t-1} + i_t k_t v_tᵀ;  n_t = f_t n_{t-1} + i_t k_t;  h_t = C_tᵀ q_t / max(|n_t·q_t|, 1), q scaled by
    1/√K;  y = (σ(x W_o) ⊙ layernorm(h)) W_out, the norm per head, without a shift.
    State: `ops.mlstm.State`, float32: `[B, H, K, V]`, `[B, H, K]` and `[B, H]`.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 16  # K; xLSTM 7B takes half of V
        value_width: Size = 32  # V
        input_bias: float = 0.0  # of the input gate; -10 in xLSTM 7B, for large models' stability
        soft_cap: float = 15.0  # c, of the gates' logits
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if self.soft_cap <= 0:
                yield f"soft_cap is {self.soft_cap}; it must be above 0"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        heads, values = options.heads, options.heads * options.value_width
        projected = projections(width, heads, options.key_width, options.value_width, rngs)
        self.query, self.key, self.value, self.out = projected
        # The gates begin the same for all tokens, and the heads' memories with spans of 20 to 400 of them.
        closed = jnp.zeros((width, heads))
        self.input_gate = Linear(width, heads, ("embed", "heads"), rngs, bias=options.input_bias, initial=closed)
        self.forget_gate = Linear(width, heads, ("embed", "heads"), rngs, bias=0.0, initial=closed)
        self.forget_gate.bias[...] = jnp.linspace(3.0, 6.0, heads)
        self.output_gate = Linear(width, values, ("embed", "heads"), rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        self.norm_scale = nnx.Param(jnp.ones(values), axes=("heads",))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""

        def capped(gate):
            return self.options.soft_cap * jnp.tanh(gate.astype(jnp.float32) / self.options.soft_cap)

        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        q, k, v = (by_head(part, self.options.heads) for part in parts)
        log_input, log_forget = capped(self.input_gate(x)), jax.nn.log_sigmoid(capped(self.forget_gate(x)))
        y, state = run(ops.MLSTM, q * self.options.key_width**-0.5, k, v.astype(jnp.float32), log_input, log_forget)
        y = scaled(flat(standardised(y, 1e-6)), self.norm_scale[...]).astype(x.dtype)
        return self.out(y * jax.nn.sigmoid(self.output_gate(x))), state
