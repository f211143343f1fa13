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

from longctx.layers.basic import (
    Linear,
    RMSNorm,
    Taps,
    behind,
    convolved,
    empty_tail,
    like_queries,
    short_conv,
    undo_values,
)
from longctx.ops import gated_linear as ops
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


class GLA(nnx.Module):
    """Linear attention whose memory decays per key channel, by a gate that depends on the token.

    log α = log σ(x W₁ W₂ + b) / τ, with W₁ W₂ of low rank; q is scaled by 1/√K; the output is normalised per head
    and gated by silu(x W_g). State: `[B, H, K, V]` float32.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        key_width: int = 32  # K
        value_width: int = 32  # V
        gate_rank: int = 16  # of the projection to the decay
        gate_temperature: float = 16.0  # τ: larger keeps the decay nearer to 1
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if min(self.heads, self.key_width, self.value_width, self.gate_rank) < 1 or self.gate_temperature <= 0:
                yield f"heads, widths and rank must be at least 1 and gate_temperature above 0, given {self}"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        keys, values = options.heads * options.key_width, options.heads * options.value_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.heads, options.key_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        self.decay_in = Linear(width, options.gate_rank, ("embed", "rank"), rngs)
        self.decay_out = Linear(options.gate_rank, keys, ("rank", "heads"), rngs, bias=0.0)
        lags = [0] * keys + [1] * keys + [0] * values
        self.conv = short_conv(options.conv_width, lags, rngs)
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate = Linear(width, values, ("embed", "heads"), rngs)
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: Float[Array, "B H K V"] | None = None
    ):
        """Returns `(y[B, T, D], state[B, H, K, V])`."""
        options = self.options
        batch, length, _ = x.shape

        def heads(y):
            return y.reshape(batch, length, options.heads, -1)

        parts, state, tail = convolved(self.conv, (self.query(x), self.key(x), self.value(x)), segments, state)
        q, k, v = map(heads, parts)
        gate = self.decay_out(self.decay_in(x)).astype(jnp.float32)
        log_decay = heads(jax.nn.log_sigmoid(gate) / options.gate_temperature)
        y, state = sequence.recurrence(
            ops, q * options.key_width**-0.5, k, v, log_decay, state=state, segments=segments
        )
        y = self.norm(y).reshape(batch, length, -1) * jax.nn.silu(self.gate(x))
        return self.out(y), behind(state, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> Float[Array, "B H K V"]:
        """The empty memory; `capacity` does not matter."""
        options = self.options
        matrix = jnp.zeros((batch, options.heads, options.key_width, options.value_width), jnp.float32)
        return behind(matrix, empty_tail(self.conv, batch))
