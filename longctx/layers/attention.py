"""Softmax attention (Vaswani et al., 2017) as a mixer: any pattern, any positions, grouped keys and values.

Group: softmax attention
Transition: the tokens themselves: concatenation
Devices: all keys and values, by a ring, all-to-all or gathering: grows with T; a halo and the anchors where the
    pattern is bounded
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Projections, document
from longctx.layers.positions import ROPE, Positions
from longctx.memory.store import ATTENDED, Leaf, Ring, Store, extend, heads
from longctx.ops import attention as ops
from longctx.ops.biases import Bias
from longctx.ops.partial import Partial
from longctx.ops.patterns import Causal, Heads, Pattern, causal, parse
from longctx.parallel import schemes, sequence
from longctx.schema import Written
from longctx.typing import Segments

Text = Annotated[str, Written((Pattern, Heads))]  # of a pattern


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
    """The cache of keys and values, and the last inputs of the convolution (None without one)."""

    cache: Store
    conv: Float[Array, "B W-1 C"] | None


class Attention(Projections):
    """Causal softmax attention over what a pattern shows of the document so far.

    State: keys and values of as many tokens as the pattern reaches back, the own included, and of its anchors; of
    `capacity` tokens where its reach is unbounded.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Projections.Config):
        value_width: int = 0  # V; 0: K
        pattern: Text = "Causal()"  # the tokens up to it that are visible to a query, such as "Window(512) | Sinks(4)"
        positions: Positions = ROPE  # one of `layers/positions.py`, such as {"kind": "yarn", "factor": 8.0}
        scale: float = 0.0  # of the logits; 0: 1 / √K
        length_base: float = 0.0  # n: logits are scaled by log(tokens so far + 1) / log n; 0: not
        sinks: bool = False  # a learned logit per head that joins the softmax's denominator
        persistent: int = 0  # learned tokens that are visible to every query besides, at no position (Titans)
        soft_cap: float = 0.0  # logits become cap · tanh(logits / cap); 0: none
        context_parallel: str = "auto"  # how devices meet all keys of a row: auto, ring, heads, both, or gather

        def problems(self):
            yield from super().problems()
            if min(self.value_width, self.scale, self.soft_cap, self.persistent) < 0:
                yield "value_width, scale, soft_cap and persistent must not be negative"
            yield from (f"positions.{problem}" for problem in self.positions.refusals(self.head_width))
            if self.length_base and self.length_base <= 1:
                yield f"length_base is {self.length_base}; give a length above 1, or 0 for no scaling"
            if self.context_parallel not in schemes.NAMES:
                yield f"context_parallel is '{self.context_parallel}'; choose one of {', '.join(schemes.NAMES)}"
            try:
                pattern = causal(parse(self.pattern))
            except ValueError as error:
                yield f"pattern: {error}"
                return
            if self.positions.alone and (pattern != Causal() or self.sinks or self.soft_cap or self.persistent):
                yield (
                    f"positions '{self.positions.kind}' has neither pattern, nor sinks, nor soft_cap, nor persistent; "
                    "leave them as they are by default"
                )
            if isinstance(pattern, Heads) and self.positions.several:
                yield "positions that take attention apart have the same pattern for all heads; give one pattern"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options, rngs, _lags(options))
        self.sinks = nnx.Param(jnp.zeros(options.heads, jnp.float32), axes=("heads",)) if options.sinks else None
        tokens = jax.random.normal(rngs.params(), (options.persistent, width)) if options.persistent else None
        self.persistent = None if tokens is None else nnx.Param(tokens, axes=("taps", "embed"))
        learned = options.positions.initial(options.heads, options.head_width)
        self.positions = None if learned is None else nnx.Param(learned, axes=options.positions.axes)

    @property
    def pattern(self) -> Pattern | Heads:
        """Which keys a query may see."""
        return causal(parse(self.options.pattern))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Segments | None = None,
        state: AttentionState | None = None,
        bias: Bias | None = None,
    ):
        """Returns `(y[B, T, D], AttentionState)`; `bias` is added to logits, instead of that of the positions."""
        segments = document(segments, x, state)
        batch, length, _ = x.shape
        options = self.options
        q, k, v, tail = self.project(x, segments, None if state is None else state.conv)
        if options.length_base:
            # The more keys share a softmax, the sharper it must be (Nakanishi, 2025, "Scalable-Softmax").
            tokens = segments.positions.astype(jnp.float32)[..., None, None] + 1
            q = (q * jnp.log(tokens + 1) / math.log(options.length_base)).astype(q.dtype)
        k = options.positions.stored(k, segments.positions)
        if state is None:
            after, held = self._empty(batch, length, x.dtype).append((k, v), segments), None
        else:
            ((k, v), held), segments, after = extend(state.cache, (k, v), segments)
        y = self._attend(q, k, v, segments, held, bias)
        return self.back(x, y), AttentionState(after, tail)

    def _attend(self, q, k, v, segments: Segments, held: Segments | None, bias):
        """Attention to the tokens of `held`, or to the span's own."""
        options, scheme = self.options, self.options.positions
        learned = None if self.positions is None else self.positions[...]
        sinks = None if self.sinks is None else self.sinks[...]
        bias = scheme.bias(learned, options.heads) if bias is None else bias
        caps = {"scale": options.scale or None, "soft_cap": options.soft_cap or None}
        settings = ops.Options(self.pattern, context_parallel=options.context_parallel, **caps)
        return scheme.attend(q, k, v, (learned, sinks, bias, self._besides(q)), segments, held, settings)

    def _besides(self, q: Float[Array, "B T H K"]) -> Partial | None:
        """Attention to the persistent tokens, which every query sees besides its document."""
        options = self.options
        if self.persistent is None:
            return None
        tokens = self.persistent[...].astype(q.dtype)
        k = self.heads(self.key(tokens), self.key_norm)
        v = self.value(tokens).reshape(-1, options.kv_heads, options.of_values)
        grouped = q.reshape(*q.shape[:2], options.kv_heads, -1, options.head_width)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        logits = product("btgrk,pgk->btgrp", grouped, k) * (options.scale or options.head_width**-0.5)
        if options.soft_cap:
            logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
        output = product("btgrp,pgv->btgrv", jax.nn.softmax(logits, axis=-1), v.astype(jnp.float32))
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        return Partial(output.reshape(*q.shape[:3], -1), logsumexp.reshape(q.shape[:3]))

    def leaves(self, dtype) -> tuple[Leaf, ...]:
        """What a token leaves behind: its key and its value."""
        options = self.options
        return heads(options.kv_heads, options.head_width, dtype, ATTENDED, options.of_values)

    def _empty(self, batch: int, capacity: int, dtype) -> Store:
        reach, anchors = self.pattern.union.reach, self.pattern.union.anchors
        return Ring().make(self.leaves(dtype), batch, capacity, reach, anchors, shared=True)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> AttentionState:
        """The state before any token, with room for `capacity` tokens (a bounded reach needs no more than itself)."""
        tail = None if self.conv is None else self.conv.init_state(batch)
        return AttentionState(self._empty(batch, capacity, dtype), tail)


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    pattern: Pattern | Heads,
    segments: Segments,
    held: Segments | None,
    decay: Float[Array, "B T H"] | None = None,
    since: Float[Array, "B S H"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """Attention of a span's tokens to each other, or to what `extend` says that they may see.

    Args:
      q: of the span.
      k, v: of the tokens of `held`.
      pattern: which keys a query may see.
      segments: of the span.
      held: of the keys; None: they are the span's own.
      decay, since: at each query and at each key, the sum of log decays.
      scale: of the logits; None for 1 / sqrt(K).
    """
    inputs, options = ((q, decay), (k, v, since)), ops.Options(pattern, scale)
    return sequence.attend(ops.ATTENTION, *inputs, segments=segments, key_segments=held, options=options).y


def _lags(options: Attention.Config) -> np.ndarray:
    """Tokens back that each channel of queries, keys and values begins by showing.

    Keys show one token more than queries do, head by head, and values none. Even heads compare single tokens. In odd
    heads the channels are shared among the last W-1 tokens, so the more of these agree, the larger the logit: what
    follows a repeated phrase is found, not what follows a repeated word.
    """
    phrase = np.arange(options.head_width) * max(options.conv_width - 1, 1) // options.head_width
    queries, keys = (
        np.concatenate([phrase * (head % 2) for head in range(heads)]) for heads in (options.heads, options.kv_heads)
    )
    return np.concatenate([queries, 1 + keys, np.zeros(options.kv_heads * options.of_values, keys.dtype)])
