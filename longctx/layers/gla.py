"""Gated linear attention (Yang et al., 2023) as a mixer.

Group: linear attention and matrix memories with elementwise decay
Transition: S ↦ a ⊙ S + B
Devices: log₂P hops of H·K·(V+1)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, RMSNorm, State, Taps
from longctx.layers.recurrent import Recurrent, by_head, flat, projections, qkv_conv
from longctx.ops.gated_linear import GATED_LINEAR
from longctx.schema import Options, Size
from longctx.typing import Segments


class GLA(Recurrent):
    """Linear attention whose memory decays per key channel, by a gate that depends on the token.

    S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t; log α = log σ(x W₁ W₂ + b) / τ, with W₁ W₂ of low rank; q is
    scaled by 1/√K; the output is normalised per head and gated by silu(x W_g). State: `[B, H, K, V]` float32.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 32  # K
        value_width: Size = 32  # V
        gate_rank: Size = 16  # of the projection to the decay
        gate_temperature: float = 16.0  # τ: larger keeps the decay nearer to 1
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if self.gate_temperature <= 0:
                yield f"gate_temperature is {self.gate_temperature}; it must be above 0"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        heads, keys, values = options.heads, options.heads * options.key_width, options.heads * options.value_width
        projected = projections(width, heads, options.key_width, options.value_width, rngs)
        self.query, self.key, self.value, self.out = projected
        self.decay_in = Linear(width, options.gate_rank, ("embed", "rank"), rngs)
        self.decay_out = Linear(options.gate_rank, keys, ("rank", "heads"), rngs, bias=0.0)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate = Linear(width, values, ("embed", "heads"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        log_decay = jax.nn.log_sigmoid(self.decay_out(self.decay_in(x)).astype(jnp.float32))
        log_decay /= self.options.gate_temperature
        q, k, v, log_decay = (by_head(part, self.options.heads) for part in (*parts, log_decay))
        y, state = run(GATED_LINEAR, q * self.options.key_width**-0.5, k, v, log_decay)
        return self.out(flat(self.norm(y)) * jax.nn.silu(self.gate(x))), state
