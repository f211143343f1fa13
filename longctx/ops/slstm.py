"""sLSTM of xLSTM: a recurrence whose gates see the last output, with exponential input gates and a normaliser.

Recurrence per head, for vectors of K channels; R holds a K x K matrix for each of the gates i, f, z, o:

    p_t = wx_t + h_{t-1} R
    i_t = exp(p_t^i),    f_t = sigmoid(p_t^f),    z_t = tanh(p_t^z),    o_t = sigmoid(p_t^o)
    c_t = f_t c_{t-1} + i_t z_t,    n_t = f_t n_{t-1} + i_t,    h_t = o_t c_t / n_t

It is computed with c and n divided by exp(m_t), m_t = max(log f_t + m_{t-1}, log i_t), so that nothing overflows.

The state is (c, n, h, m), and all zeros is the empty one: from the first token on, n is at least 1, so that n = 0 says
that there is nothing to carry, and m is not read.

Chunk form. None that saves steps: gates depend on h_{t-1}, and so the recurrence takes T steps one after another. The
fast form keeps for its backward pass the states between chunks only, and has the gradient of R from one matrix product
a chunk. For the same reason spans have no transition: devices that share a sequence take turns.

Reference: Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024, equations 8 to 17.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longctx.ops.gated_linear import einsum
from longctx.ops.linear_scan import cut, join
from longctx.typing import Segments, checked

transition = None  # states do not compose: devices take turns

LARGEST = 1e30  # of pre-activations, either sign: differences of infinities are no numbers


class State(NamedTuple):
    """Cell, normaliser, output and stabiliser after a token; zeros before any."""

    c: Float[Array, "B H K"]
    n: Float[Array, "B H K"]
    h: Float[Array, "B H K"]
    m: Float[Array, "B H K"]


@checked
def recurrent(
    wx: Float[Array, "B T 4 H K"],
    r: Float[Array, "4 H K K"],
    state: State | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
) -> tuple[Float[Array, "B T H K"], State]:
    """The definition, token by token.

    Args:
      wx: pre-activations of the input gate, the forget gate, the cell input and the output gate, without what the
        last output adds.
      r: recurrent matrices of the four, in the same order.
      state: before the span, None for the empty one.
      segment_ids: documents of a packed row. A document's start forgets everything before it; padding leaves the
        state unchanged and gives 0.

    Returns:
      y in the dtype of wx, and the state after the span, float32.
    """
    segments = Segments.of(segment_ids, *wx.shape[:2])

    def step(state, token):
        wx, start, valid = token
        c, n, h, m = (jnp.where(start, 0, leaf) for leaf in state)
        p = wx + jnp.einsum("bhk,ghkl->bghl", h, r.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        p_i, p_f, p_z, p_o = jnp.moveaxis(jnp.clip(p, -LARGEST, LARGEST), 1, 0)
        log_f = jnp.where(n == 0, -jnp.inf, jax.nn.log_sigmoid(p_f) + m)
        m = jnp.maximum(log_f, p_i)
        i, f = jnp.exp(p_i - m), jnp.exp(log_f - m)
        c, n = f * c + i * jnp.tanh(p_z), f * n + i
        after = State(c, n, jax.nn.sigmoid(p_o) * c / n, m)
        state = jax.tree.map(lambda new, old: jnp.where(valid, new, old), after, state)
        return state, jnp.where(valid, state.h, 0)

    tokens = (wx.astype(jnp.float32), segments.starts[..., None, None], segments.valid[..., None, None])
    state = _float32(wx, state)
    state, y = jax.lax.scan(step, state, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(wx.dtype), state


@checked
def chunked(
    wx: Float[Array, "B T 4 H K"],
    r: Float[Array, "4 H K K"],
    state: State | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T H K"], State]:
    """The same as `recurrent`; `chunk` is the number of tokens whose gates the backward pass holds at once."""
    segments = Segments.of(segment_ids, *wx.shape[:2])
    leaves = cut((wx.astype(jnp.float32), segments.starts, segments.valid), chunk, 1)
    spans = jax.tree.map(lambda leaf: leaf[:, :, 0], leaves)
    r = r.astype(jnp.float32)
    state, h = jax.lax.scan(lambda state, leaves: _light_span(state, *leaves, r), _float32(wx, state), spans)
    y = join(h[:, :, None], wx.shape[1])
    return jnp.where(segments.valid[..., None, None], y, 0).astype(wx.dtype), state


def _span(
    state: State,
    wx: Float[Array, "C B 4 H K"],
    starts: Bool[Array, "C B"],
    valid: Bool[Array, "C B"],
    r: Float[Array, "4 H K K"],
) -> tuple[State, Float[Array, "C B H K"]]:
    """The state after a chunk, and h after each token."""
    # One product per head gives all four gates.
    r = jnp.moveaxis(r, 0, 2)

    def step(state, token):
        wx, start, valid = token
        start, valid = start[:, None, None], valid[:, None, None]
        gates = wx + einsum("bhk,hkgl->bghl", jnp.where(start, 0, state.h), r)
        write, keep, new, show = (jnp.clip(gates[:, g], -LARGEST, LARGEST) for g in range(4))
        carried = jnp.where(start | (state.n == 0), -jnp.inf, state.m - jax.nn.softplus(-keep))
        m = jnp.maximum(carried, write)
        write, keep = jnp.exp(write - m), jnp.exp(carried - m)
        c = keep * state.c + write * jnp.tanh(new)
        n = keep * state.n + write
        after = State(c, n, jax.nn.sigmoid(show) * c / n, m)
        state = State(*(jnp.where(valid, *pair) for pair in zip(after, state, strict=True)))
        return state, state.h

    return jax.lax.scan(step, state, (wx, starts, valid))


def _forward(*arguments):
    return _span(*arguments), arguments


def _backward(kept, gradients):
    """The gradient of R is that of the pre-activations times the outputs before them, for all tokens in one product."""
    state, wx, starts, valid, r = kept
    (_, h), pull = jax.vjp(lambda state, wx: _span(state, wx, starts, valid, r), state, wx)
    to_state, to_wx = pull(gradients)
    before = jnp.where(starts[..., None, None], 0, jnp.concatenate([state.h[None], h[:-1]]))
    return to_state, to_wx, None, None, einsum("cbhk,cbghl->ghkl", before, to_wx)


_light_span = jax.custom_vjp(_span)
_light_span.defvjp(_forward, _backward)


def _float32(wx, state):
    zeros = jnp.zeros((wx.shape[0], *wx.shape[3:]))
    return State(*(zeros,) * 4) if state is None else State(*(leaf.astype(jnp.float32) for leaf in state))
