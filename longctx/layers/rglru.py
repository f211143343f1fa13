"""The real-gated linear recurrent unit of Griffin (De et al., 2024) as a mixer.

Group: diagonal state spaces and recurrences
Transition: s ↦ a ⊙ s + b
Devices: log₂P hops of 2·N
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, ShortConv, State, document
from longctx.layers.recurrent import Recurrent, by_head
from longctx.ops.backend import scaled
from longctx.ops.linear_scan import LINEAR_SCAN
from longctx.schema import Options, Size
from longctx.typing import Segments

_RATE = 8.0  # c of the paper: log a = -c softplus(Λ) r


class RGLRU(Recurrent):
    """A diagonal linear recurrence whose decay and input depend on the token.

    With u the convolved branch, r = σ(u W_r + b_r) and i = σ(u W_i + b_i) (block-diagonal W):
    log a = -c softplus(Λ) r;  h_t = a h_{t-1} + √(1 - a²) (i ⊙ u);  y = (h ⊙ gelu(x W_g)) W_out.
    The first token of a document enters whole (factor 1 in place of √(1 - a²)). State: `[B, N]` float32.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        hidden: Size = 128  # N
        heads: Size = 4  # blocks of the gates' projections; divides N
        conv_width: Size = 4  # taps of the convolution

        def problems(self):
            if self.hidden % self.heads:
                yield f"hidden is {self.hidden} and heads is {self.heads}; heads must divide hidden"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        hidden, heads = options.hidden, options.heads
        self.branch = Linear(width, hidden, ("embed", "heads"), rngs)
        self.gate = Linear(width, hidden, ("embed", "heads"), rngs)
        self.conv = ShortConv(options.conv_width, [0] * hidden, rngs)
        block = (heads, hidden // heads, hidden // heads)
        normal = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
        names = ("heads", "block", "block_out")
        self.recurrence_gate = nnx.Param(normal(rngs.params(), block, jnp.float32), axes=names, decays=True)
        self.recurrence_bias = nnx.Param(jnp.zeros(hidden, jnp.float32), axes=("heads",))
        self.input_gate = nnx.Param(normal(rngs.params(), block, jnp.float32), axes=names, decays=True)
        self.input_bias = nnx.Param(jnp.zeros(hidden, jnp.float32), axes=("heads",))
        # a^c, the decay at r = 1, uniform in [0.9, 0.999] (section 2.4 of the paper).
        decay = jax.random.uniform(rngs.params(), (hidden,), minval=0.9, maxval=0.999)
        self.rate = nnx.Param(jnp.log(jnp.expm1(-jnp.log(decay) / _RATE)), axes=("heads",))
        self.out = Linear(hidden, width, ("heads", "embed"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        (u,), run = self.begin([self.branch(x)], segments, state)
        u = u.astype(jnp.float32)
        blocks = by_head(u, self.options.heads)

        def gate(weight, bias):
            y = jnp.einsum("bthi,hij->bthj", blocks, weight[...]).reshape(u.shape)
            return jax.nn.sigmoid(y + bias[...])

        r = gate(self.recurrence_gate, self.recurrence_bias)
        i = gate(self.input_gate, self.input_bias)
        log_decay = scaled(r, -_RATE * jax.nn.softplus(self.rate[...]))
        # 1 - a² by expm1, which keeps its digits where a is near 1; the floor keeps the root's gradient finite.
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_decay), 1e-12))
        scale = jnp.where(segments.starts[..., None], 1.0, scale)
        y, state = run(LINEAR_SCAN, scale * i * u, log_decay)
        return self.out(y.astype(x.dtype) * jax.nn.gelu(self.gate(x))), state
