"""TTT-Linear (Sun et al., 2024) as a mixer.

Group: fast weights and test-time training
Transition: none: the state does not compose
Devices: P-1 hops of the state, device after device
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import LayerNorm, Linear, ShortConv, State, document, undo_values
from longctx.layers.positions import ROPE, Positions
from longctx.layers.recurrent import Recurrent, by_head, flat
from longctx.ops.ttt_linear import TTT_LINEAR
from longctx.schema import Options, Size
from longctx.typing import Segments


class TTTLinear(Recurrent):
    """Each head is a linear model with a norm that is trained on the document, C tokens at a time.

    f(x) = x + LN(x W + b) is trained to map k to v, by gradients at the weights the mini-batch starts from, at the rate
    r = η σ(x W_r + b_r) / K. f of q, the t-th of its mini-batch, has the steps of the tokens up to q's, which count
    max(1/t + o_t, 0). q and k are one projection after two convolutions, rotated by their positions in the mini-batch;
    v is a projection. The output is LN over all heads, gated by gelu(x W_g), and projected.
    State: the change of (W, b) and the sum of the mini-batch in progress, `[B, H, K+1, K]` each, and W-1 inputs of the
    convolutions.

    As the authors' TTT-Linear in the Mamba backbone, whose results on the same weights are a golden of the tests. Not
    as theirs: the initial values of projections and convolutions (`layers/basic.py`), and a rotation of the two halves
    of a head in place of neighbouring channels, which is the same up to an order of channels.

    Source: Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024; section 2.7 and
    the authors' program.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        head_width: Size = 16  # K, of keys and values
        minibatch: Size = 16  # C, tokens per update
        rate: float = 1.0  # η
        conv_width: Size = 4  # taps of the convolutions
        positions: Positions = ROPE  # rotary ones of `layers/positions.py`, or {"kind": "nope"}

        def problems(self):
            if self.rate < 0:
                yield f"rate is {self.rate}; it must not be negative"
            yield from self.positions.rotary(self.head_width)

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        heads, size = options.heads, options.head_width
        channels = heads * size
        self.query_key = Linear(width, channels, ("embed", "heads"), rngs)
        self.value = Linear(width, channels, ("embed", "heads"), rngs)
        self.conv = ShortConv(options.conv_width, [0] * channels + [1] * channels, rngs)
        self.conv_bias = nnx.Param(jnp.zeros(2 * channels, jnp.float32), axes=("heads",))
        self.rate = Linear(width, heads, ("embed", "heads"), rngs, bias=0.0)
        initial = 0.02 * jax.random.normal(rngs.params(), (heads, size + 1, size), jnp.float32)
        self.initial = nnx.Param(initial.at[:, -1].set(0), axes=("heads", "head", None))
        self.scale = nnx.Param(jnp.ones((heads, size), jnp.float32), axes=("heads", "head"))
        self.shift = nnx.Param(jnp.zeros((heads, size), jnp.float32), axes=("heads", "head"))
        self.discount = nnx.Param(jnp.zeros(options.minibatch, jnp.float32), axes=(None,))  # o
        self.norm = LayerNorm(channels, ("heads",))
        self.gate = Linear(width, channels, ("embed", "heads"), rngs)
        self.out = Linear(channels, width, ("heads", "embed"), rngs, initial=undo_values(self.value, heads, size))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        options = self.options
        # Both convolutions are of one projection: its last inputs are kept once.
        if state is not None:
            state = State(state.memory, jnp.concatenate([state.conv] * 2, axis=-1))
        parts, run = self.begin([self.query_key(x)] * 2, segments, state, self.conv_bias[...])
        q, k, v = (by_head(part, options.heads) for part in (*parts, self.value(x)))
        within = dataclasses.replace(segments, positions=segments.positions % options.minibatch)
        q, k = options.positions.rotate(q, k, within)
        rate = options.rate / options.head_width * jax.nn.sigmoid(self.rate(x).astype(jnp.float32))
        discount = 1 / jnp.arange(1, options.minibatch + 1, dtype=jnp.float32) + self.discount[...]
        parameters = self.initial[...], self.scale[...], self.shift[...], jnp.maximum(discount, 0)
        y, state = run(TTT_LINEAR, q, k, v, rate, parameters=parameters)
        state = State(state.memory, jnp.split(state.conv, 2, axis=-1)[0])
        return self.out(self.norm(flat(y)) * jax.nn.gelu(self.gate(x))), state
