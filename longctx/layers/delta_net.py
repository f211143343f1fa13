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

from longctx.layers.basic import Linear, RMSNorm, State
from longctx.layers.recurrent import Recurrent, delta_inputs, flat, projections, qkv_conv
from longctx.ops.gated_delta import GATED_DELTA
from longctx.schema import Options, Size
from longctx.typing import Segments

_ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu}


class DeltaNet(Recurrent):
    """A matrix memory written by the delta rule, without decay: what a key held is replaced by β of the new value.

    S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t. q, k, v come from a projection, a short
    convolution and SiLU; q and k are normalised, q scaled by 1/√K; β = σ(x W_β); the output is normalised per head.
    With ReLU for q and k, keys may be exactly orthogonal, and writing under one leaves the other's value alone.
    State: `[B, H, K, V]` float32 and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 32  # K
        value_width: Size = 32  # V
        conv_width: Size = 4  # taps of the convolution
        activation: str = "silu"  # of queries and keys: "silu" or "relu"

        def problems(self):
            if self.activation not in _ACTIVATIONS:
                yield f"activation is '{self.activation}'; choose one of {', '.join(_ACTIVATIONS)}"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        shape = options.heads, options.key_width, options.value_width
        self.query, self.key, self.value, self.out = projections(width, *shape, rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        self.beta = Linear(width, options.heads, ("embed", "heads"), rngs)
        self.norm = RMSNorm(options.value_width, ("head",))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        q, k, v = delta_inputs(*parts, self.options.heads, _ACTIVATIONS[self.options.activation])
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        y, state = run(GATED_DELTA, q, k, v, beta, jnp.zeros_like(beta))
        return self.out(flat(self.norm(y))), state
