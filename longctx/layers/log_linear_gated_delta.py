"""Log-linear Gated DeltaNet (Guo et al., "Log-Linear Attention", 2025) as a mixer.

Group: the delta rule
Transition: S ↦ M S + B at every scale
Devices: log₂P hops of H·K·(K+L·V)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, RMSNorm, State, document
from longctx.layers.recurrent import Recurrent, by_head, delta_inputs, flat, projections, qkv_conv, slow_steps
from longctx.ops.log_linear import LOG_LINEAR
from longctx.schema import Options, Size
from longctx.typing import Segments


class LogLinearGatedDelta(Recurrent):
    """Gated DeltaNet with a matrix memory for each scale of the past, of 1, 1, 2, 4, ... tokens.

    Each of the L memories decays and is corrected by every token, as the one of `gated_delta` is (see there for q, k,
    v, β, α); y_t = Σ_l λ_l (S_t^l)ᵀ q_t with λ_l = softplus(c_l x W_l) per head, normalised per head and gated by
    silu(x W_g). State: `[B, L, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 32  # K
        value_width: Size = 32  # V
        conv_width: Size = 4  # taps of the convolution
        levels: Size = (
            8  # L; 1 + log2 of a document's tokens keeps all scales apart, with fewer the last holds the rest
        )

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        shape = options.heads, options.key_width, options.value_width
        self.query, self.key, self.value, self.out = projections(width, *shape, rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        self.beta = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.step = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.log_rate = nnx.Param(jnp.zeros(options.heads), axes=("heads",))
        self.step_bias = nnx.Param(slow_steps(options.heads), axes=("heads",))
        self.level = Linear(width, options.heads * options.levels, ("embed", "heads"), rngs)
        self.level_scale = nnx.Param(jnp.ones((options.heads, options.levels)), axes=("heads", None))
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate = Linear(width, options.heads * options.value_width, ("embed", "heads"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        heads = self.options.heads
        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        q, k, v = delta_inputs(*parts, heads)
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        level = jax.nn.softplus(self.level_scale[...] * by_head(self.level(x).astype(jnp.float32), heads))
        y, state = run(LOG_LINEAR, q, k, v, beta, -jnp.exp(self.log_rate[...]) * step, level)
        return self.out(flat(self.norm(y)) * jax.nn.silu(self.gate(x))), state
