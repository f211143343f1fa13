"""HGRN2 (Qin et al., 2024) as a mixer.

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

from longctx.layers.basic import Linear, RMSNorm, State, Taps, like_queries, undo_values
from longctx.layers.recurrent import Recurrent, by_head, flat, qkv_conv
from longctx.ops.gated_linear import GATED_LINEAR
from longctx.schema import Options, Size
from longctx.typing import Segments


class HGRN2(Recurrent):
    """A gated linear RNN whose state is expanded by an outer product: what a channel forgets makes room for the input.

    f = β + (1 - β) σ(x W_f) per key channel;  S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_tᵀ;  y_t = S_tᵀ silu(x W_q);
    v = x W_v; the output is normed. State: `[B, H, K, V]` float32.

    β is learned, per channel, as its log odds. The paper's β of a layer is a sum over the softmax of all layers', so
    that it rises with depth; here every layer has its own.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 32  # K, the expansion of the state
        value_width: Size = 32  # V
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        keys, values = options.heads * options.key_width, options.heads * options.value_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        # Keys are σ(-x W_f): they begin like the queries.
        like_query = like_queries(self.query, options.heads, options.key_width)
        self.forget = Linear(width, keys, ("embed", "heads"), rngs, initial=-like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        # Where σ is a half, the channels of a head begin with spans of 10 to 1,000 tokens.
        rate = jnp.tile(2 * jnp.geomspace(1e-3, 1e-1, options.key_width), options.heads)
        self.bound = nnx.Param(jnp.log1p(-rate) - jnp.log(rate), axes=("heads",))
        self.conv = qkv_conv(options.conv_width, self.query, self.forget, self.value, rngs)
        self.norm = RMSNorm(values, ("heads",))
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        (q, forget, v), run = self.begin([self.query(x), self.forget(x), self.value(x)], segments, state)
        forget, bound = forget.astype(jnp.float32), self.bound[...]
        # 1 - f and log f, both without a difference of near numbers.
        k = jax.nn.sigmoid(-bound) * jax.nn.sigmoid(-forget)
        log_decay = jnp.logaddexp(jax.nn.log_sigmoid(bound), jax.nn.log_sigmoid(-bound) + jax.nn.log_sigmoid(forget))
        y, state = run(GATED_LINEAR, *(by_head(part, self.options.heads) for part in (jax.nn.silu(q), k, v, log_decay)))
        return self.out(self.norm(flat(y))), state
