"""Pyramid attention in the manner of Pyraformer (Liu et al., 2022) as a causal mixer.

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
from longctx.ops import pyramid as ops
from longctx.parallel import sequence
from longctx.schema import Options, Size
from longctx.typing import Segments


class Pyramid(Projections, Recurrent):
    """Softmax attention to the last W tokens, and at each level above to the last W summaries of older ones.

    A node of level l attends to c nodes of the level below, and so summarises c^l tokens. The query of that attention
    is a vector per head that begins at 0, which gives plain means; levels above 0 have a bias per head that begins at
    0, too. A summary has no one position, so there are no rotary ones; the convolution tells the order of neighbours.
    State: `[B, L, R, G, K+V+1]` float32 with R = W + max(c - 1, 1 + ⌈(W - 1) / c⌉), and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        kv_heads: Size = 4  # G, divides H
        head_width: Size = 32  # K and V
        children: int = 4  # c, nodes of one level that a node of the next summarises
        window: int = 8  # W, tokens that are visible one by one, and nodes of each level above; at least c - 1
        levels: int = 5  # L, tokens included; W c^(L-1) tokens back are visible
        conv_width: Taps = 4  # taps of a causal convolution on queries, keys and values; 0: none
        qk_norm: bool = True  # RMS norm of queries and keys, per head, with learned scales

        def problems(self):
            if self.heads % self.kv_heads:
                yield f"heads is {self.heads} and kv_heads is {self.kv_heads}; kv_heads must divide heads"
            if self.children < 2:
                yield f"children is {self.children}; give at least 2"
            elif self.window < self.children - 1:
                yield (
                    f"window is {self.window} and children is {self.children}; give a window of at least children - 1, "
                    "or what no whole node holds is visible at no level"
                )
            if not (1 <= self.levels <= 30 and self.children ** (self.levels - 1) < 2**30):
                yield f"levels is {self.levels}; give at least 1, and nodes of fewer than 2^30 tokens"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options, rngs)
        self.width = width
        self.pool = nnx.Param(jnp.zeros((options.kv_heads, options.head_width)), axes=("heads", "head"))
        self.bias = nnx.Param(jnp.zeros((options.heads, options.levels - 1)), axes=("heads", None))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        memory, tail = (None, None) if state is None else (state.memory, state.conv)
        q, k, v, tail = self.project(x, segments, tail)
        y, nodes = sequence.recurrence(
            ops, q, k, v, parameters=(self.pool[...], self.bias[...]), state=memory, segments=segments,
            children=self.options.children, window=self.options.window,
        )  # fmt: skip
        return self.out(flat(y)), State(nodes, tail)
