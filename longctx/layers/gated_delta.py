"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2024) as a mixer.

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
from longctx.layers.recurrent import Recurrent, delta_inputs, flat, projections, qkv_conv, slow_steps
from longctx.ops.gated_delta import GATED_DELTA
from longctx.schema import Options, Size
from longctx.typing import Segments


class GatedDelta(Recurrent):
    """A matrix memory written by the delta rule: what a key held is replaced by β of the new value, after decay α.

    S_t = (I - β_t k_t k_tᵀ) α_t S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t. q, k, v come from a projection, a short
    convolution and SiLU; q and k are normalised, q scaled by 1/√K; β = σ(x W_β), or twice that with
    `negative_eigenvalues` (Grazzi et al., 2024); log α = -exp(A) softplus(x W_α + b); the output is normalised per head
    and gated by silu(x W_g). State: `[B, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 32  # K
        value_width: Size = 32  # V
        conv_width: Size = 4  # taps of the convolution
        negative_eigenvalues: bool = False  # β from 0 to 2 in place of 0 to 1: a write may reverse what it meets

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        shape = options.heads, options.key_width, options.value_width
        self.query, self.key, self.value, self.out = projections(width, *shape, rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        self.beta = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.step = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.log_rate = nnx.Param(jnp.zeros(options.heads), axes=("heads",))
        self.step_bias = nnx.Param(slow_steps(options.heads), axes=("heads",))
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate = Linear(width, options.heads * options.value_width, ("embed", "heads"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        q, k, v = delta_inputs(*parts, self.options.heads)
        beta = (2 if self.options.negative_eigenvalues else 1) * jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        y, state = run(GATED_DELTA, q, k, v, beta, -jnp.exp(self.log_rate[...]) * step)
        return self.out(flat(self.norm(y)) * jax.nn.silu(self.gate(x))), state
