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

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.chunks import by_spans, cut, cut_heads, join_heads
from longctx.ops.family import Recurrence, by_token
from longctx.ops.products import einsum
from longctx.typing import Segments

# What is read with less weight than this is nothing: the square, by which a quotient's slope is divided, is not 0.
LEAST = 1e-18


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: what reads; f is applied here.
      k: where v is written; f is applied here.
      v: what is written.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Tokens a segment, counted from a document's start, and a chunk."""

    segment: int
    chunk: int = 64


class State(NamedTuple):
    """Column 0 is z, the others are M: of the finished segments, and of the one in progress."""

    memory: Float[Array, "B H K V+1"]
    pending: Float[Array, "B H K V+1"]


class Transition(NamedTuple):
    """What a span does to any state."""

    keeps: Float[Array, " B"]  # 0 if a document starts in it
    begins: Float[Array, " B"]  # 1 if a segment begins in it
    state: State  # from zeros


def empty(inputs: Inputs, parameters: None, options: Options) -> State:
    """The memory before any token."""
    k, v = inputs.k, inputs.v
    zeros = jnp.zeros((k.shape[0], k.shape[2], k.shape[3], v.shape[3] + 1))
    return State(zeros, zeros)


def recurrent(inputs: Inputs, parameters: None, state: State, segments: Segments, options: Options):
    """The definition, token by token."""

    def features(x):  # ELU + 1, without the 1 that would round small ones away
        return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))

    def step(state, q, k, v, position):
        begins = (position % options.segment == 0)[:, None, None, None]
        memory = jnp.where(begins, state.memory + state.pending, state.memory)
        pending = jnp.where(begins, 0, state.pending)
        read = jnp.einsum("bhk,bhkv->bhv", features(q), memory, precision="highest")
        some = read[..., :1] > LEAST
        y = jnp.where(some, read[..., 1:] / jnp.where(some, read[..., :1], 1), 0)
        row = jnp.concatenate([jnp.ones_like(v[..., :1]), v], axis=-1)
        return y, State(memory, pending + features(k)[..., None] * row[..., None, :])

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: None, state: State, segments: Segments, options: Options):
    """The same, chunk by chunk in matrix products."""
    return by_spans(functools.partial(_span, options.segment), state, inputs, segments, options.chunk)


def transition(inputs: Inputs, parameters: None, segments: Segments, options: Options) -> Transition:
    """What the span does to any state."""
    nothing = empty(inputs, parameters, options)
    _, state = chunked(inputs._replace(q=None), parameters, nothing, segments, options)
    begins = segments.valid & (segments.positions % options.segment == 0)
    keeps = ~jnp.any(segments.starts, axis=1)
    return Transition(keeps.astype(jnp.float32), jnp.any(begins, axis=1).astype(jnp.float32), state)


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`."""
    return Transition(first.keeps * then.keeps, jnp.maximum(first.begins, then.begins), apply(then, first.state))


def apply(transition: Transition, state: State) -> State:
    """The state after the span, from the state before it."""
    keeps, begins = (x[:, None, None, None] for x in (transition.keeps, transition.begins))
    memory = keeps * (state.memory + begins * state.pending) + transition.state.memory
    return State(memory, keeps * (1 - begins) * state.pending + transition.state.pending)


def _span(segment, state, q, k, v, segments, chunk):
    """A few chunks: the state after them, and y."""

    def count(flags):
        return jnp.cumsum(cut(flags, chunk), axis=-1, dtype=jnp.int32)[:, :, None]  # [n, B, 1, C]

    run, number = count(segments.starts), count(segments.valid & (segments.positions % segment == 0))
    keys = jnp.where(segments.valid[..., None, None], features(k), 0)
    keys, values = cut_heads(keys, chunk), cut_heads(jnp.pad(v, ((0, 0),) * 3 + ((1, 0),)), chunk).at[..., 0].set(1)
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
    queries = cut_heads(features(q), chunk)
    earlier = (run[..., :, None] == run[..., None, :]) & (number[..., :, None] > number[..., None, :])
    scores = jnp.where(earlier, einsum("nbhck,nbhdk->nbhcd", queries, keys), 0)
    read = einsum("nbhcd,nbhdv->nbhcv", scores, values)
    old, recent = run == 0, (run == 0) & (number > 0)
    read += einsum("nbhck,nbhkv->nbhcv", queries * old[..., None], before.memory)
    read += einsum("nbhck,nbhkv->nbhcv", queries * recent[..., None], before.pending)
    some = read[..., :1] > LEAST
    return state, join_heads(jnp.where(some, read[..., 1:] / jnp.where(some, read[..., :1], 1), 0), v, segments)


def features(x):
    """f = ELU + 1, float32: exp below 0, without the 1 that would round small ones away."""
    x = x.astype(jnp.float32)
    return jnp.exp(jnp.minimum(x, 0)) + jnp.maximum(x, 0)


INFINI = Recurrence("infini", Inputs, empty, recurrent, chunked, transition, compose, apply, options=Options)
