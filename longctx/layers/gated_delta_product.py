"""Gated DeltaProduct (Siems et al., 2025) as a mixer.

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

from longctx.layers.basic import Linear, RMSNorm, ShortConv, State, l2_normalise
from longctx.layers.recurrent import Recurrent, by_head, flat, projections, slow_steps
from longctx.ops.gated_delta_product import GATED_DELTA_PRODUCT
from longctx.schema import Options, Size
from longctx.typing import Segments


class GatedDeltaProduct(Recurrent):
    """A matrix memory that each token decays by α and then writes n times by the delta rule.

    S_t = (Π_i (I - β_ti k_ti k_tiᵀ)) α_t S_{t-1} + writes, y_t = S_tᵀ q_t. q, and k_i and v_i of each step, come from a
    projection, a short convolution and SiLU; q and k are normalised, q scaled by 1/√K; β_i = 2 σ(x W_βi);
    log α = -exp(A) softplus(x W_α + b); the output is normalised per head and gated by silu(x W_g).
    State: `[B, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 32  # K
        value_width: Size = 32  # V
        conv_width: Size = 4  # taps of the convolution
        steps: Size = 2  # n, writes per token

        def problems(self):
            if self.steps < 2:
                yield f"steps must be at least 2, given {self.steps}; gated_delta with negative_eigenvalues is of 1"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        heads, keys, values = options.heads, options.heads * options.key_width, options.heads * options.value_width
        # The last step begins as the one of the delta rule, the others with random keys.
        projected = projections(width, heads, options.key_width, options.value_width, rngs)
        self.query, self.key, self.value, self.out = projected
        self.more_keys = Linear(width, (options.steps - 1) * keys, ("embed", "heads"), rngs)
        self.more_values = Linear(width, (options.steps - 1) * values, ("embed", "heads"), rngs)
        lags = [0] * keys + [1] * (options.steps * keys) + [0] * (options.steps * values)
        self.conv = ShortConv(options.conv_width, lags, rngs)
        self.beta = Linear(width, options.steps * heads, ("embed", "heads"), rngs)
        self.step = Linear(width, heads, ("embed", "heads"), rngs)
        self.log_rate = nnx.Param(jnp.zeros(heads), axes=("heads",))
        self.step_bias = nnx.Param(slow_steps(heads), axes=("heads",))
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate = Linear(width, values, ("embed", "heads"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        per_step = (*x.shape[:2], self.options.steps, self.options.heads, -1)
        parts = [self.query(x), self.more_keys(x), self.key(x), self.more_values(x), self.value(x)]
        parts, run = self.begin(parts, segments, state)
        q, *parts = (jax.nn.silu(part) for part in parts)
        q = l2_normalise(by_head(q, self.options.heads)) * self.options.key_width**-0.5
        k, v = (jnp.concatenate(pair, axis=-1).reshape(per_step) for pair in (parts[:2], parts[2:]))
        beta = 2 * jax.nn.sigmoid(self.beta(x).astype(jnp.float32)).reshape(per_step[:-1])
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        y, state = run(GATED_DELTA_PRODUCT, q, l2_normalise(k), v, beta, -jnp.exp(self.log_rate[...]) * step)
        return self.out(flat(self.norm(y)) * jax.nn.silu(self.gate(x))), state
