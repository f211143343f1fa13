"""H-Transformer-1D (Zhu and Soricut, 2021) as a causal mixer: the further back, the more tokens count as one.

Group: hierarchical and adaptive attention
Transition: the last nodes of every level
Devices: log₂P hops of the state
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Projections, State, Taps, document
from longctx.layers.recurrent import Recurrent
from longctx.ops import h_transformer as ops
from longctx.typing import Segments


class HTransformer(Projections, Recurrent):
    """Softmax attention to a document's own and previous block of N tokens, and to means of all before them.

    2^l tokens are one to a query, by the means of their keys and values, if they end N/2 2^l tokens back or more: each
    token once, at one of L levels. A mean counts for its tokens; levels above 0 have a bias per head that begins at 0.
    A mean of keys has no one position, so there are no rotary ones; the convolution tells the order of neighbours.
    State: `[B, L, 2N, G, K+V+1]` float32, and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Projections.Config):
        block: int = 4  # N, even: tokens a block, the paper's N_r, which has 16
        levels: int = 8  # L; documents of up to N 2^L tokens are visible whole
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

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        (q, k, v), run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        q, k, v = self.heads(q, self.query_norm), self.heads(k, self.key_norm), self.heads(v, None)
        y, state = run(ops.H_TRANSFORMER, q, k, v, parameters=(self.bias[...],), block=self.options.block)
        return self.back(x, y), state
