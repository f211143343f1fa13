"""mLSTM, the matrix memory of xLSTM: an exponential input gate, a normaliser, and a stabiliser for both.

Recurrence, for a matrix memory C of K x V and a normaliser n of K per head, with i_t = exp(log_input_t) and
f_t = exp(log_forget_t):

    C_t = f_t C_{t-1} + i_t k_t v_t^T,    n_t = f_t n_{t-1} + i_t k_t,    y_t = C_t^T q_t / max(|n_t . q_t|, 1)

Both are held divided by exp(m_t). The result does not depend on the scale m, and no gradient flows through it:

    m_t = max(log f_t + m_{t-1}, log i_t, 0),
    C_t = exp(log f_t + m_{t-1} - m_t) C_{t-1} + exp(log i_t - m_t) k_t v_t^T,    n_t likewise,
    y_t = C_t^T q_t / max(|n_t . q_t|, exp(-m_t))

The paper's m_t has no 0: it may fall without end where the gates are small, and exp(-m_t) overflows. With it, all zeros
are the empty state, and the scale of a span does not depend on where the row was cut.

Chunk form. With b_i = sum of log_forget up to token i of the chunk, and (C, n, m) the state before the chunk,

    L_ij = b_i - b_j + log i_j for j <= i, -inf elsewhere,    m_i = max(b_i + m, max_j L_ij, 0),
    y_i  ~ exp(b_i + m - m_i) C^T q_i + sum_j exp(L_ij - m_i) (q_i . k_j) v_j,    n likewise, with ones for v,
    C'   = exp(b_C + m - m') C + sum_j exp(b_C - b_j + log i_j - m') k_j v_j^T,
    m'   = max(b_C + m, max_j (b_C - b_j + log i_j), 0)

Transition of a span: (f, s), what it leaves of log decay and the state s it makes of the empty one. Two states on one
memory add after both are divided by the larger scale: s' = s + f (state before), f' = f_1 + f_2.

Reference: Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024, section 2.3 and appendix A.3.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.chunks import by_spans, cut_heads, join_heads
from longctx.ops.clock import BEFORE, elapsed, start_clock
from longctx.ops.family import Options, Recurrence, by_token
from longctx.ops.products import einsum
from longctx.typing import Segments

# Of log forget gates. A decay must come out as 0 after it is multiplied by exp(m), so that this is far below
# gated_linear's; sums of 64 are still exact.
FLOOR = -4096.0
# Of m in exp(-m), below which |n . q| is rounding. The square of exp(-40), in the gradient, is not yet 0 in float32.
CEILING = 40.0


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: what is read from the memory; neither scaled nor normalised here.
      k: where v is written.
      v: what is written.
      log_input: log of the input gate, of either sign; -inf writes nothing.
      log_forget: log of the forget gate, at most 0; -inf forgets everything.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    log_input: Float[Array, "B T H"]
    log_forget: Float[Array, "B T H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """C exp(-m), n exp(-m) and m; all zeros are the empty state."""

    matrix: Float[Array, "B H K V"]
    normaliser: Float[Array, "B H K"]
    log_scale: Float[Array, "B H"]


class Transition(NamedTuple):
    """What a span does to any state: it decays it by exp(log_decay), to nothing where `keep` is 0, and adds `state`."""

    keep: Float[Array, "B 1"]
    log_decay: Float[Array, "B H"]
    state: State


def empty(inputs: Inputs, parameters: None, options: Options) -> State:
    """The memory before any token."""
    batch, _, heads, width = inputs.k.shape
    matrix = jnp.zeros((batch, heads, width, inputs.v.shape[3]))
    return State(matrix, matrix[..., 0], matrix[..., 0, 0])


def recurrent(inputs: Inputs, parameters: None, state: State, segments: Segments, options: Options):
    """The definition, token by token."""

    def step(state, q, k, v, log_input, log_forget):
        carried = log_forget + state.log_scale
        scale = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(carried, log_input), 0))
        forget, write = jnp.exp(carried - scale)[..., None], jnp.exp(log_input - scale)[..., None]
        matrix = forget[..., None] * state.matrix + (write * k)[..., None] * v[..., None, :]
        normaliser = forget * state.normaliser + write * k
        total = jnp.abs(jnp.sum(normaliser * q, axis=-1))
        total = jnp.maximum(total, jnp.exp(-jnp.minimum(scale, CEILING)))
        return jnp.sum(matrix * q[..., None], axis=-2) / total[..., None], State(matrix, normaliser, scale)

    return by_token(step, state, inputs, segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: None, state: State, segments: Segments, options: Options):
    """The same, chunk by chunk in matrix products."""
    # The normaliser is one more column of the memory, which is written with ones.
    columns = jnp.concatenate([state.matrix, state.normaliser[..., None]], axis=-1)
    carry = (columns, state.log_scale[..., None, None])
    y, (columns, scale) = by_spans(_span, carry, inputs, segments, options.chunk)
    return y, State(columns[..., :-1], columns[..., -1], scale[..., 0, 0])


def transition(inputs: Inputs, parameters: None, segments: Segments, options: Options) -> Transition:
    """What the span does to any state."""
    nothing = empty(inputs, parameters, options)
    _, state = chunked(inputs._replace(q=None), parameters, nothing, segments, options)
    log_forget = jnp.maximum(inputs.log_forget.astype(jnp.float32), FLOOR)
    log_decay = jnp.sum(jnp.where(segments.valid[..., None], log_forget, 0), axis=1)
    keep = 1 - jnp.any(segments.starts, axis=1, keepdims=True).astype(jnp.float32)
    return Transition(keep, log_decay, state)


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`."""
    return Transition(then.keep * first.keep, then.log_decay + first.log_decay, apply(then, first.state))


def apply(transition: Transition, state: State) -> State:
    """The state after the span, from the state before it."""
    carried = jnp.where(transition.keep > 0, transition.log_decay + state.log_scale, -jnp.inf)
    made = transition.state
    scale = jax.lax.stop_gradient(jnp.maximum(carried, made.log_scale))
    old, new = jnp.exp(carried - scale)[..., None], jnp.exp(made.log_scale - scale)[..., None]
    matrix = old[..., None] * state.matrix + new[..., None] * made.matrix
    return State(matrix, old * state.normaliser + new * made.normaliser, scale)


def _span(carry, q, k, v, log_input, log_forget, segments, chunk):
    """A few chunks: the columns and scale after them, and y."""
    k = jnp.where(segments.valid[..., None, None], k, 0)
    log_input = jnp.where(segments.valid[..., None], log_input, 0)
    values = jnp.concatenate([v.astype(jnp.float32), jnp.ones(v[..., :1].shape)], axis=-1)
    keys, values, gates = cut_heads(k, chunk), cut_heads(values, chunk), cut_heads(log_input[..., None], chunk)
    clock = start_clock(log_forget, segments, chunk, FLOOR)
    writes = elapsed(clock.last, clock) + gates
    made_scale = _scale(writes, axis=-2)
    made = einsum("nbhck,nbhcv->nbhkv", keys * jnp.exp(writes - made_scale), values)

    def step(carry, chunk):
        columns, scale = carry
        log_decay, made, made_scale = chunk
        carried = log_decay + scale
        after = jax.lax.stop_gradient(jnp.maximum(carried, made_scale))
        new = jnp.exp(carried - after) * columns + jnp.exp(made_scale - after) * made
        return (new, after), carry

    chunks = (elapsed(clock.last, BEFORE), made, made_scale)
    carry, (before, before_scale) = jax.lax.scan(step, carry, chunks)
    if q is None:
        return carry, None
    queries = cut_heads(q, chunk)
    row = type(clock)(*(jnp.swapaxes(leaf, -1, -2) for leaf in clock))
    weights = jnp.where(jnp.tri(chunk, dtype=bool), elapsed(clock, row) + jnp.swapaxes(gates, -1, -2), -jnp.inf)
    carried = elapsed(clock, BEFORE) + before_scale
    scale = jax.lax.stop_gradient(jnp.maximum(_scale(weights, axis=-1), carried))
    products = einsum("nbhck,nbhdk->nbhcd", queries, keys) * jnp.exp(weights - scale)
    y = einsum("nbhcd,nbhdv->nbhcv", products, values)
    y += einsum("nbhck,nbhkv->nbhcv", queries * jnp.exp(carried - scale), before)
    y = y[..., :-1] / jnp.maximum(jnp.abs(y[..., -1:]), jnp.exp(-jnp.minimum(scale, CEILING)))
    return carry, join_heads(y, v, segments)


def _scale(logs, axis):
    return jax.lax.stop_gradient(jnp.maximum(jnp.max(logs, axis=axis, keepdims=True), 0))


MLSTM = Recurrence("mlstm", Inputs, empty, recurrent, chunked, transition, compose, apply)
