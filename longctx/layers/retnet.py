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

from longctx.layers.basic import (
    Linear,
    RMSNorm,
    Taps,
    behind,
    convolved,
    document,
    empty_tail,
    like_queries,
    short_conv,
    undo_values,
)
from longctx.ops import gated_linear as ops
from longctx.ops.positions import Rotation, rotate
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


class RetNet(nnx.Module):
    """Linear attention whose memory decays at a rate fixed per head, with rotary positions.

    S_t = γ_h S_{t-1} + k_t v_tᵀ;  y_t = S_tᵀ q_t, with q and k turned by their positions (the rotation of xPos, whose
    growth and decay are those of γ) and q scaled by 1/√K; the output is normalised per head and gated by silu(x W_g).
    γ_h = 1 - 2^(-5-h) for h = 0, 1, …, H - 1 (equation 8). As in the authors' code (torchscale), pair j of the K/2
    pairs of channels turns by base^(-j / (K/2 - 1)) a token, from 1 to 1 / base, and the norm is an RMS norm.

    What differs: the norm has a scale [V] that the heads share, which theirs has not (W can absorb it); their parallel
    form divides decays and logits by sums first, which the norm takes out again but for its ε; a pair is the channels j
    and j + K/2, theirs 2j and 2j + 1, which is another order of the columns of W_q and W_k.
    State: `[B, H, K, V]` float32.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        key_width: int = 32  # K, even
        value_width: int = 64  # V; the paper takes 2 K
        rope_base: float = 10_000.0  # of the rotary frequencies, which go from 1 to 1 / base
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if min(self.heads, self.key_width, self.value_width) < 1 or self.key_width % 2:
                yield f"heads and widths must be at least 1 and key_width even, given {self}"
            if self.rope_base <= 1:
                yield f"rope_base is {self.rope_base}; it must be above 1"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        keys, values = options.heads * options.key_width, options.heads * options.value_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.heads, options.key_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
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
        segments = document(segments, x, state)
        options = self.options
        batch, length, _ = x.shape

        def heads(y):
            return y.reshape(batch, length, options.heads, -1)

        turn = Rotation(options.rope_base ** -np.linspace(0, 1, options.key_width // 2))
        parts, state, tail = convolved(self.conv, (self.query(x), self.key(x), self.value(x)), segments, state)
        q, k, v = map(heads, parts)
        q, k = (rotate(part, segments.positions, turn) for part in (q, k))
        log_decay = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(options.heads))))
        log_decay = jnp.broadcast_to(log_decay, (batch, length, options.heads))
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
