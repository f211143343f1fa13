"""Kimi Delta Attention (Kimi Team, "Kimi Linear", 2025) as a mixer.

Group: the delta rule
Transition: S ↦ M S + B
Devices: log₂P hops of H·K·(K+V)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, RMSNorm, State
from longctx.layers.recurrent import Recurrent, by_head, delta_inputs, flat, projections, qkv_conv, slow_steps
from longctx.ops.gated_delta import GATED_DELTA
from longctx.schema import Options, Size
from longctx.typing import Segments


class KDA(Recurrent):
    """A matrix memory written by the delta rule, of which each key channel decays at a rate of its own.

    S_t = (I - β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t. q, k, v come from a projection, a short
    convolution and SiLU; q and k are normalised, q scaled by 1/√K; β = σ(x W_β);
    log α = -exp(A) softplus(x W₁ W₂ + b), with W₁ W₂ of low rank, A per head and b per channel; the output is
    normalised per head and gated by σ(x W₃ W₄), of low rank too. The paper and Kimi Linear have no bias in that gate;
    their layer in flash-linear-attention has one, `gate_bias`. What differs: initial values.
    State: `[B, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 32  # K
        value_width: Size = 32  # V; the paper has K = V
        conv_width: Size = 4  # taps of the convolution
        rank: Size = 32  # of the projections to the decay and to the output's gate; the paper has K
        gate_bias: bool = False  # a bias in the output's gate

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        heads, keys, values = options.heads, options.heads * options.key_width, options.heads * options.value_width
        projected = projections(width, heads, options.key_width, options.value_width, rngs)
        self.query, self.key, self.value, self.out = projected
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        self.beta = Linear(width, heads, ("embed", "heads"), rngs)
        self.step_in = Linear(width, options.rank, ("embed", "rank"), rngs)
        self.step_out = Linear(options.rank, keys, ("rank", "heads"), rngs)
        self.log_rate = nnx.Param(jnp.zeros(heads), axes=("heads",))
        self.step_bias = nnx.Param(jnp.tile(slow_steps(options.key_width), heads), axes=("heads",))
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate_in = Linear(width, options.rank, ("embed", "rank"), rngs)
        bias = 0.0 if options.gate_bias else None
        self.gate_out = Linear(options.rank, values, ("rank", "heads"), rngs, bias=bias)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        heads = self.options.heads
        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        q, k, v = delta_inputs(*parts, heads)
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        step = jax.nn.softplus(self.step_out(self.step_in(x)).astype(jnp.float32) + self.step_bias[...])
        y, state = run(GATED_DELTA, q, k, v, beta, -jnp.exp(self.log_rate[...])[:, None] * by_head(step, heads))
        return self.out(flat(self.norm(y)) * jax.nn.sigmoid(self.gate_out(self.gate_in(x)))), state
