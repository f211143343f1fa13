"""sLSTM of xLSTM (Beck et al., 2024) as a mixer.

Group: diagonal state spaces and recurrences
Transition: none: the state does not compose
Devices: P-1 hops of 4·H·K, device after device: no faster than one
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.errors import UsageError
from longctx.layers.basic import Linear, ShortConv, State
from longctx.layers.recurrent import Recurrent, by_head, flat, standardised
from longctx.ops import slstm as ops
from longctx.ops.backend import scaled
from longctx.schema import Options, Size
from longctx.typing import Segments


class SLSTM(Recurrent):
    """A recurrence with memory mixing: the gates of a head see all its last outputs, by matrices R.

    With u = silu(conv(x) + b), the pre-activations are i: u W_i, f: u W_f, z: x W_z, o: x W_o, each with a bias and
    h_{t-1} R added; i = exp, f = σ, z = tanh, o = σ of theirs;
    c_t = f c_{t-1} + i z;  n_t = f n_{t-1} + i;  h_t = o c_t / n_t;  y = norm(h) W. All W of the gates are
    block-diagonal: head h reads the channels h D/H to (h+1) D/H. The norm is a layer norm per head without a shift, its
    scale per channel.

    What differs: the last W, as H K need not be D; the authors' layer, where it is, has none (the identity); and the
    biases' initial values.
    Devices that share a sequence take turns. State: four `[B, H, K]` float32, and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        head_width: Size = 16  # K
        conv_width: Size = 4  # taps of the convolution in front of the input and forget gates

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        heads, head = options.heads, options.head_width
        if width % heads:
            raise UsageError(f"heads is {heads} and the model's width is {width}; heads must divide it.")
        self.conv = ShortConv(options.conv_width, [0] * width, rngs, axis="width")
        self.conv_bias = nnx.Param(jnp.zeros(width, jnp.float32), axes=("width",))
        blocks = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0, 1))
        blocks = blocks(rngs.params(), (4, heads, width // heads, head), jnp.float32)
        self.input = nnx.Param(blocks, axes=(None, "heads", "block", "block_out"), decays=True)
        # The heads' memories begin with spans of 10 to 1,000 tokens.
        forget = jnp.geomspace(1e-3, 1e-1, heads)
        bias = jnp.zeros((4, heads, head)).at[1].set((jnp.log1p(-forget) - jnp.log(forget))[:, None])
        self.bias = nnx.Param(bias, axes=(None, "heads", "head"))
        self.recurrent = nnx.Param(
            jnp.zeros((4, heads, head, head)), axes=(None, "heads", "block", "block_out"), decays=True
        )
        self.norm_scale = nnx.Param(jnp.ones(heads * head), axes=("heads",))
        self.out = Linear(heads * head, width, ("heads", "embed"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        (u,), run = self.begin([x], segments, state, self.conv_bias[...])
        u = jax.nn.silu(u)
        blocks = (by_head(part, self.options.heads) for part in (u, u, x, x))
        gates = [
            jnp.einsum("bthi,hij->bthj", *pair) for pair in zip(blocks, self.input[...].astype(x.dtype), strict=True)
        ]
        gates = jnp.stack(gates, axis=2).astype(jnp.float32) + self.bias[...]
        y, state = run(ops.SLSTM, gates, parameters=(self.recurrent[...],))
        return self.out(scaled(flat(standardised(y, 1e-5)), self.norm_scale[...]).astype(x.dtype)), state
