"""DeltaNet (Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024) as a mixer.

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

from longctx.layers.basic import Linear, RMSNorm, ShortConv, delta_inputs, like_queries, undo_values
from longctx.ops.gated_delta import GATED_DELTA
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments

_ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaNetState:
    """The matrix memory, float32, and the last inputs of the convolution."""

    matrix: Float[Array, "B H K V"]
    conv: Float[Array, "B W-1 C"]


class DeltaNet(nnx.Module):
    """A matrix memory written by the delta rule, without decay: what a key held is replaced by β of the new value.

    S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t. q, k, v come from a projection, a short
    convolution and SiLU; q and k are normalised, q scaled by 1/√K; β = σ(x W_β); the output is normalised per head.
    With ReLU for q and k, keys may be exactly orthogonal, and writing under one leaves the other's value alone.
    State: `[B, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        key_width: int = 32  # K
        value_width: int = 32  # V
        conv_width: int = 4  # taps of the convolution
        activation: str = "silu"  # of queries and keys: "silu" or "relu"

        def problems(self):
            if min(self.heads, self.key_width, self.value_width, self.conv_width) < 1:
                yield f"heads, key_width, value_width and conv_width must be at least 1, given {self}"
            if self.activation not in _ACTIVATIONS:
                yield f"activation is '{self.activation}'; choose one of {', '.join(_ACTIVATIONS)}"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        keys, values = options.heads * options.key_width, options.heads * options.value_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.heads, options.key_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        self.conv = ShortConv(options.conv_width, [0] * keys + [1] * keys + [0] * values, rngs)
        self.beta = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.norm = RMSNorm(options.value_width, ("head",))
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: DeltaNetState | None = None):
        """Returns `(y[B, T, D], DeltaNetState)`."""
        options = self.options
        batch, length, _ = x.shape
        parts = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        parts, tail = self.conv(parts, segments, None if state is None else state.conv)
        q, k, v = delta_inputs(parts, options.heads, options.key_width, _ACTIVATIONS[options.activation])
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        matrix = None if state is None else state.matrix
        y, matrix = sequence.run(GATED_DELTA, (q, k, v, beta, jnp.zeros_like(beta)), state=matrix, segments=segments)
        return self.out(self.norm(y).reshape(batch, length, -1)), DeltaNetState(matrix, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> DeltaNetState:
        """The empty memory; `capacity` does not matter."""
        options = self.options
        matrix = jnp.zeros((batch, options.heads, options.key_width, options.value_width), jnp.float32)
        return DeltaNetState(matrix, self.conv.init_state(batch))
