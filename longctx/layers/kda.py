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

from longctx.layers.basic import Linear, RMSNorm, ShortConv, delta_inputs, like_queries, slow_steps, undo_values
from longctx.ops.gated_delta import GATED_DELTA
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KDAState:
    """The matrix memory, float32, and the last inputs of the convolution."""

    matrix: Float[Array, "B H K V"]
    conv: Float[Array, "B W-1 C"]


class KDA(nnx.Module):
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
        heads: int = 4  # H
        key_width: int = 32  # K
        value_width: int = 32  # V; the paper has K = V
        conv_width: int = 4  # taps of the convolution
        rank: int = 32  # of the projections to the decay and to the output's gate; the paper has K
        gate_bias: bool = False  # a bias in the output's gate

        def problems(self):
            if min(self.heads, self.key_width, self.value_width, self.conv_width, self.rank) < 1:
                yield f"heads, key_width, value_width, conv_width and rank must be at least 1, given {self}"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        keys, values = options.heads * options.key_width, options.heads * options.value_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.heads, options.key_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        self.conv = ShortConv(options.conv_width, [0] * keys + [1] * keys + [0] * values, rngs)
        self.beta = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.step_in = Linear(width, options.rank, ("embed", "rank"), rngs)
        self.step_out = Linear(options.rank, keys, ("rank", "heads"), rngs)
        self.log_rate = nnx.Param(jnp.zeros(options.heads), axes=("heads",))
        self.step_bias = nnx.Param(jnp.tile(slow_steps(options.key_width), options.heads), axes=("heads",))
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate_in = Linear(width, options.rank, ("embed", "rank"), rngs)
        bias = 0.0 if options.gate_bias else None
        self.gate_out = Linear(options.rank, values, ("rank", "heads"), rngs, bias=bias)
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: KDAState | None = None):
        """Returns `(y[B, T, D], KDAState)`."""
        options = self.options
        batch, length, _ = x.shape
        parts = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        parts, tail = self.conv(parts, segments, None if state is None else state.conv)
        q, k, v = delta_inputs(parts, options.heads, options.key_width)
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        step = jax.nn.softplus(self.step_out(self.step_in(x)).astype(jnp.float32) + self.step_bias[...])
        log_decay = -jnp.exp(self.log_rate[...])[:, None] * step.reshape(k.shape)
        matrix = None if state is None else state.matrix
        y, matrix = sequence.run(GATED_DELTA, (q, k, v, beta, log_decay), state=matrix, segments=segments)
        y = self.norm(y).reshape(batch, length, -1) * jax.nn.sigmoid(self.gate_out(self.gate_in(x)))
        return self.out(y), KDAState(matrix, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> KDAState:
        """The empty memory; `capacity` does not matter."""
        options = self.options
        matrix = jnp.zeros((batch, options.heads, options.key_width, options.value_width), jnp.float32)
        return KDAState(matrix, self.conv.init_state(batch))
