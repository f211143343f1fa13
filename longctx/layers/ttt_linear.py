"""TTT-Linear (Sun et al., 2024) as a mixer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, RMSNorm, ShortConv, l2_normalise, like_queries, undo_values
from longctx.ops import ttt_linear as ops
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TTTLinearState:
    """What the heads' models have learned from the document, float32, and the last inputs of the convolution."""

    model: ops.State
    conv: Float[Array, "B W-1 C"]


class TTTLinear(nnx.Module):
    """Each head is a linear model with a norm that is trained on the document, C tokens at a time.

    f(x) = x + LN(x W + b) is trained to map k to v, by gradients at the weights the mini-batch starts from, at the rate
    r = η σ(x W_r) / K; q is put to the weights that have seen the mini-batch up to q's token. q, k, v come from a
    projection and a short convolution; q and k are normalised. The output is normalised per head and gated by
    gelu(x W_g). State: the change of (W, b) and the sum of the mini-batch in progress, `[B, H, K+1, K]` each, and
    W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        head_width: int = 16  # K, of keys and values
        minibatch: int = 16  # C, tokens per update
        rate: float = 1.0  # η
        conv_width: int = 4  # taps of the convolution

        def problems(self):
            if min(self.heads, self.head_width, self.minibatch, self.conv_width) < 1:
                yield f"heads, head_width, minibatch and conv_width must be at least 1, given {self}"
            if self.rate < 0:
                yield f"rate is {self.rate}; it must not be negative"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        heads, size = options.heads, options.head_width
        channels = heads * size
        self.query = Linear(width, channels, ("embed", "heads"), rngs)
        self.key = Linear(width, channels, ("embed", "heads"), rngs, initial=like_queries(self.query, heads, size))
        self.value = Linear(width, channels, ("embed", "heads"), rngs)
        self.conv = ShortConv(options.conv_width, [0] * channels + [1] * channels + [0] * channels, rngs)
        self.rate = Linear(width, heads, ("embed", "heads"), rngs)
        initial = 0.02 * jax.random.normal(rngs.params(), (heads, size + 1, size), jnp.float32)
        self.initial = nnx.Param(initial.at[:, -1].set(0), axes=("heads", "head", None))
        self.scale = nnx.Param(jnp.ones((heads, size), jnp.float32), axes=("heads", "head"))
        self.shift = nnx.Param(jnp.zeros((heads, size), jnp.float32), axes=("heads", "head"))
        self.discount = nnx.Param(1 / (1 + jnp.arange(options.minibatch, dtype=jnp.float32)), axes=(None,))
        self.norm = RMSNorm(size, ("head",))
        self.gate = Linear(width, channels, ("embed", "heads"), rngs)
        self.out = Linear(channels, width, ("heads", "embed"), rngs, initial=undo_values(self.value, heads, size))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments, state: TTTLinearState | None = None):
        """Returns `(y[B, T, D], TTTLinearState)`."""
        options = self.options
        batch, length, _ = x.shape
        parts = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        parts, tail = self.conv(parts, segments, None if state is None else state.conv)
        q, k, v = jnp.split(parts.reshape(batch, length, 3 * options.heads, -1), 3, axis=2)
        rate = options.rate / options.head_width * jax.nn.sigmoid(self.rate(x).astype(jnp.float32))
        parameters = (self.initial[...], self.scale[...], self.shift[...], jnp.maximum(self.discount[...], 0))
        y, model = sequence.recurrence(
            ops, l2_normalise(q), l2_normalise(k), v, rate,
            parameters=parameters, state=None if state is None else state.model, segments=segments,
        )  # fmt: skip
        y = self.norm(y).reshape(batch, length, -1) * jax.nn.gelu(self.gate(x))
        return self.out(y), TTTLinearState(model, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> TTTLinearState:
        """Nothing learned; `capacity` does not matter."""
        options = self.options
        zeros = jnp.zeros((batch, options.heads, options.head_width + 1, options.head_width), jnp.float32)
        return TTTLinearState(ops.State(zeros, zeros), self.conv.init_state(batch))
