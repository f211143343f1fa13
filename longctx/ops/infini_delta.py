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
progress) in place of the K x V that are handed on here: there is no transition, and devices take turns.

Reference: Munkhdalai et al., "Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention",
2024, section 2.1, equations 3 and 5 (the delta update).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops import minibatch as grid
from longctx.ops.gated_linear import einsum
from longctx.ops.infini import LEAST, State, features, zeros
from longctx.typing import Segments, checked

transition = None  # states do not compose: devices take turns


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
    """The definition, token by token; arguments and what it returns as `infini.recurrent`."""
    segments = Segments.of(segment_ids, *k.shape[:2])

    def elu(x):  # + 1, without the 1 that would round small ones away
        return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))

    def step(state, token):
        q, k, v, start, ends, valid = token
        memory, pending = (jnp.where(start, 0, s) for s in state)

        def read(x):
            total = jnp.einsum("bhk,bhkv->bhv", elu(x), memory, precision="highest")
            some = total[..., :1] > LEAST
            return jnp.where(some, total[..., 1:] / jnp.where(some, total[..., :1], 1), 0)

        row = jnp.concatenate([jnp.ones_like(v[..., :1]), v - read(k)], axis=-1)
        pending = pending + elu(k)[..., None] * row[..., None, :]
        after = State(jnp.where(ends, memory + pending, memory), jnp.where(ends, 0, pending))
        state = jax.tree.map(lambda new, old: jnp.where(valid, new, old), after, state)
        return state, jnp.where(valid[..., 0], read(q), 0)

    ends = segments.positions % segment == segment - 1
    flags = (x[..., None, None, None] for x in (segments.starts, ends, segments.valid))
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
    *,
    segment: int,
) -> tuple[Float[Array, "B T H V"], State]:
    """The same as `recurrent`, segment by segment in matrix products."""
    state = zeros(k, v) if state is None else state
    y, state = grid.scan(_phase, state, (q, k, v), segment_ids, segment)
    return y.astype(v.dtype), state


def _phase(state: State, inputs, phase: grid.Phase):
    """Tokens that read the same memory: y, and the state after them."""
    q, k, v = inputs
    keys = features(k)
    rows = jnp.pad(v - _read(state.memory, keys), ((0, 0),) * 3 + ((1, 0),), constant_values=1)
    written = jnp.where(grid.along(phase.counted, keys), keys, 0)
    pending = state.pending + einsum("bthk,bthv->bhkv", written, rows)
    complete = grid.along(phase.complete, pending)
    after = State(jnp.where(complete, state.memory + pending, state.memory), jnp.where(complete, 0, pending))
    return _read(state.memory, features(q)), after


def _read(memory, x):
    total = einsum("bthk,bhkv->bthv", x, memory)
    some = total[..., :1] > LEAST
    return jnp.where(some, total[..., 1:] / jnp.where(some, total[..., :1], 1), 0)
