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

from longctx.layers.basic import Linear, ShortConv, like_queries, scaled, undo_values
from longctx.ops import gated_linear as ops
from longctx.parallel import mesh, sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba2State:
    """The state-space model's states, float32, and the last inputs of the convolution."""

    matrix: Float[Array, "B H K V"]
    conv: Float[Array, "B W-1 C"]


class Mamba2(nnx.Module):
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
        heads: int = 4  # H
        groups: int = 1  # of heads that share B and C; divides H
        key_width: int = 32  # K, the paper's state size N
        value_width: int = 32  # V, the paper's head width P
        conv_width: int = 4  # taps of the convolution
        norm_epsilon: float = 1e-5  # added to the mean square in the norm

        def problems(self):
            if min(self.heads, self.groups, self.key_width, self.value_width, self.conv_width) < 1:
                yield f"heads, groups, key_width, value_width and conv_width must be at least 1, given {self}"
            elif self.heads % self.groups:
                yield f"heads is {self.heads} and groups is {self.groups}; groups must divide heads"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
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
        step = jnp.geomspace(1e-3, 1e-1, options.heads)
        self.step_bias = nnx.Param(step + jnp.log(-jnp.expm1(-step)), axes=("heads",))
        self.log_rate = nnx.Param(jnp.zeros(options.heads), axes=("heads",))
        self.skip = nnx.Param(jnp.ones(options.heads), axes=("heads",))
        self.norm_scale = nnx.Param(jnp.ones(values), axes=("heads",))
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: Mamba2State | None = None):
        """Returns `(y[B, T, D], Mamba2State)`."""
        options = self.options
        batch, length, _ = x.shape
        parts = jnp.concatenate([self.value(x), self.key(x), self.query(x)], axis=-1)
        parts, tail = self.conv(parts, segments, None if state is None else state.conv)
        parts = jax.nn.silu(parts + self.conv_bias[...].astype(x.dtype))
        keys, values = options.groups * options.key_width, options.heads * options.value_width
        v, k, q = jnp.split(parts, [values, values + keys], axis=-1)

        def of_group(y):
            y = y.reshape(batch, length, options.groups, -1)
            # Where devices split the heads, and cannot split the groups, each head has its own.
            shared = options.groups % mesh.size("model") == 0
            return y if shared else jnp.repeat(y, options.heads // options.groups, axis=2)

        v = v.reshape(batch, length, options.heads, -1).astype(jnp.float32)
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias[...])
        log_decay = -jnp.exp(self.log_rate[...]) * step
        y, matrix = sequence.recurrence(
            ops,
            of_group(q),
            of_group(k),
            step[..., None] * v,
            log_decay,
            state=None if state is None else state.matrix,
            segments=segments,
        )
        y = (y + self.skip[...][:, None] * v).reshape(batch, length, -1) * jax.nn.silu(self.gate(x))
        y = y.reshape(batch, length, options.groups, -1)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + options.norm_epsilon)
        y = scaled(y.reshape(batch, length, -1), self.norm_scale[...])
        return self.out(y.astype(x.dtype)), Mamba2State(matrix, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> Mamba2State:
        """The empty state; `capacity` does not matter."""
        options = self.options
        matrix = jnp.zeros((batch, options.heads, options.key_width, options.value_width), jnp.float32)
        return Mamba2State(matrix, self.conv.init_state(batch))
