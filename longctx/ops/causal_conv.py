"""Causal depthwise convolution along time, as used before linear recurrences; a token shift is the case W = 2.

Recurrence, with the last W-1 tokens as the state:

    y_t = sum_{w=0}^{W-1} kernel[W-1-w] x_{t-w}

A tap that would reach before the document's first token gives 0.

Span form: W shifted copies of the span, the state in front of it, are multiplied and added.

Transition of a span: "keep the tail". The last W-1 tokens of (state, span) are the last `keep` tokens of the state
followed by the span's; the tail of a concatenation is associative.

Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.backend import scaled
from longctx.ops.family import Recurrence, by_token
from longctx.typing import Segments


class Inputs(NamedTuple):
    """Tokens; y has their dtype."""

    x: Float[Array, "B T D"]


class Parameters(NamedTuple):
    """Taps; kernel[-1] multiplies the current token."""

    kernel: Float[Array, "W D"]


class Tail(NamedTuple):
    """What a span does to any state: the state's last `keep` tokens, then those of `x`.

    The first `keep` tokens of `x` are zeros. All zeros, `keep` too, maps every state to the zero state.
    """

    x: Float[Array, "B W-1 D"]
    keep: Int[Array, " B"]


State = Float[Array, "B W-1 D"]  # the document's last W-1 tokens before the span, zeros where it has fewer


def empty(inputs: Inputs, parameters: Parameters, options) -> State:
    """No tokens."""
    return jnp.zeros((inputs.x.shape[0], parameters.kernel.shape[0] - 1, inputs.x.shape[2]))


def recurrent(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options):
    """The definition, token by token."""

    def step(tail, x):
        window = jnp.concatenate([tail, x[:, None]], axis=1)
        return jnp.sum(window * parameters.kernel.astype(jnp.float32), axis=1), window[:, 1:]

    return by_token(step, state, inputs, segments, inputs.x.dtype)


def chunked(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options):
    """The same for the whole span at once. No padding may stand inside a document."""
    (x,), (kernel,) = inputs, parameters
    length, width = x.shape[1], kernel.shape[0]
    tail = apply(transition(inputs, parameters, segments, options), state)
    # The state goes right before the first token that may continue it, over the padding in front of that token.
    tokens = jnp.where(segments.valid[..., None], x.astype(jnp.float32), 0)
    tokens = jnp.pad(tokens, ((0, 0), (width - 1, 0), (0, 0)))
    first = jnp.argmax(segments.valid, axis=1)
    tokens = jax.vmap(lambda row, state, at: jax.lax.dynamic_update_slice(row, state, (at, 0)))(tokens, state, first)
    runs = jnp.pad(segments.runs, ((0, 0), (width - 1, 0)))
    y = jnp.zeros(x.shape)
    for w in range(width):
        same = segments.valid & (runs[:, w : w + length] == segments.runs)
        y += scaled(jnp.where(same[..., None], tokens[:, w : w + length], 0), kernel[w].astype(jnp.float32))
    return y.astype(x.dtype), tail


def transition(inputs: Inputs, parameters: Parameters, segments: Segments, options) -> Tail:
    """What the span does to any state."""
    return tail_of(inputs.x, parameters.kernel.shape[0] - 1, segments)


def tail_of(x: Float[Array, "B T D"], size: int, segments: Segments) -> Tail:
    """What a span leaves of its last `size` tokens, and of those of any state before it."""
    # Tokens of the last document counted from its end: 1, 2, ...; its last `size` go to the tail, from the right.
    last = segments.valid & (segments.runs == segments.runs[:, -1:])
    from_end = jnp.cumsum(last[:, ::-1], axis=1)[:, ::-1]
    slots = size - jnp.arange(size)
    found = last[:, None] & (from_end[:, None] == slots[:, None])  # [B, W-1, T]
    index = jnp.argmax(found, axis=2)
    tail = jnp.take_along_axis(x.astype(jnp.float32), index[..., None], axis=1)
    tail = jnp.where(jnp.any(found, axis=2)[..., None], tail, 0)
    fresh = jnp.any(segments.starts, axis=1)
    return Tail(tail, jnp.where(fresh, 0, jnp.maximum(size - jnp.sum(last, axis=1), 0)))


def compose(first: Tail, then: Tail) -> Tail:
    """`then` after `first`."""
    size = first.x.shape[1]
    return Tail(apply(then, first.x), jnp.maximum(first.keep + then.keep - size, 0))


def apply(transition: Tail, state: Float[Array, "B W-1 D"]) -> Float[Array, "B W-1 D"]:
    """The state after the span, from the state before it."""
    size = state.shape[1]
    slots = jnp.arange(size)
    keep = transition.keep[:, None]
    moved = jnp.take_along_axis(state, jnp.minimum(slots + size - keep, size - 1)[..., None], axis=1)
    return jnp.where((slots < keep)[..., None], moved, transition.x)


CAUSAL_CONV = Recurrence(
    "causal_conv", Inputs, empty, recurrent, chunked, transition, compose, apply, parameters=Parameters
)
