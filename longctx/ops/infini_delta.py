"""Infini-attention's compressive memory by the delta rule: what a segment writes is what the memory did not yet hold.

As `ops/infini.py`, but of each value what the memory of earlier segments gives for its key is taken off before it is
written. With f = ELU + 1, M and z of the segments before t's own,

    read(x) = M^T f(x) / (z . f(x))      (0 where nothing is read)
    y_t = read(q_t)
    at a segment's end  M <- M + sum_t f(k_t) (v_t - read(k_t))^T,    z <- z + sum_t f(k_t)

M has one more column, z, and a segment in progress is summed apart: the state is that of `ops/infini.py`, but that the
sum joins M with the segment's last token, not with the next one's first. z grows even where nothing new is written: a
value written under one key segment after segment is read back as half of it.

Chunk form: along a grid of tokens, by `ops/minibatch.py`, with a segment as mini-batch: all that is read between two
ends of segments is read from the same M.

Given z, an update is affine in M, of transition I - sum f(k_t) f(k_t)^T / (z . f(k_t)). But z is itself a sum over all
segments before, so that spans compose in two scans, the second with matrices of 2K x 2K (M, and the segment in
progress) in place of the K x V that are passed on here: there is no transition, and devices take turns.

Reference: Munkhdalai et al., "Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention",
2024, section 2.1, equations 3 and 5 (the delta update).
"""

from __future__ import annotations

import jax.numpy as jnp

from longctx.ops import minibatch as grid
from longctx.ops.chunks import along
from longctx.ops.family import Recurrence, by_token
from longctx.ops.infini import LEAST, Inputs, Options, State, empty, features
from longctx.ops.products import einsum
from longctx.typing import Segments


def recurrent(inputs: Inputs, parameters: None, state: State, segments: Segments, options: Options):
    """The definition, token by token."""

    def elu(x):  # + 1, without the 1 that would round small ones away
        return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))

    def step(state, q, k, v, position):
        def read(x):
            total = jnp.einsum("bhk,bhkv->bhv", elu(x), state.memory, precision="highest")
            some = total[..., :1] > LEAST
            return jnp.where(some, total[..., 1:] / jnp.where(some, total[..., :1], 1), 0)

        row = jnp.concatenate([jnp.ones_like(v[..., :1]), v - read(k)], axis=-1)
        pending = state.pending + elu(k)[..., None] * row[..., None, :]
        ends = (position % options.segment == options.segment - 1)[:, None, None, None]
        after = State(jnp.where(ends, state.memory + pending, state.memory), jnp.where(ends, 0, pending))
        return read(q), after

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: None, state: State, segments: Segments, options: Options):
    """The same, segment by segment in matrix products."""
    y, state = grid.scan(_phase, state, inputs, segments, options.segment)
    return y.astype(inputs.v.dtype), state


def _phase(state: State, inputs, phase: grid.Phase):
    """Tokens that read the same memory: y, and the state after them."""
    q, k, v = inputs
    keys = features(k)
    rows = jnp.pad(v - _read(state.memory, keys), ((0, 0),) * 3 + ((1, 0),), constant_values=1)
    written = jnp.where(along(phase.counted, keys), keys, 0)
    pending = state.pending + einsum("bthk,bthv->bhkv", written, rows)
    complete = along(phase.complete, pending)
    after = State(jnp.where(complete, state.memory + pending, state.memory), jnp.where(complete, 0, pending))
    return _read(state.memory, features(q)), after


def _read(memory, x):
    total = einsum("bthk,bhkv->bthv", x, memory)
    some = total[..., :1] > LEAST
    return jnp.where(some, total[..., 1:] / jnp.where(some, total[..., :1], 1), 0)


INFINI_DELTA = Recurrence("infini_delta", Inputs, empty, recurrent, chunked, transition=None, options=Options)
