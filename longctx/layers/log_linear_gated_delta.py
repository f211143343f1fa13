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

from longctx.layers.basic import (
    Linear,
    RMSNorm,
    ShortConv,
    delta_inputs,
    document,
    like_queries,
    slow_steps,
    undo_values,
)
from longctx.ops import log_linear as ops
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogLinearGatedDeltaState:
    """The buckets of the matrix memory, float32, and the last inputs of the convolution."""

    buckets: Float[Array, "B L H K V"]
    conv: Float[Array, "B W-1 C"]


class LogLinearGatedDelta(nnx.Module):
    """Gated DeltaNet with a matrix memory for each scale of the past, of 1, 1, 2, 4, ... tokens.

    Each of the L memories decays and is corrected by every token, as the one of `gated_delta` is (see there for q, k,
    v, β, α); y_t = Σ_l λ_l (S_t^l)ᵀ q_t with λ_l = softplus(c_l x W_l) per head, normalised per head and gated by
    silu(x W_g). State: `[B, L, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        key_width: int = 32  # K
        value_width: int = 32  # V
        conv_width: int = 4  # taps of the convolution
        levels: int = 8  # L; 1 + log2 of a document's tokens keeps all scales apart, with fewer the last holds the rest

        def problems(self):
            if min(self.heads, self.key_width, self.value_width, self.conv_width, self.levels) < 1:
                yield f"heads, key_width, value_width, conv_width and levels must be at least 1, given {self}"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        keys, values = options.heads * options.key_width, options.heads * options.value_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.heads, options.key_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        self.conv = ShortConv(options.conv_width, [0] * keys + [1] * keys + [0] * values, rngs)
        self.beta = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.step = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.log_rate = nnx.Param(jnp.zeros(options.heads), axes=("heads",))
        self.step_bias = nnx.Param(slow_steps(options.heads), axes=("heads",))
        self.level = Linear(width, options.heads * options.levels, ("embed", "heads"), rngs)
        self.level_scale = nnx.Param(jnp.ones((options.heads, options.levels)), axes=("heads", None))
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate = Linear(width, values, ("embed", "heads"), rngs)
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: LogLinearGatedDeltaState | None = None
    ):
        """Returns `(y[B, T, D], LogLinearGatedDeltaState)`."""
        segments = document(segments, x, state)
        options = self.options
        batch, length, _ = x.shape
        parts = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        parts, tail = self.conv(parts, segments, None if state is None else state.conv)
        q, k, v = delta_inputs(parts, options.heads, options.key_width)
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        log_decay = -jnp.exp(self.log_rate[...]) * step
        level = self.level(x).astype(jnp.float32).reshape(batch, length, options.heads, options.levels)
        weight = jax.nn.softplus(self.level_scale[...] * level)
        y, buckets = sequence.recurrence(
            ops, q, k, v, beta, log_decay, weight, state=None if state is None else state.buckets, segments=segments
        )
        y = self.norm(y).reshape(batch, length, -1) * jax.nn.silu(self.gate(x))
        return self.out(y), LogLinearGatedDeltaState(buckets, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> LogLinearGatedDeltaState:
        """The empty buckets; `capacity` does not matter."""
        options = self.options
        shape = (batch, options.levels, options.heads, options.key_width, options.value_width)
        return LogLinearGatedDeltaState(jnp.zeros(shape, jnp.float32), self.conv.init_state(batch))
