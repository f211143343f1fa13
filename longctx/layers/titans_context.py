"""Titans (Behrouz et al., 2025) with the memory as context, as a mixer.

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

from longctx.layers.basic import RMSNorm, State, document
from longctx.layers.recurrent import by_head, projections, qkv_conv
from longctx.layers.titans import NeuralMemory
from longctx.ops import titans_context as ops
from longctx.schema import Options, Size
from longctx.typing import Segments


class TitansContext(NeuralMemory):
    """Attention within segments, which also reads what a neural memory of the earlier segments recalls.

    With M the memory of `layers/titans.py`, C tokens a segment and p learned tokens that all others read,

        h = M(x), n = norm(attention([p; h; x])), y = n ⊙ σ(norm(M'(n)))

    where M is as the segments before have left it, M' has also learned n up to the token, and each norm has a learned
    scale per channel. The attention has no positions but a short convolution of its queries, keys and values.
    State: for each layer of the memory the weights, those at the segment's start, and the surprise, `[B, H, ...]`;
    keys and values of h and x in the segment, 4 `[B, C, H, K]`; all float32; and W-1 inputs of the convolution.

    There is no program of the authors'. As the paper has it, sections 4.1 and 4.4, but for these: attention is causal
    in h as in x, and the output is gated by the weights at the token (`ops/titans_context.py` says why); the memory's
    queries, keys and values have no convolution, since its keys are made of n, which needs the memory; the attention's
    have no SiLU and no norm; the rate is bounded for a segment, for its tokens are much alike; the gate's
    non-linearity and norms are those that section 4.2 gives for the memory as a gate.

    Source: Behrouz et al., "Titans: Learning to Memorize at Test Time", 2025 (arXiv:2501.00663).
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 2  # H
        head_width: Size = 16  # K, of keys and values
        depth: int = 2  # layers of the memory: 1 or 2
        hidden: Size = 16  # width between the two layers
        segment: Size = 16  # C, tokens that attend to each other, and whose gradients are taken at the same weights
        persistent: int = 4  # learned tokens that all others read
        rate: float = 0.25  # largest C θ / (1 - η), of a segment's steps together; 0.64 diverged
        conv_width: Size = 4  # taps of the convolution

        def problems(self):
            if self.depth not in (1, 2):
                yield f"depth is {self.depth}; give 1 or 2"
            if min(self.rate, self.persistent) < 0:
                yield f"rate and persistent must not be negative, given {self}"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        shape = options.heads, options.head_width, options.head_width
        # Of the attention.
        self.query, self.key, self.value, self.out = projections(width, *shape, rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        tokens = jax.random.normal(rngs.params(), (options.persistent, width))
        self.persistent = nnx.Param(tokens, axes=("taps", "embed"))
        self.norm = RMSNorm(width)
        # Of the memory.
        self.ask, self.write, self.content, self.recall = projections(width, *shape, rngs)
        self.recall_norm = RMSNorm(options.head_width, ("head",))
        self.gate_norm = RMSNorm(width)
        self._make_memory(rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        heads = self.options.heads
        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)

        def to_heads(linear):
            return linear.weight[...].reshape(self.width, heads, -1)

        def back(linear):
            return linear.weight[...].reshape(heads, -1, self.width)

        gates = self.forget, self.momentum, self.rate
        cell = ops.Cell(
            initial=self._initial,
            query=to_heads(self.ask),
            key=to_heads(self.write),
            value=to_heads(self.content),
            gates=jnp.stack([gate.weight[...] for gate in gates]),
            biases=jnp.stack([self.forget_bias[...], self.momentum.bias[...], self.rate.bias[...]]),
            scale=self.recall_norm.scale[...],
            out=back(self.recall),
            persistent=self.persistent[...],
            near_key=to_heads(self.key),
            near_value=to_heads(self.value),
            near_out=back(self.out),
            near_scale=self.norm.scale[...],
            gate_scale=self.gate_norm.scale[...],
        )
        q, k, v = (by_head(part, heads) for part in parts)
        return run(
            ops.TITANS_CONTEXT, x, q, k, v, parameters=cell, segment=self.options.segment, rate=self.options.rate
        )
