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

from longctx.layers.basic import Linear, RMSNorm, ShortConv, delta_inputs, like_queries, slow_steps, undo_values
from longctx.ops.gated_delta import GATED_DELTA
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaState:
    """The matrix memory, float32, and the last inputs of the convolution."""

    matrix: Float[Array, "B H K V"]
    conv: Float[Array, "B W-1 C"]


class GatedDelta(nnx.Module):
    """A matrix memory written by the delta rule: what a key held is replaced by β of the new value, after decay α.

    q, k, v come from a projection, a short convolution and SiLU; q and k are normalised, q scaled by 1/√K;
    β = σ(x W_β), or twice that with `negative_eigenvalues` (Grazzi et al., 2024); log α = -exp(A) softplus(x W_α + b);
    the output is normalised per head and gated by silu(x W_g).
    State: `[B, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        key_width: int = 32  # K
        value_width: int = 32  # V
        conv_width: int = 4  # taps of the convolution
        negative_eigenvalues: bool = False  # β from 0 to 2 in place of 0 to 1: a write may reverse what it meets

        def problems(self):
            if min(self.heads, self.key_width, self.value_width, self.conv_width) < 1:
                yield f"heads, key_width, value_width and conv_width must be at least 1, given {self}"

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
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate = Linear(width, values, ("embed", "heads"), rngs)
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: GatedDeltaState | None = None
    ):
        """Returns `(y[B, T, D], GatedDeltaState)`."""
        options = self.options
        batch, length, _ = x.shape
        parts = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        parts, tail = self.conv(parts, segments, None if state is None else state.conv)
        q, k, v = delta_inputs(parts, options.heads, options.key_width)
        beta = (2 if options.negative_eigenvalues else 1) * jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        log_decay = -jnp.exp(self.log_rate[...]) * step
        matrix = None if state is None else state.matrix
        y, matrix = sequence.run(GATED_DELTA, (q, k, v, beta, log_decay), state=matrix, segments=segments)
        y = self.norm(y).reshape(batch, length, -1) * jax.nn.silu(self.gate(x))
        return self.out(y), GatedDeltaState(matrix, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> GatedDeltaState:
        """The empty memory; `capacity` does not matter."""
        options = self.options
        matrix = jnp.zeros((batch, options.heads, options.key_width, options.value_width), jnp.float32)
        return GatedDeltaState(matrix, self.conv.init_state(batch))
