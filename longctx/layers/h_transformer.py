"""H-Transformer-1D (Zhu and Soricut, 2021) as a causal mixer: the further back, the more tokens are seen as one.

Group: hierarchical and adaptive attention
Transition: the last nodes of every level
Devices: log₂P hops of the state
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Projections, Taps, document
from longctx.ops import h_transformer as ops
from longctx.parallel import sequence
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HTransformerState:
    """Sums of 1, key and value over the last 2 N nodes of each level, float32; the last inputs of the convolution."""

    nodes: Float[Array, "B L R G K+V+1"]
    conv: Float[Array, "B W-1 C"] | None


class HTransformer(Projections):
    """Softmax attention to a document's own and previous block of N tokens, and to means of all before them.

    A query sees 2^l tokens as one, by the means of their keys and values, if they end N/2 2^l tokens back or more: each
    token once, at one of L levels. A mean counts for its tokens; levels above 0 have a bias per head that begins at 0.
    A mean of keys has no one position, so there are no rotary ones; the convolution tells the order of neighbours.
    State: `[B, L, 2N, G, K+V+1]` float32, and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Projections.Config):
        block: int = 4  # N, even: tokens a block, the paper's N_r, which has 16
        levels: int = 8  # L; documents of up to N 2^L tokens are seen whole
        conv_width: Taps = 4  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            yield from super().problems()
            if self.block < 2 or self.block % 2:
                yield f"block is {self.block}; give an even number of at least 2"
            if not 1 <= self.levels <= 30:
                yield f"levels is {self.levels}; give 1 to 30"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options, rngs)
        self.bias = nnx.Param(jnp.zeros((options.heads, options.levels - 1)), axes=("heads", None))

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: HTransformerState | None = None
    ):
        """Returns `(y[B, T, D], HTransformerState)`."""
        segments = document(segments, x, state)
        options = self.options
        q, k, v, tail = self.project(x, segments, None if state is None else state.conv)
        y, nodes = sequence.run(
            ops.H_TRANSFORMER,
            (q, k, v),
            (self.bias[...],),
            None if state is None else state.nodes,
            segments=segments,
            options=ops.Options(options.block),
        )
        return self.back(x, y), HTransformerState(nodes, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> HTransformerState:
        """The state before any token; `capacity` does not matter."""
        options = self.options
        shape = batch, options.levels, 2 * options.block, options.kv_heads, 2 * options.head_width + 1
        tail = None if self.conv is None else self.conv.init_state(batch)
        return HTransformerState(jnp.zeros(shape, jnp.float32), tail)
