"""sLSTM of xLSTM: a recurrence whose gates read the last output, with exponential input gates and a normaliser.

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
from jaxtyping import Array, Bool, Float

from longctx.ops.chunks import cut_beside, join_beside
from longctx.ops.family import Options, Recurrence, by_token
from longctx.ops.products import einsum
from longctx.typing import Segments

LARGEST = 1e30  # of pre-activations, either sign: differences of infinities are no numbers


class Inputs(NamedTuple):
    """Pre-activations of the input gate, the forget gate, the cell input and the output gate, without what the last
    output adds. y has their dtype.
    """

    wx: Float[Array, "B T 4 H K"]


class Parameters(NamedTuple):
    """Recurrent matrices of the four, in the same order."""

    r: Float[Array, "4 H K K"]


class State(NamedTuple):
    """Cell, normaliser, output and stabiliser after a token; zeros before any."""

    c: Float[Array, "B H K"]
    n: Float[Array, "B H K"]
    h: Float[Array, "B H K"]
    m: Float[Array, "B H K"]


def empty(inputs: Inputs, parameters: Parameters, options: Options) -> State:
    """The state before any token."""
    wx = inputs.wx
    return State(*(jnp.zeros((wx.shape[0], *wx.shape[3:])),) * 4)


def recurrent(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options: Options):
    """The definition, token by token."""
    r = parameters.r.astype(jnp.float32)

    def step(state, wx):
        c, n, h, m = state
        p = wx + jnp.einsum("bhk,ghkl->bghl", h, r, precision=jax.lax.Precision.HIGHEST)
        p_i, p_f, p_z, p_o = jnp.moveaxis(jnp.clip(p, -LARGEST, LARGEST), 1, 0)
        log_f = jnp.where(n == 0, -jnp.inf, jax.nn.log_sigmoid(p_f) + m)
        m = jnp.maximum(log_f, p_i)
        i, f = jnp.exp(p_i - m), jnp.exp(log_f - m)
        c, n = f * c + i * jnp.tanh(p_z), f * n + i
        h = jax.nn.sigmoid(p_o) * c / n
        return h, State(c, n, h, m)

    return by_token(step, state, inputs, segments, inputs.wx.dtype)


def chunked(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options: Options):
    """The same; a chunk is the number of tokens whose gates the backward pass holds at once."""
    (wx,), r = inputs, parameters.r.astype(jnp.float32)
    rows = cut_beside((wx.astype(jnp.float32), segments.starts, segments.valid), options.chunk, 1)
    rows = jax.tree.map(lambda leaf: leaf[:, :, 0], rows)
    state, h = jax.lax.scan(lambda state, rows: _light_span(state, *rows, r), state, rows)
    y = join_beside(h[:, :, None], wx.shape[1])
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


SLSTM = Recurrence("slstm", Inputs, empty, recurrent, chunked, transition=None, parameters=Parameters)
