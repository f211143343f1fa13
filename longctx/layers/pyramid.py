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

from longctx.layers.basic import Projections, State, Taps, document
from longctx.layers.recurrent import Recurrent
from longctx.ops import pyramid as ops
from longctx.typing import Segments


class Pyramid(Projections, Recurrent):
    """Softmax attention to the last W tokens, and at each level above to the last W summaries of older ones.

    A node of level l attends to c nodes of the level below, and so summarises c^l tokens. The query of that attention
    is a vector per head that begins at 0, which gives plain means; levels above 0 have a bias per head that begins at
    0, too. A summary has no one position, so there are no rotary ones; the convolution tells the order of neighbours.
    State: `[B, L, R, G, K+V+1]` float32 with R = W + max(c - 1, 1 + ⌈(W - 1) / c⌉), and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Projections.Config):
        children: int = 4  # c, nodes of one level that a node of the next summarises
        window: int = 8  # W, tokens that are visible one by one, and nodes of each level above; at least c - 1
        levels: int = 5  # L, tokens included; W c^(L-1) tokens back are visible
        conv_width: Taps = 4  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            yield from super().problems()
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
        self.pool = nnx.Param(jnp.zeros((options.kv_heads, options.head_width)), axes=("heads", "head"))
        self.bias = nnx.Param(jnp.zeros((options.heads, options.levels - 1)), axes=("heads", None))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        (q, k, v), run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        q, k, v = self.heads(q, self.query_norm), self.heads(k, self.key_norm), self.heads(v, None)
        parameters, options = (self.pool[...], self.bias[...]), self.options
        y, state = run(ops.PYRAMID, q, k, v, parameters=parameters, children=options.children, window=options.window)
        return self.back(x, y), state
