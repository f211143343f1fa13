"""Elementwise linear recurrence, the core of S5, LRU, RG-LRU and HGRN.

Recurrence, for a vector state of N independent channels:

    s_t = a_t s_{t-1} + x_t,    y_t = s_t,    a_t = exp(log_decay_t)

All of it real (RG-LRU, HGRN) or complex (S5, LRU: an imaginary part of the log decay turns the state).

Chunk form. Within a chunk the state is affine in the state s before it:

    s_t = A_t s + b_t,    A_t = a_t A_{t-1},    b_t = a_t b_{t-1} + x_t,    A_0 = 1,    b_0 = 0

so that all chunks step through their C tokens together, and then a scan over the T / C chunks carries the state:
C + T / C steps in sequence instead of T. Products of decays are only ever multiplied up, never divided.

Transition of a span: (a, b), s -> a s + b, with (a_2, b_2) after (a_1, b_1) being (a_2 a_1, a_2 b_1 + b_2).

Reference: Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", 2018, equation 5; De et
al., "Griffin", 2024, equation 4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from longctx.typing import Segments


class Transition(NamedTuple):
    """What a span does to any state: s -> decay * s + state."""

    decay: Inexact[Array, "B N"]
    state: Inexact[Array, "B N"]


def recurrent(
    x: Inexact[Array, "B T N"],
    log_decay: Inexact[Array, "B T N"] | Inexact[Array, " N"],
    state: Inexact[Array, "B N"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
) -> tuple[Inexact[Array, "B T N"], Inexact[Array, "B N"]]:
    """The definition, token by token.

    Args:
      x: what is added to the state; complex64 where the log decay is.
      log_decay: its real part is at most 0; -inf is a decay of exactly 0. `[N]` is the same for all tokens.
      state: before the span, None for zeros.
      segment_ids: documents of a packed row. A document's start forgets everything before it; padding leaves the
        state unchanged and gives 0.

    Returns:
      y in the dtype of x, and the state after the span, float32, or complex64 where x is.
    """
    segments = Segments.of(segment_ids, *x.shape[:2])

    def step(s, token):
        x, decay, start, valid = token
        after = jnp.where(start, 0, decay) * s + x
        s = jnp.where(valid, after, s)
        return s, jnp.where(valid, s, 0)

    wide = jnp.promote_types(x.dtype, jnp.float32)
    decay = jnp.exp(log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32)))
    tokens = (x.astype(wide), jnp.broadcast_to(decay, x.shape))
    tokens += (segments.starts[..., None], segments.valid[..., None])
    s = jnp.zeros((x.shape[0], x.shape[2]), wide) if state is None else state.astype(wide)
    s, y = jax.lax.scan(step, s, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), s


def chunked(
    x: Inexact[Array, "B T N"],
    log_decay: Inexact[Array, "B T N"] | Inexact[Array, " N"],
    state: Inexact[Array, "B N"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> tuple[Inexact[Array, "B T N"], Inexact[Array, "B N"]]:
    """The same as `recurrent`, in C + T / C steps; `chunk` is C."""
    decays, states = _within(x, log_decay, segment_ids, chunk)
    s = jnp.zeros_like(states[0, 0]) if state is None else state.astype(states.dtype)
    s, before = jax.lax.scan(lambda s, last: (last[0] * s + last[1], s), s, (decays[-1], states[-1]))
    y = decays * before + states
    y = jnp.transpose(y, (2, 1, 0, 3)).reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]
    if segment_ids is not None:
        y = jnp.where(Segments.of(segment_ids, *x.shape[:2]).valid[..., None], y, 0)
    return y.astype(x.dtype), s


def transition(
    x: Inexact[Array, "B T N"],
    log_decay: Inexact[Array, "B T N"] | Inexact[Array, " N"],
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> Transition:
    """What the span does to any state."""
    decays, states = _within(x, log_decay, segment_ids, chunk)
    nothing = Transition(jnp.ones_like(decays[0, 0]), jnp.zeros_like(states[0, 0]))
    chunks = Transition(decays[-1], states[-1])
    return jax.lax.scan(lambda before, chunk: (compose(before, Transition(*chunk)), None), nothing, chunks)[0]


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`; associative. Zeros as `first` stand for the zero state."""
    return Transition(then.decay * first.decay, apply(then, first.state))


def apply(transition: Transition, state: Inexact[Array, "B N"]) -> Inexact[Array, "B N"]:
    """The state after the span, from the state before it."""
    return transition.decay * state + transition.state


def _within(x, log_decay, segment_ids, chunk):
    """A_t and b_t of every token, [C, n, B, N]: all chunks step together, from their first token to their last."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    decay = jnp.exp(log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32)))
    decay = jnp.broadcast_to(decay, x.shape)
    if segment_ids is not None:
        segments = Segments.of(segment_ids, *x.shape[:2])
        starts, valid = segments.starts[..., None], segments.valid[..., None]
        x = jnp.where(valid, x, 0)
        decay = jnp.where(valid, jnp.where(starts, 0, decay), 1)
    batch, length, width = x.shape
    chunk = min(chunk, length)
    end = ((0, 0), (0, -length % chunk), (0, 0))

    def split(leaf, filler):
        leaf = jnp.pad(leaf, end, constant_values=filler).reshape(batch, -1, chunk, width)
        return jnp.transpose(leaf, (2, 1, 0, 3))

    def step(before, token):
        decay, x = token
        after = (decay * before[0], decay * before[1] + x)
        return after, after

    x, decay = split(x, 0), split(decay, 1)
    return jax.lax.scan(step, (jnp.ones_like(x[0]), jnp.zeros_like(x[0])), (decay, x))[1]
