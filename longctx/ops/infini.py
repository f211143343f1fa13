"""Infini-attention's compressive memory: what a document's earlier segments hold, read by linear attention.

A document is cut into segments of `segment` tokens, counted from its start. With f = ELU + 1, per head, token t reads
what was written in segments before its own,

    M = sum_s f(k_s) v_s^T,    z = sum_s f(k_s),    y_t = M^T f(q_t) / (z . f(q_t))      (0 where nothing is read)

Recurrence. M has one more column, z, written with ones. A segment in progress is summed apart, in P:

    at a segment's first token  M <- M + P,  P <- 0;    y_t from M;    P <- P + f(k_t) [1, v_t]^T

Chunk form. With n_t the segments begun in the chunk up to t, token t reads the tokens s of its document with n_s < n_t,
the M before the chunk, and the P before it if n_t > 0.

Transition of a span: (a, c, B, Q) with a = 0 if a document starts in it, c = 1 if a segment begins, 0 and 1 otherwise:

    M -> a (M + c P) + B,    P -> a (1 - c) P + Q

and (a_2, c_2, B_2, Q_2) after (a_1, c_1, B_1, Q_1) is

    (a_1 a_2, max(c_1, c_2), a_2 (B_1 + c_2 Q_1) + B_2, a_2 (1 - c_2) Q_1 + Q_2).

Reference: Munkhdalai et al., "Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention",
2024, section 2.1, equations 3 and 4 (the linear update).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.gated_linear import by_spans, einsum, join, split
from longctx.typing import Segments, checked

# What is read with less weight than this is nothing: the square, by which a quotient's slope is divided, is not 0.
LEAST = 1e-18


class State(NamedTuple):
    """Column 0 is z, the others are M: of the finished segments, and of the one in progress."""

    memory: Float[Array, "B H K V+1"]
    pending: Float[Array, "B H K V+1"]


class Transition(NamedTuple):
    """What a span does to any state."""

    keeps: Float[Array, " B"]  # 0 if a document starts in it
    begins: Float[Array, " B"]  # 1 if a segment begins in it
    state: State  # from zeros


@checked
def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    state: State | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    segment: int,
) -> tuple[Float[Array, "B T H V"], State]:
    """The definition, token by token.

    Args:
      q: what reads; f is applied here.
      k: where v is written; f is applied here.
      v: what is written.
      state: before the span, None for zeros.
      segment_ids: documents of a packed row; their positions tell the segments. A document's start forgets everything
        before it; padding leaves the state unchanged and gives 0.
      segment: tokens a segment.

    Returns:
      y in the dtype of v, and the state after the span, float32.
    """
    segments = Segments.of(segment_ids, *k.shape[:2])

    def features(x):  # ELU + 1, without the 1 that would round small ones away
        return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))

    def step(state, token):
        q, k, v, start, begins, valid = token
        memory, pending = (jnp.where(start, 0, s) for s in state)
        memory, pending = jnp.where(begins, memory + pending, memory), jnp.where(begins, 0, pending)
        read = jnp.einsum("bhk,bhkv->bhv", features(q), memory, precision="highest")
        some = read[..., :1] > LEAST
        y = jnp.where(some, read[..., 1:] / jnp.where(some, read[..., :1], 1), 0)
        row = jnp.concatenate([jnp.ones_like(v[..., :1]), v], axis=-1)
        after = State(memory, pending + features(k)[..., None] * row[..., None, :])
        return jax.tree.map(lambda new, old: jnp.where(valid, new, old), after, state), jnp.where(valid[..., 0], y, 0)

    begins = segments.positions % segment == 0
    flags = (x[..., None, None, None] for x in (segments.starts, begins, segments.valid))
    tokens = (*(x.astype(jnp.float32) for x in (q, k, v)), *flags)
    state = zeros(k, v) if state is None else state
    state, y = jax.lax.scan(step, state, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state


@checked
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    state: State | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
    *,
    segment: int,
) -> tuple[Float[Array, "B T H V"], State]:
    """The same as `recurrent`, chunk by chunk in matrix products; `chunk` is C."""
    segments = Segments.of(segment_ids, *k.shape[:2])
    state = zeros(k, v) if state is None else state
    return by_spans(functools.partial(_span, segment), state, (q, k, v), segments, chunk)


@checked
def transition(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
    *,
    segment: int,
) -> Transition:
    """What the span does to any state. `q` is not read: it is there so that all functions take the same inputs."""
    segments = Segments.of(segment_ids, *k.shape[:2])
    _, state = by_spans(functools.partial(_span, segment), zeros(k, v), (None, k, v), segments, chunk)
    begins = segments.valid & (segments.positions % segment == 0)
    keeps = ~jnp.any(segments.starts, axis=1)
    return Transition(keeps.astype(jnp.float32), jnp.any(begins, axis=1).astype(jnp.float32), state)


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`; associative. Zeros as `first` stand for the zero state."""
    return Transition(first.keeps * then.keeps, jnp.maximum(first.begins, then.begins), apply(then, first.state))


def apply(transition: Transition, state: State) -> State:
    """The state after the span, from the state before it."""
    keeps, begins = (x[:, None, None, None] for x in (transition.keeps, transition.begins))
    memory = keeps * (state.memory + begins * state.pending) + transition.state.memory
    return State(memory, keeps * (1 - begins) * state.pending + transition.state.pending)


def _span(segment, state, q, k, v, segments, chunk):
    """A few chunks: the state after them, and y."""

    def count(flags):
        flags = flags.reshape(flags.shape[0], -1, chunk)
        return jnp.swapaxes(jnp.cumsum(flags, axis=-1, dtype=jnp.int32), 0, 1)[:, :, None]  # [n, B, 1, C]

    run, number = count(segments.starts), count(segments.valid & (segments.positions % segment == 0))
    keys = jnp.where(segments.valid[..., None, None], features(k), 0)
    keys, values = split(keys, chunk), split(jnp.pad(v, ((0, 0),) * 3 + ((1, 0),)), chunk).at[..., 0].set(1)
    last, now = run[..., -1:], number[..., -1:]

    def write(which):
        return einsum("nbhck,nbhcv->nbhkv", keys * which[..., None], values)

    writes = State(write((run == last) & (number < now)), write((run == last) & (number == now)))
    keeps, begins = ((x[:, :, 0, 0]).astype(jnp.float32) for x in (last == 0, now > 0))

    def step(state, chunk):
        return apply(chunk, state), state

    state, before = jax.lax.scan(step, state, Transition(keeps, begins, writes))
    if q is None:
        return state, None
    queries = split(features(q), chunk)
    seen = (run[..., :, None] == run[..., None, :]) & (number[..., :, None] > number[..., None, :])
    scores = jnp.where(seen, einsum("nbhck,nbhdk->nbhcd", queries, keys), 0)
    read = einsum("nbhcd,nbhdv->nbhcv", scores, values)
    old, recent = run == 0, (run == 0) & (number > 0)
    read += einsum("nbhck,nbhkv->nbhcv", queries * old[..., None], before.memory)
    read += einsum("nbhck,nbhkv->nbhcv", queries * recent[..., None], before.pending)
    some = read[..., :1] > LEAST
    return state, join(jnp.where(some, read[..., 1:] / jnp.where(some, read[..., :1], 1), 0), v, segments)


def features(x):
    """f = ELU + 1, float32: exp below 0, without the 1 that would round small ones away."""
    x = x.astype(jnp.float32)
    return jnp.exp(jnp.minimum(x, 0)) + jnp.maximum(x, 0)


def zeros(k, v) -> State:
    """The state before any token."""
    empty = jnp.zeros((k.shape[0], k.shape[2], k.shape[3], v.shape[3] + 1))
    return State(empty, empty)
