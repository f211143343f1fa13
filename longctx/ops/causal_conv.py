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
from longctx.typing import Segments, checked


class Tail(NamedTuple):
    """What a span does to any state: the state's last `keep` tokens, then those of `x`.

    The first `keep` tokens of `x` are zeros. All zeros, `keep` too, maps every state to the zero state.
    """

    x: Float[Array, "B W-1 D"]
    keep: Int[Array, " B"]


@checked
def recurrent(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "W D"],
    state: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """The definition, token by token.

    Args:
      x: tokens.
      kernel: kernel[-1] multiplies the current token.
      state: the document's last W-1 tokens before the span, zeros where it has fewer; None for zeros.
      segment_ids: documents of a packed row. A document's start forgets everything before it; padding leaves the
        state unchanged and gives 0.

    Returns:
      y in the dtype of x, and the state after the span, float32.
    """
    segments = Segments.of(segment_ids, *x.shape[:2])
    kernel = kernel.astype(jnp.float32)

    def step(tail, token):
        x, start, valid = token
        window = jnp.concatenate([jnp.where(start[:, None, None], 0, tail), x[:, None]], axis=1)
        y = jnp.where(valid[:, None], jnp.sum(window * kernel, axis=1), 0)
        return jnp.where(valid[:, None, None], window[:, 1:], tail), y

    tokens = (x.astype(jnp.float32), segments.starts, segments.valid)
    tail = _zeros(x, kernel) if state is None else state.astype(jnp.float32)
    tail, y = jax.lax.scan(step, tail, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), tail


@checked
def chunked(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "W D"],
    state: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """The same as `recurrent` for the whole span at once. No padding may stand inside a document."""
    length, width = x.shape[1], kernel.shape[0]
    tokens = x.astype(jnp.float32)
    state = _zeros(x, kernel) if state is None else state.astype(jnp.float32)
    if segment_ids is None:
        tokens = jnp.concatenate([state, tokens], axis=1)
        y = sum(kernel[w].astype(jnp.float32) * tokens[:, w : w + length] for w in range(width))
        return y.astype(x.dtype), tokens[:, length:]
    segments = Segments.of(segment_ids, *x.shape[:2])
    tail = apply(transition(x, kernel, segments), state)
    # The state goes right before the first token that may continue it, over the padding in front of that token.
    tokens = jnp.pad(jnp.where(segments.valid[..., None], tokens, 0), ((0, 0), (width - 1, 0), (0, 0)))
    first = jnp.argmax(segments.valid, axis=1)
    tokens = jax.vmap(lambda row, state, at: jax.lax.dynamic_update_slice(row, state, (at, 0)))(tokens, state, first)
    runs = jnp.pad(segments.runs, ((0, 0), (width - 1, 0)))
    y = jnp.zeros(x.shape)
    for w in range(width):
        same = segments.valid & (runs[:, w : w + length] == segments.runs)
        y += scaled(jnp.where(same[..., None], tokens[:, w : w + length], 0), kernel[w].astype(jnp.float32))
    return y.astype(x.dtype), tail


@checked
def transition(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "W D"],
    segment_ids: Int[Array, "B T"] | Segments | None = None,
) -> Tail:
    """What the span does to any state. Of the kernel only its width is read."""
    segments = Segments.of(segment_ids, *x.shape[:2])
    size = kernel.shape[0] - 1
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
    """`then` after `first`; associative. Zeros as `first` stand for the zero state."""
    size = first.x.shape[1]
    return Tail(apply(then, first.x), jnp.maximum(first.keep + then.keep - size, 0))


def apply(transition: Tail, state: Float[Array, "B W-1 D"]) -> Float[Array, "B W-1 D"]:
    """The state after the span, from the state before it."""
    size = state.shape[1]
    slots = jnp.arange(size)
    keep = transition.keep[:, None]
    moved = jnp.take_along_axis(state, jnp.minimum(slots + size - keep, size - 1)[..., None], axis=1)
    return jnp.where((slots < keep)[..., None], moved, transition.x)


def _zeros(x, kernel):
    return jnp.zeros((x.shape[0], kernel.shape[0] - 1, x.shape[2]))
