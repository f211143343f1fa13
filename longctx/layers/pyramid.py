"""Pyramid attention in the manner of Pyraformer (Liu et al., 2022) as a causal mixer.

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
from longctx.ops import pyramid as ops
from longctx.parallel import sequence
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PyramidState:
    """Weighted sums of 1, key and value over the last R nodes of each level, float32; the convolution's last inputs."""

    nodes: Float[Array, "B L R G K+V+1"]
    conv: Float[Array, "B W-1 C"] | None


class Pyramid(Projections):
    """Softmax attention to the last W tokens, and at each level above to the last W summaries of older ones.

    A node of level l attends to c nodes of the level below, and so summarises c^l tokens. The query of that attention
    is a vector per head that begins at 0, which gives plain means; levels above 0 have a bias per head that begins at
    0, too. A summary has no one position, so there are no rotary ones; the convolution tells the order of neighbours.
    State: `[B, L, R, G, K+V+1]` float32 with R = W + max(c - 1, 1 + ⌈(W - 1) / c⌉), and W-1 inputs of the convolution.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Projections.Config):
        children: int = 4  # c, nodes of one level that a node of the next summarises
        window: int = 8  # W, tokens that are seen one by one, and nodes of each level above; at least c - 1
        levels: int = 5  # L, tokens included; W c^(L-1) tokens back are seen
        conv_width: Taps = 4  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            yield from super().problems()
            if self.children < 2:
                yield f"children is {self.children}; give at least 2"
            elif self.window < self.children - 1:
                yield (
                    f"window is {self.window} and children is {self.children}; give a window of at least children - 1, "
                    "or what no whole node holds is seen at no level"
                )
            if not (1 <= self.levels <= 30 and self.children ** (self.levels - 1) < 2**30):
                yield f"levels is {self.levels}; give at least 1, and nodes of fewer than 2^30 tokens"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options, rngs)
        self.pool = nnx.Param(jnp.zeros((options.kv_heads, options.head_width)), axes=("heads", "head"))
        self.bias = nnx.Param(jnp.zeros((options.heads, options.levels - 1)), axes=("heads", None))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: PyramidState | None = None):
        """Returns `(y[B, T, D], PyramidState)`."""
        segments = document(segments, x, state)
        options = self.options
        q, k, v, tail = self.project(x, segments, None if state is None else state.conv)
        y, nodes = sequence.run(
            ops.PYRAMID,
            (q, k, v),
            (self.pool[...], self.bias[...]),
            None if state is None else state.nodes,
            segments=segments,
            options=ops.Options(options.children, options.window),
        )
        return self.back(x, y), PyramidState(nodes, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> PyramidState:
        """The state before any token; `capacity` does not matter."""
        options = self.options
        slots = ops.slots(options.children, options.window)
        shape = batch, options.levels, slots, options.kv_heads, 2 * options.head_width + 1
        tail = None if self.conv is None else self.conv.init_state(batch)
        return PyramidState(jnp.zeros(shape, jnp.float32), tail)
