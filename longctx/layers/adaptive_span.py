"""Adaptive attention span (Sukhbaatar et al., 2019) as a mixer: every head learns how far back it looks.

Group: hierarchical and adaptive attention
Transition: the last tokens
Devices: a halo of Z+R-1 keys and values
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers import reports
from longctx.layers.attention import Attention, AttentionState
from longctx.layers.basic import Projections, document
from longctx.layers.positions import ROPE, Positions
from longctx.ops.biases import AdaptiveSpan as Span
from longctx.typing import Segments


class AdaptiveSpan(nnx.Module):
    """Softmax attention whose weights fade out beyond a learned span per head (`ops/biases.py`).

    Longer spans cost: `penalty` times the heads' mean span is added to the loss of every token (section 2.2). The mixer
    works on the last `longest` + `ramp` tokens, however short the spans are.
    State: keys and values of `longest` + `ramp` tokens.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Projections.Config):
        positions: Positions = ROPE  # one of `layers/positions.py`, but none with a bias
        longest: int = 32  # tokens, the most that a span can be
        ramp: int = 8  # R, tokens over which weights fade out after it
        initial: float = 0.5  # span at first, as a share of the longest
        penalty: float = 0.0  # of a token of span in the loss; 2e-6 in the paper

        def problems(self):
            if min(self.longest, self.ramp) < 1:
                yield f"longest is {self.longest} and ramp is {self.ramp}; both must be at least 1"
            if not 0 <= self.initial <= 1:
                yield f"initial is {self.initial}; give a share from 0 to 1"
            if type(self.positions).bias is not Positions.bias or self.positions.kind == "cope":
                yield f"positions '{self.positions.kind}' are a bias of their own; choose rotary ones, or 'nope'"
            yield from self.attention.problems()

        @property
        def attention(self) -> Attention.Config:
            """The options of the attention inside."""
            names = [field.name for field in dataclasses.fields(Projections.Config)]
            shared = {name: getattr(self, name) for name in ("positions", *names)}
            return Attention.Config(**shared, pattern=f"Window({self.longest + self.ramp})")

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        self.attention = Attention(width, options.attention, rngs)
        self.span = nnx.Param(jnp.full(options.heads, options.initial, jnp.float32), axes=("heads",))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: AttentionState | None = None):
        """Returns `(y[B, T, D], AttentionState)`."""
        segments = document(segments, x, state)
        options = self.options
        span = options.longest * jnp.clip(self.span[...], 0.0, 1.0)
        y, state = self.attention(x, segments, state, bias=Span(span, options.ramp))
        tokens = jnp.sum(segments.valid)
        reports.record("span", span.mean() * tokens, tokens, options.penalty)
        return y, state

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> AttentionState:
        """The state before any token; no more than the longest span needs, whatever `capacity` is."""
        return self.attention.init_state(batch, capacity, dtype)
