"""RWKV-7 (Peng et al., 2025): its time mixing as a mixer.

Group: the delta rule
Transition: S ↦ M S + B
Devices: log₂P hops of H·K·(K+V)
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, State, Taps, like_queries, short_conv, undo_values
from longctx.layers.recurrent import Recurrent, by_head, flat, standardised
from longctx.ops.causal_conv import CAUSAL_CONV
from longctx.ops.diagonal_low_rank import DIAGONAL_LOW_RANK
from longctx.parallel import sequence
from longctx.schema import Options, Size
from longctx.typing import Segments


class Memory(NamedTuple):
    """The matrix memory and the last input, float32."""

    matrix: Float[Array, "B H K V"]
    last: Float[Array, "B 1 D"]


class RWKV7(Recurrent):
    """A matrix memory that decays per channel, removes at one key what it held there, and writes at another.

    Each of r, k, v, w, a, g is a projection of its own mixture of the token with the one before it,
    x_t + μ (x_{t-1} - x_t). With γ the removal key (k ξ) of norm 1 and k̃ = k (1 + (a - 1) α),

        S_t = Diag(w) S_{t-1} - (a γ) (γᵀ S_{t-1}) + k̃ vᵀ,    y = g (norm(S_tᵀ r) + (r · ρ k̃) v) W

    with log w = -e^-½ σ(tanh(x W₁) W₂ + b), a = σ(x A₁ A₂ + b), g = σ(x G₁) G₂, and norm a layer norm per head, whose
    scale and shift are per channel and ε is 1e-5 V (6.4e-4 at the paper's V of 64). The removal key's norm counts as at
    least 1e-12, as in the authors' code.

    What differs: the paper's mixture of each layer's values with those of the first layer is left out, as a mixer is
    given its own input alone; and initial values, which here make keys those of the token before.
    State: `[B, H, K, V]` and the last input, float32.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 32  # K
        value_width: Size = 32  # V; the paper has K = V = D / H
        rank: Size = 32  # of the projections to decay, learning rate and gate
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        heads, keys, values = options.heads, options.heads * options.key_width, options.heads * options.value_width
        # Keys begin as those of the token before, all else as of the token itself; in the order r, k, v, w, a, g.
        mix = jnp.zeros((6, width)).at[1].set(1)
        self.mix = nnx.Param(mix, axes=(None, "embed"))
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, heads, options.key_width) * options.key_width**-0.5
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        # Keys begin as of the token before without it.
        self.conv = short_conv(options.conv_width, [0] * (2 * keys + values), rngs)
        self.decay_in = Linear(width, options.rank, ("embed", "rank"), rngs)
        self.decay_out = Linear(options.rank, keys, ("rank", "heads"), rngs)
        # The channels' memories begin with spans of 10 to 1,000 tokens.
        chance = jnp.geomspace(1e-3, 1e-1, options.key_width) * math.exp(0.5)
        self.decay_bias = nnx.Param(jnp.tile(jnp.log(chance / (1 - chance)), heads), axes=("heads",))
        self.rate_in = Linear(width, options.rank, ("embed", "rank"), rngs)
        self.rate_out = Linear(options.rank, keys, ("rank", "heads"), rngs, bias=0.0)
        self.gate_in = Linear(width, options.rank, ("embed", "rank"), rngs)
        self.gate_out = Linear(options.rank, values, ("rank", "heads"), rngs)
        self.removal = nnx.Param(jnp.ones((heads, options.key_width)), axes=("heads", "head"))  # ξ
        self.replacement = nnx.Param(jnp.ones((heads, options.key_width)), axes=("heads", "head"))  # α
        self.bonus = nnx.Param(jnp.zeros((heads, options.key_width)), axes=("heads", "head"))  # ρ
        self.scale = nnx.Param(jnp.ones((heads, options.value_width)), axes=("heads", "head"))
        self.shift = nnx.Param(jnp.zeros((heads, options.value_width)), axes=("heads", "head"))
        back = undo_values(self.value, heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        heads, last = self.options.heads, None
        if state is not None:
            last, state = state.memory.last, State(state.memory.matrix, state.conv)
        lag = jnp.ones((2, self.width), x.dtype).at[1].set(0)
        before, last = sequence.run(CAUSAL_CONV, (x,), (lag,), last, segments=segments)
        mixed = (x + mix * (before - x) for mix in self.mix[...].astype(x.dtype))
        x_r, x_k, x_v, x_w, x_a, x_g = mixed
        parts, run = self.begin([self.query(x_r), self.key(x_k), self.value(x_v)], segments, state)
        r, k, v = (by_head(part, heads) for part in parts)
        k = k.astype(jnp.float32)
        decay = self.decay_out(jnp.tanh(self.decay_in(x_w))).astype(jnp.float32) + self.decay_bias[...]
        log_decay = by_head(-math.exp(-0.5) * jax.nn.sigmoid(decay), heads)
        rate = by_head(jax.nn.sigmoid(self.rate_out(self.rate_in(x_a)).astype(jnp.float32)), heads)
        removal = _unit(k * self.removal[...])
        k *= 1 + (rate - 1) * self.replacement[...]
        y, state = run(DIAGONAL_LOW_RANK, r, k, v, -removal, rate * removal, log_decay)
        bonus = jnp.sum(r * k * self.bonus[...], axis=-1, keepdims=True).astype(x.dtype)
        y = standardised(y.astype(jnp.float32), 1e-5 * self.options.value_width) * self.scale[...] + self.shift[...]
        y = flat(y.astype(x.dtype) + bonus * v) * self.gate_out(jax.nn.sigmoid(self.gate_in(x_g)))
        return self.out(y), State(Memory(state.memory, last), state.conv)


def _unit(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """`x / |x|`, and 0 with no gradient where the norm is below 1e-12: float32, whatever the size of x."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    something = square > 1e-24
    return jnp.where(something, x * jax.lax.rsqrt(jnp.where(something, square, 1.0)), 0.0)
