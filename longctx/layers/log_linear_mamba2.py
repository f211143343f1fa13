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

from longctx.layers.basic import Linear, RMSNorm, ShortConv, document, like_queries, slow_steps, undo_values
from longctx.ops import log_linear as ops
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogLinearMamba2State:
    """The buckets of the matrix memory, float32, and the last inputs of the convolution."""

    buckets: Float[Array, "B L H K V"]
    conv: Float[Array, "B W-1 C"]


class LogLinearMamba2(nnx.Module):
    """Mamba-2 with a matrix memory for each scale of the past, of 1, 1, 2, 4, ... tokens.

    Queries (C) and keys (B), shared by the heads, and values come from a projection, a short convolution and SiLU.
    With Δ = softplus(x W_Δ + b) and A per head,

        S_t^l decays by exp(-exp(A) Δ),    Δ k vᵀ is added to S_t^0,    y = Σ_l λ_l (S_t^l)ᵀ q + c v,

    λ_l = softplus(c_l x W_l) per head; the output is RMSNorm(y silu(x W_z)) over all heads, projected.
    State: `[B, L, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        key_width: int = 32  # K, the paper's state size
        value_width: int = 32  # V, the paper's head width
        conv_width: int = 4  # taps of the convolution
        levels: int = 8  # L; 1 + log2 of a document's tokens keeps all scales apart, with fewer the last holds the rest

        def problems(self):
            if min(self.heads, self.key_width, self.value_width, self.conv_width, self.levels) < 1:
                yield f"heads, key_width, value_width, conv_width and levels must be at least 1, given {self}"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        keys, values = options.key_width, options.heads * options.value_width
        self.query = Linear(width, keys, ("embed", "head"), rngs)
        self.key = Linear(width, keys, ("embed", "head"), rngs, initial=like_queries(self.query, 1, keys))
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        self.conv = ShortConv(options.conv_width, [0] * keys + [1] * keys + [0] * values, rngs)
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

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: LogLinearMamba2State | None = None
    ):
        """Returns `(y[B, T, D], LogLinearMamba2State)`."""
        segments = document(segments, x, state)
        options = self.options
        batch, length, _ = x.shape
        parts = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        parts, tail = self.conv(parts, segments, None if state is None else state.conv)
        q, k, v = jnp.split(jax.nn.silu(parts), [options.key_width, 2 * options.key_width], axis=-1)
        q, k = (jnp.repeat(y[:, :, None], options.heads, axis=2) for y in (q, k))
        v = v.reshape(batch, length, options.heads, -1).astype(jnp.float32)
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        log_decay = -jnp.exp(self.log_rate[...]) * step
        level = self.level(x).astype(jnp.float32).reshape(batch, length, options.heads, options.levels)
        y, buckets = sequence.recurrence(
            ops, q, k, step[..., None] * v, None, log_decay, jax.nn.softplus(self.level_scale[...] * level),
            state=None if state is None else state.buckets, segments=segments,
        )  # fmt: skip
        y = (y + self.skip[...][:, None] * v).astype(x.dtype).reshape(batch, length, -1)
        return self.out(self.norm(y * jax.nn.silu(self.gate(x)))), LogLinearMamba2State(buckets, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> LogLinearMamba2State:
        """The empty buckets; `capacity` does not matter."""
        options = self.options
        shape = (batch, options.levels, options.heads, options.key_width, options.value_width)
        return LogLinearMamba2State(jnp.zeros(shape, jnp.float32), self.conv.init_state(batch))
