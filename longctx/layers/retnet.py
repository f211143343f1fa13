"""Multi-scale retention (RetNet; Sun et al., 2023) as a mixer.

Group: linear attention and matrix memories with elementwise decay
Transition: S ↦ a ⊙ S + B
Devices: log₂P hops of H·K·(V+1)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, RMSNorm, State, Taps, document
from longctx.layers.recurrent import Recurrent, by_head, flat, projections, qkv_conv
from longctx.ops.gated_linear import GATED_LINEAR
from longctx.ops.rotary import Rotation, rotate
from longctx.schema import Options, Size
from longctx.typing import Segments


class RetNet(Recurrent):
    """Linear attention whose memory decays at a rate fixed per head, with rotary positions.

    S_t = γ_h S_{t-1} + k_t v_tᵀ;  y_t = S_tᵀ q_t, with q and k rotated by their positions (the rotation of xPos, whose
    growth and decay are those of γ) and q scaled by 1/√K; the output is normalised per head and gated by silu(x W_g).
    γ_h = 1 - 2^(-5-h) for h = 0, 1, …, H - 1 (equation 8). As in the authors' code (torchscale), pair j of the K/2
    pairs of channels rotates by base^(-j / (K/2 - 1)) a token, from 1 to 1 / base, and the norm is an RMS norm.

    What differs: the norm has a scale [V] that the heads share, which theirs has not (W can absorb it); their parallel
    form divides decays and logits by sums first, which the norm takes out again but for its ε; a pair is the channels j
    and j + K/2, theirs 2j and 2j + 1, which is another order of the columns of W_q and W_k.
    State: `[B, H, K, V]` float32.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 32  # K, even
        value_width: Size = 64  # V; the paper takes 2 K
        rope_base: float = 10_000.0  # of the rotary frequencies, which go from 1 to 1 / base
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if self.key_width % 2:
                yield f"key_width is {self.key_width}; give an even number"
            if self.rope_base <= 1:
                yield f"rope_base is {self.rope_base}; it must be above 1"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        shape = options.heads, options.key_width, options.value_width
        self.query, self.key, self.value, self.out = projections(width, *shape, rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        self.norm = RMSNorm(options.value_width, ("head",))
        self.gate = Linear(width, options.heads * options.value_width, ("embed", "heads"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        heads, key_width = self.options.heads, self.options.key_width
        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        q, k, v = (by_head(part, heads) for part in parts)
        rotation = Rotation(self.options.rope_base ** -np.linspace(0, 1, key_width // 2))
        q, k = (rotate(part, segments.positions, rotation) for part in (q, k))
        log_decay = jnp.broadcast_to(jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads)))), q.shape[:3])
        y, state = run(GATED_LINEAR, q * key_width**-0.5, k, v, log_decay)
        return self.out(flat(self.norm(y)) * jax.nn.silu(self.gate(x))), state
