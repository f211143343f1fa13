"""Mamba-2 (Dao and Gu, 2024) as a mixer.

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

from longctx.layers.basic import Linear, ShortConv, State, like_queries, undo_values
from longctx.layers.recurrent import Recurrent, by_head, flat, slow_steps
from longctx.ops.backend import scaled
from longctx.ops.gated_linear import GATED_LINEAR
from longctx.parallel import mesh
from longctx.schema import Options, Size
from longctx.typing import Segments


class Mamba2(Recurrent):
    """A selective state-space model with one decay per head (state-space duality).

    u, B, C = silu(conv(x W) + b);  Δ = softplus(x W_Δ + b_Δ);  per head, with A = -exp(a):
    S_t = exp(Δ_t A) S_{t-1} + B_t (Δ_t u_t)ᵀ;  y_t = S_tᵀ C_t + d u_t;  out = norm(y ⊙ silu(x W_z)) W_out.
    In the words of linear attention C is the query, B the key and u the value; `groups` of heads share B and C, and
    the norm is over the values of a group. State: `[B, H, K, V]` float32 and W-1 inputs of the convolution.

    The parameters are those of the paper's code one to one: `in_proj` there holds gate, value, key, query and step
    next to each other. Other initial values: a = 0, where the paper draws -A from 1 to 16, and mimetic projections.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        groups: Size = 1  # of heads that share B and C; divides H
        key_width: Size = 32  # K, the paper's state size N
        value_width: Size = 32  # V, the paper's head width P
        conv_width: Size = 4  # taps of the convolution
        norm_epsilon: float = 1e-5  # added to the mean square in the norm

        def problems(self):
            if self.heads % self.groups:
                yield f"heads is {self.heads} and groups is {self.groups}; groups must divide heads"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        keys, values = options.groups * options.key_width, options.heads * options.value_width
        self.gate = Linear(width, values, ("embed", "heads"), rngs)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.groups, options.key_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.conv = ShortConv(options.conv_width, [0] * values + [1] * keys + [0] * keys, rngs)
        self.conv_bias = nnx.Param(jnp.zeros(values + 2 * keys), axes=("heads",))
        self.step = Linear(width, options.heads, ("embed", "heads"), rngs)
        # The heads' memories begin with spans of 10 to 1,000 tokens.
        self.step_bias = nnx.Param(slow_steps(options.heads), axes=("heads",))
        self.log_rate = nnx.Param(jnp.zeros(options.heads), axes=("heads",))
        self.skip = nnx.Param(jnp.ones(options.heads), axes=("heads",))
        self.norm_scale = nnx.Param(jnp.ones(values), axes=("heads",))
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        options = self.options
        parts, run = self.begin([self.value(x), self.key(x), self.query(x)], segments, state, self.conv_bias[...])
        v, k, q = (jax.nn.silu(part) for part in parts)
        q, k = by_head(q, options.groups), by_head(k, options.groups)
        if options.groups % mesh.size("model"):
            # Devices that split the heads cannot split the groups: each head has its own copy.
            q, k = (jnp.repeat(part, options.heads // options.groups, axis=2) for part in (q, k))
        v = by_head(v, options.heads).astype(jnp.float32)
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        y, state = run(GATED_LINEAR, q, k, step[..., None] * v, -jnp.exp(self.log_rate[...]) * step)
        y = flat(y + self.skip[...][:, None] * v) * jax.nn.silu(self.gate(x))
        y = by_head(y, options.groups)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + options.norm_epsilon)
        return self.out(scaled(flat(y), self.norm_scale[...]).astype(x.dtype)), state
