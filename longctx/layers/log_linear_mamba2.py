"""Log-linear Mamba-2 (Guo et al., "Log-Linear Attention", 2025) as a mixer.

Group: linear attention and matrix memories with elementwise decay
Transition: S ↦ a ⊙ S + B at every scale
Devices: log₂P hops of H·(1+L·K·V)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, RMSNorm, State, document, like_queries, undo_values
from longctx.layers.recurrent import Recurrent, by_head, flat, qkv_conv, slow_steps
from longctx.ops.log_linear import LOG_LINEAR
from longctx.schema import Options, Size
from longctx.typing import Segments


class LogLinearMamba2(Recurrent):
    """Mamba-2 with a matrix memory for each scale of the past, of 1, 1, 2, 4, ... tokens.

    Queries (C) and keys (B), shared by the heads, and values come from a projection, a short convolution and SiLU.
    With Δ = softplus(x W_Δ + b) and A per head,

        S_t^l decays by exp(-exp(A) Δ),    Δ k vᵀ is added to S_t^0,    y = Σ_l λ_l (S_t^l)ᵀ q + c v,

    λ_l = softplus(c_l x W_l) per head; the output is RMSNorm(y silu(x W_z)) over all heads, projected.
    State: `[B, L, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 32  # K, the paper's state size
        value_width: Size = 32  # V, the paper's head width
        conv_width: Size = 4  # taps of the convolution
        levels: Size = 8  # L; 1 + log2 of a document's tokens keeps all scales apart; of fewer the last has the rest

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        keys, values = options.key_width, options.heads * options.value_width
        self.query = Linear(width, keys, ("embed", "head"), rngs)
        self.key = Linear(width, keys, ("embed", "head"), rngs, initial=like_queries(self.query, 1, keys))
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        self.step = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.log_rate = nnx.Param(jnp.zeros(options.heads), axes=("heads",))
        self.step_bias = nnx.Param(slow_steps(options.heads), axes=("heads",))
        self.level = Linear(width, options.heads * options.levels, ("embed", "heads"), rngs)
        self.level_scale = nnx.Param(jnp.ones((options.heads, options.levels)), axes=("heads", None))
        self.skip = nnx.Param(jnp.ones(options.heads), axes=("heads",))
        self.gate = Linear(width, values, ("embed", "heads"), rngs)
        self.norm = RMSNorm(values, ("heads",))
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        heads = self.options.heads
        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        q, k, v = (jax.nn.silu(part) for part in parts)
        q, k = (jnp.repeat(part[:, :, None], heads, axis=2) for part in (q, k))
        v = by_head(v, heads).astype(jnp.float32)
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        level = jax.nn.softplus(self.level_scale[...] * by_head(self.level(x).astype(jnp.float32), heads))
        y, state = run(LOG_LINEAR, q, k, step[..., None] * v, None, -jnp.exp(self.log_rate[...]) * step, level)
        y = flat((y + self.skip[...][:, None] * v).astype(x.dtype))
        return self.out(self.norm(y * jax.nn.silu(self.gate(x)))), state
