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

from longctx.layers.basic import Linear, RMSNorm, ShortConv, l2_normalise, like_queries, slow_steps, undo_values
from longctx.ops.gated_delta_product import GATED_DELTA_PRODUCT
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaProductState:
    """The matrix memory, float32, and the last inputs of the convolution."""

    matrix: Float[Array, "B H K V"]
    conv: Float[Array, "B W-1 C"]


class GatedDeltaProduct(nnx.Module):
    """A matrix memory that each token decays by α and then writes n times by the delta rule.

    S_t = (Π_i (I - β_ti k_ti k_tiᵀ)) α_t S_{t-1} + writes, y_t = S_tᵀ q_t. q, and k_i and v_i of each step, come from a
    projection, a short convolution and SiLU; q and k are normalised, q scaled by 1/√K; β_i = 2 σ(x W_βi);
    log α = -exp(A) softplus(x W_α + b); the output is normalised per head and gated by silu(x W_g).
    State: `[B, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        key_width: int = 32  # K
        value_width: int = 32  # V
        conv_width: int = 4  # taps of the convolution
        steps: int = 2  # n, writes per token

        def problems(self):
            if min(self.heads, self.key_width, self.value_width, self.conv_width) < 1:
                yield f"heads, key_width, value_width and conv_width must be at least 1, given {self}"
            if self.steps < 2:
                yield f"steps must be at least 2, given {self.steps}; gated_delta with negative_eigenvalues is of 1"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        keys, values = options.heads * options.key_width, options.heads * options.value_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        # The last step begins as the one of the delta rule, the others at random places.
        like_query = like_queries(self.query, options.heads, options.key_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        self.more_keys = Linear(width, (options.steps - 1) * keys, ("embed", "heads"), rngs)
        self.more_values = Linear(width, (options.steps - 1) * values, ("embed", "heads"), rngs)
        lags = [0] * keys + [1] * (options.steps * keys) + [0] * (options.steps * values)
        self.conv = ShortConv(options.conv_width, lags, rngs)
        self.beta = Linear(width, options.steps * options.heads, ("embed", "heads"), rngs)
        self.step = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.log_rate = nnx.Param(jnp.zeros(options.heads), axes=("heads",))
        self.step_bias = nnx.Param(slow_steps(options.heads), axes=("heads",))
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate = Linear(width, values, ("embed", "heads"), rngs)
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: GatedDeltaProductState | None = None
    ):
        """Returns `(y[B, T, D], GatedDeltaProductState)`."""
        options = self.options
        batch, length, _ = x.shape
        inputs = [self.query(x), self.more_keys(x), self.key(x), self.more_values(x), self.value(x)]
        parts, tail = self.conv(jnp.concatenate(inputs, axis=-1), segments, None if state is None else state.conv)
        keys = options.heads * options.key_width
        q, k, v = jnp.split(jax.nn.silu(parts), [keys, (1 + options.steps) * keys], axis=-1)
        per_step = (batch, length, options.steps, options.heads, -1)
        q = l2_normalise(q.reshape(batch, length, options.heads, -1)) * options.key_width**-0.5
        k, v = l2_normalise(k.reshape(per_step)), v.reshape(per_step)
        beta = 2 * jax.nn.sigmoid(self.beta(x).astype(jnp.float32)).reshape(per_step[:-1])
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        log_decay = -jnp.exp(self.log_rate[...]) * step
        matrix = None if state is None else state.matrix
        y, matrix = sequence.run(GATED_DELTA_PRODUCT, (q, k, v, beta, log_decay), state=matrix, segments=segments)
        y = self.norm(y).reshape(batch, length, -1) * jax.nn.silu(self.gate(x))
        return self.out(y), GatedDeltaProductState(matrix, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> GatedDeltaProductState:
        """The empty memory; `capacity` does not matter."""
        options = self.options
        matrix = jnp.zeros((batch, options.heads, options.key_width, options.value_width), jnp.float32)
        return GatedDeltaProductState(matrix, self.conv.init_state(batch))
