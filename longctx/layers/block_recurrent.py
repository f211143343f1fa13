"""The Block-Recurrent Transformer's layer (Hutchins et al., 2022) as a mixer.

Group: softmax attention
Transition: none: the state does not compose
Devices: a halo of W-1 keys and values; device after device, R·D + 4·W·H·K
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.attention import attend
from longctx.layers.basic import Linear, State, Taps, convolved, document, empty_tail, l2_normalise, short_conv
from longctx.layers.positions import ROPE, Positions
from longctx.layers.recurrent import projections
from longctx.memory.store import ATTENDED, Leaf, Ring, Store, extend, heads
from longctx.ops import block_recurrent as ops
from longctx.ops.patterns import Causal, Window
from longctx.parallel import sequence
from longctx.schema import Options, Size
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockRecurrentState:
    """Keys and values of the last `block` tokens; the state vectors and the block in progress, float32."""

    cache: Store
    cell: ops.State


class BlockRecurrent(nnx.Module):
    """Softmax attention in a window of `block` tokens, and to state vectors that are updated once per block.

    y = window(q, k, v) W_o + cell(q', k, v) W_c, with the cell of `ops/block_recurrent.py`, which shares k and v
    with the window; q, q' and k have norm 1, and logits a learned scale per head and use. The window's positions are
    rotary, the cell has none. State: 2 [B, W, H, K] in a cache, and float32 vectors [B, R, D] and 2 [B, 2 W, H, K],
    W = `block`.

    As the authors' layer in the "skip" configuration, whose cell on the same weights is a golden of the tests. Not as
    theirs: rotary positions in place of T5's biases; a token sees itself and W-1 before, where theirs sees W before and
    not itself; at a document's start vectors read the tokens that there are, where theirs also read W keys of zero;
    the scales begin at sqrt(K), not 1, where no key of 16 could get more than a third of the weight; the initial values
    of the tokens' projections (`layers/basic.py`). Their other gates and an MLP in the cell are left out.

    Source: Hutchins et al., "Block-Recurrent Transformers", 2022 (arXiv:2203.07852), and the authors' program.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        head_width: Size = 32  # K
        block: Size = 16  # W, tokens between two updates of the state vectors, and of the window
        vectors: Size = 8  # R
        gate: str = "fixed"  # of the vectors: "fixed", the same at every update, or "lstm", by what was read
        positions: Positions = ROPE  # in the window, rotary ones of `layers/positions.py`, or {"kind": "nope"}
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if self.gate not in ("fixed", "lstm"):
                yield f"gate is '{self.gate}'; give 'fixed' or 'lstm'"
            yield from self.positions.rotary(self.head_width)

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        shape = options.heads, options.head_width
        keys = options.heads * options.head_width
        self.query, self.key, self.value, self.out = projections(width, *shape, options.head_width, rngs)
        self.cell_query = Linear(width, keys, ("embed", "heads"), rngs)
        self.cell_out = Linear(keys, width, ("heads", "embed"), rngs)
        self.conv = short_conv(options.conv_width, [0] * keys + [1] * keys + [0] * 2 * keys, rngs)
        normal = jax.nn.initializers.normal(width**-0.5)
        self.initial = nnx.Param(
            0.1 * jax.random.normal(rngs.params(), (options.vectors, width)), axes=("taps", "width")
        )
        # Apart from each other from the start, or the vectors would all learn the same.
        self.identity = nnx.Param(jax.random.normal(rngs.params(), (options.vectors, width)), axes=("taps", "width"))
        self.scale = nnx.Param(jnp.ones(width), axes=("width",))
        for name in ("cell_key", "cell_value", "query_states", "query_tokens"):
            weight = nnx.Param(normal(rngs.params(), (width, *shape)), axes=("embed", "heads", "head"), decays=True)
            setattr(self, name, weight)
        # Of the window, of tokens to vectors, of vectors among themselves, and of vectors to tokens.
        self.sharpness = nnx.Param(jnp.full((4, options.heads), options.head_width**0.5), axes=(None, "heads"))
        mixed = (2 * keys) ** -0.5 * jax.random.normal(rngs.params(), (2, *shape, width))
        self.update = nnx.Param(mixed, axes=("taps", "heads", "head", "embed"), decays=True)
        learned = options.gate == "lstm"
        self.gate = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1 + learned, width)), axes=(None, "width"))
        mixed = (20 * keys) ** -0.5 * jax.random.normal(rngs.params(), (2, 2, *shape, width))
        axes = (None, "taps", "heads", "head", "embed")
        self.gate_out = nnx.Param(mixed, axes=axes, decays=True) if learned else None

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: BlockRecurrentState | None = None
    ):
        """Returns `(y[B, T, D], BlockRecurrentState)`."""
        segments = document(segments, x, state)
        batch, length, _ = x.shape
        options = self.options
        parts = self.query(x), self.key(x), self.value(x), self.cell_query(x)
        parts, state, tail = convolved(self.conv, parts, segments, state)
        q, k, v, asked = (part.reshape(batch, length, options.heads, options.head_width) for part in parts)
        near, asking, *of_cell = jnp.abs(self.sharpness[...])
        q, k, asked = l2_normalise(q) * _of_heads(near, q), l2_normalise(k), l2_normalise(asked) * _of_heads(asking, q)
        weights = self.initial, self.identity, self.scale, self.cell_key, self.cell_value, self.query_states
        cell = ops.Cell(
            *(weight[...] for weight in (*weights, self.query_tokens)),
            sharpness=jnp.stack(of_cell),
            out=self.update[...],
            gate=self.gate[...],
            gate_out=None if self.gate_out is None else self.gate_out[...],
        )
        before = None if state is None else state.cell
        recalled, after = sequence.run(
            ops.BLOCK_RECURRENT, (asked, k, v), cell, before, segments=segments, options=ops.Options(options.block)
        )
        q, k = options.positions.rotate(q, k, segments)
        pattern = Causal() & Window(options.block)
        if state is None:
            cache, held = self._empty(batch, x.dtype).append((k, v), segments), None
        else:
            ((k, v), held), segments, cache = extend(state.cache, (k, v), segments)
        near = attend(q, k, v, pattern, segments, held, scale=1.0)
        y = self.out(near.reshape(batch, length, -1)) + self.cell_out(recalled.reshape(batch, length, -1))
        return y, State(BlockRecurrentState(cache, after), tail)

    def leaves(self, dtype) -> tuple[Leaf, ...]:
        """What a token leaves behind: its key and its value."""
        return heads(self.options.heads, self.options.head_width, dtype, ATTENDED)

    def _empty(self, batch: int, dtype) -> Store:
        return Ring().make(self.leaves(dtype), batch, 0, reach=self.options.block - 1)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> BlockRecurrentState:
        """The state before any token; `capacity` does not matter."""
        options = self.options
        block = jnp.zeros((batch, 2 * options.block, options.heads, options.head_width), jnp.float32)
        cell = ops.State(jnp.zeros((batch, *self.initial.shape), jnp.float32), block, block)
        return State(BlockRecurrentState(self._empty(batch, dtype), cell), empty_tail(self.conv, batch))


def _of_heads(scale, like):
    return scale[:, None].astype(like.dtype)
