"""H-Transformer-1D (Zhu and Soricut, 2021) as a causal mixer: the further back, the more tokens are seen as one.

Group: hierarchical and adaptive attention
Transition: the last nodes of every level
Devices: log₂P hops of the state
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Projections, Taps, document
from longctx.layers.recurrent import Recurrent, State, flat
from longctx.ops import h_transformer as ops
from longctx.parallel import sequence
from longctx.schema import Options, Size
from longctx.typing import Segments


class HTransformer(Projections, Recurrent):
    """Softmax attention to a document's own and previous block of N tokens, and to means of all before them.

    2^l tokens are one to a query, by the means of their keys and values, if they end N/2 2^l tokens back or more: each
    token once, at one of L levels. A mean counts for its tokens; levels above 0 have a bias per head that begins at 0.
    A mean of keys has no one position, so there are no rotary ones; the convolution tells the order of neighbours.
    State: `[B, L, 2N, G, K+V+1]` float32, and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        kv_heads: Size = 4  # G, divides H
        head_width: Size = 32  # K and V
        block: int = 4  # N, even: tokens a block, the paper's N_r, which has 16
        levels: int = 8  # L; documents of up to N 2^L tokens are visible whole
        conv_width: Taps = 4  # taps of a causal convolution on queries, keys and values; 0: none
        qk_norm: bool = True  # RMS norm of queries and keys, per head, with learned scales

        def problems(self):
            if self.heads % self.kv_heads:
                yield f"heads is {self.heads} and kv_heads is {self.kv_heads}; kv_heads must divide heads"
            if self.block < 2 or self.block % 2:
                yield f"block is {self.block}; give an even number of at least 2"
            if not 1 <= self.levels <= 30:
                yield f"levels is {self.levels}; give 1 to 30"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options, rngs)
        self.width = width
        self.bias = nnx.Param(jnp.zeros((options.heads, options.levels - 1)), axes=("heads", None))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        memory, tail = (None, None) if state is None else (state.memory, state.conv)
        q, k, v, tail = self.project(x, segments, tail)
        y, nodes = sequence.recurrence(
            ops, q, k, v, parameters=(self.bias[...],), state=memory, segments=segments, block=self.options.block
        )
        return self.out(flat(y)), State(nodes, tail)
