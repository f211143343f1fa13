"""Elementwise linear recurrence, the core of S5, LRU, RG-LRU and HGRN.

Recurrence, for a vector state of N independent channels:

    s_t = a_t s_{t-1} + x_t,    y_t = s_t,    a_t = exp(log_decay_t)

All of it real (RG-LRU, HGRN) or complex (S5, LRU: an imaginary part of the log decay turns the state).

Chunk form. Within a chunk the state is affine in the state s before it:

    s_t = A_t s + b_t,    A_t = a_t A_{t-1},    b_t = a_t b_{t-1} + x_t,    A_0 = 1,    b_0 = 0

so that all chunks step through their C tokens together to (A_C, b_C); a scan over the T / C chunks carries the state;
and all chunks step through their tokens again, from the state before them: 2 C + T / C steps in sequence instead of T.
Products of decays are only ever multiplied up, never divided. A long row is cut into spans, which take turns.

Transition of a span: (a, b), s -> a s + b, with (a_2, b_2) after (a_1, b_1) being (a_2 a_1, a_2 b_1 + b_2).

Reference: Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", 2018, equation 5; De et
al., "Griffin", 2024, equation 4.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from longctx.typing import Segments, checked

NUMBERS = 2**18  # in the states of a span's tokens: about what a CPU's cache holds;
CHUNKS = 16  # but at least so many side by side, for fewer steps in sequence


class Transition(NamedTuple):
    """What a span does to any state: s -> decay * s + state."""

    decay: Inexact[Array, "B N"]
    state: Inexact[Array, "B N"]

    column_wise = False

    def transposed(self) -> Transition:
        """Its linear part is diagonal, and so its own transpose."""
        return self


@checked
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


@checked
def chunked(
    x: Inexact[Array, "B T N"],
    log_decay: Inexact[Array, "B T N"] | Inexact[Array, " N"],
    state: Inexact[Array, "B N"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> tuple[Inexact[Array, "B T N"], Inexact[Array, "B N"]]:
    """The same as `recurrent`, chunks side by side; `chunk` is C."""
    dtype = x.dtype
    x, log_decay = _masked(x, log_decay, segment_ids)
    s = jnp.zeros_like(x[:, 0]) if state is None else state.astype(x.dtype)
    leaves = cut((x, log_decay), chunk, max(CHUNKS, NUMBERS // (chunk * s.size)))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def span(s, leaves):
        leaves = (leaves[0], jnp.exp(leaves[1]))
        s, before = jax.lax.scan(lambda s, chunk: (apply(chunk, s), s), s, _ends(*leaves))
        return s, jax.lax.scan(lambda s, token: (token[1] * s + token[0],) * 2, before, leaves)[1]

    s, y = jax.lax.scan(span, s, leaves)
    y = join(y, x.shape[1])
    if segment_ids is not None:
        y = jnp.where(Segments.of(segment_ids, *x.shape[:2]).valid[..., None], y, 0)
    return y.astype(dtype), s


@checked
def transition(
    x: Inexact[Array, "B T N"],
    log_decay: Inexact[Array, "B T N"] | Inexact[Array, " N"],
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> Transition:
    """What the span does to any state."""
    x, log_decay = _masked(x, log_decay, segment_ids)
    nothing = Transition(jnp.ones_like(log_decay[:, 0]), jnp.zeros_like(x[:, 0]))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def span(before, leaves):
        ends = _ends(leaves[0], jnp.exp(leaves[1]))
        return jax.lax.scan(lambda before, chunk: (compose(before, chunk), None), before, ends)

    return jax.lax.scan(span, nothing, cut((x, log_decay), chunk, max(CHUNKS, NUMBERS // (chunk * x[:, 0].size))))[0]


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`; associative. Zeros as `first` stand for the zero state."""
    return Transition(then.decay * first.decay, apply(then, first.state))


def apply(transition: Transition, state: Inexact[Array, "B N"]) -> Inexact[Array, "B N"]:
    """The state after the span, from the state before it."""
    return transition.decay * state + transition.state


def cut(leaves, chunk: int, most: int):
    """`[B, T, ...]` as spans of chunks, `[spans, C, n, B, ...]`: a scan over C steps through n chunks side by side.

    n is at most `most`, and at least 1. The last span is filled up with zeros.
    """
    length = leaves[0].shape[1]
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    spans = -(-chunks // max(1, most))
    size = -(-chunks // spans)

    def one(leaf):
        leaf = jnp.pad(leaf, ((0, 0), (0, spans * size * chunk - length)) + ((0, 0),) * (leaf.ndim - 2))
        return jnp.moveaxis(leaf.reshape(leaf.shape[0], spans, size, chunk, *leaf.shape[2:]), (1, 3, 2), (0, 1, 2))

    return jax.tree.map(one, leaves)


def join(y: Inexact[Array, "spans C n B ..."], length: int) -> Inexact[Array, "B T ..."]:
    """The inverse of `cut` for outputs."""
    y = jnp.moveaxis(y, (0, 1, 2), (1, 3, 2))
    return y.reshape(y.shape[0], -1, *y.shape[4:])[:, :length]


def _masked(x, log_decay, segment_ids):
    """What is added and the log decays, so that documents and padding need no more care."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    log_decay = log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32))
    log_decay = jnp.broadcast_to(log_decay, x.shape)
    if segment_ids is not None:
        segments = Segments.of(segment_ids, *x.shape[:2])
        starts, valid = segments.starts[..., None], segments.valid[..., None]
        x = jnp.where(valid, x, 0)
        log_decay = jnp.where(valid, jnp.where(starts, -jnp.inf, log_decay), 0)
    return x, log_decay


def _ends(x, decay):
    """What each chunk of a span does to a state: all chunks step together, from their first token to their last."""

    def step(before, token):
        return Transition(token[1] * before.decay, token[1] * before.state + token[0]), None

    return jax.lax.scan(step, Transition(jnp.ones_like(decay[0]), jnp.zeros_like(x[0])), (x, decay))[0]
