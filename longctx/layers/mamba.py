"""Mamba (Gu and Dao, 2023) as a mixer.

Group: diagonal state spaces and recurrences
Transition: S ↦ a ⊙ S + B
Devices: log₂P hops of 2·I·N
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, ShortConv, State
from longctx.layers.recurrent import Recurrent
from longctx.ops.selective_scan import SELECTIVE_SCAN
from longctx.schema import Options, Size
from longctx.typing import Segments


class Mamba(Recurrent):
    """A state-space model per channel, whose step, input and output projections depend on the token.

    u = silu(conv(x W_in) + b_conv);  (r, B, C) = u W_x;  Δ = softplus(r W_Δ + b_Δ);  A = -exp(A_log);
    h_t = exp(Δ A) ⊙ h_{t-1} + (Δ ⊙ u) B^T;  y = (h C + d ⊙ u) ⊙ silu(x W_z) W_out. State: `[B, I, N]` float32, and
    W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        inner: Size = 64  # I, channels; twice the width of the model in the paper
        state: Size = 16  # N, numbers per channel
        step_rank: Size = 4  # of the projection to the steps; a sixteenth of the width of the model in the paper
        conv_width: Size = 4  # taps of the convolution

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        inner, rank = options.inner, options.step_rank
        self.input = Linear(width, inner, ("embed", "heads"), rngs)
        self.gate = Linear(width, inner, ("embed", "heads"), rngs)
        self.conv = ShortConv(options.conv_width, [0] * inner, rngs)
        self.conv_bias = nnx.Param(jnp.zeros(inner, jnp.float32), axes=("heads",))
        self.select = Linear(inner, rank + 2 * options.state, ("heads", "rank"), rngs)
        uniform = jax.random.uniform(rngs.params(), (rank, inner), minval=-1, maxval=1)
        self.step = Linear(rank, inner, ("rank", "heads"), rngs, initial=uniform * rank**-0.5)
        # Steps begin between 1e-3 and 1e-1, uniform in their logarithm: the inverse of softplus.
        low, high = jnp.log(1e-3), jnp.log(1e-1)
        step = jnp.exp(jax.random.uniform(rngs.params(), (inner,), minval=low, maxval=high))
        self.step_bias = nnx.Param(step + jnp.log(-jnp.expm1(-step)), axes=("heads",))
        rates = jnp.broadcast_to(jnp.arange(1.0, options.state + 1), (inner, options.state))
        self.log_rate = nnx.Param(jnp.log(rates), axes=("heads", "head"))
        self.skip = nnx.Param(jnp.ones(inner, jnp.float32), axes=("heads",))
        self.out = Linear(inner, width, ("heads", "embed"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        (u,), run = self.begin([self.input(x)], segments, state, self.conv_bias[...])
        u = jax.nn.silu(u)
        rank, states = self.options.step_rank, self.options.state
        step, b, c = jnp.split(self.select(u), [rank, rank + states], axis=-1)
        step = jax.nn.softplus(self.step(step).astype(jnp.float32) + self.step_bias[...])
        y, state = run(SELECTIVE_SCAN, u, step, b, c, parameters=(-jnp.exp(self.log_rate[...]),))
        return self.out((y + self.skip[...].astype(x.dtype) * u) * jax.nn.silu(self.gate(x))), state
