"""Gated linear attention: linear attention, RetNet, Mamba-2 (one decay per head) and GLA (one per key channel).

Recurrence, for a matrix state S of K x V per head:

    S_t = Diag(a_t) S_{t-1} + k_t v_t^T,    y_t = S_t^T q_t,    a_t = exp(log_decay_t)

Chunk form. With b_i = sum of log_decay up to token i of the chunk, S the state before the chunk, and

    A_ij = sum_k q_ik k_jk exp(b_ik - b_jk) for j <= i, 0 elsewhere,

    y_i = S^T (exp(b_i) * q_i) + sum_j A_ij v_j,    S' = Diag(exp(b_C)) S + sum_j (exp(b_C - b_j) * k_j) v_j^T.

A decay per head is a scalar in all of this and goes with the values, so that heads may share queries and keys.

Transition of a span: (a, B), S -> Diag(a) S + B, with (a_2, B_2) after (a_1, B_1) being (a_2 a_1, Diag(a_2) B_1 + B_2).

Reference: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2024, section 4; Dao
and Gu, "Transformers are SSMs", 2024, section 6.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.chunks import by_spans, cut_heads, join_heads
from longctx.ops.clock import BEFORE, decay, scores, start_clock
from longctx.ops.family import Options, Recurrence, by_token
from longctx.ops.products import einsum
from longctx.typing import Segments


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: what is read from the state; neither scaled nor normalised here. With a decay per head, each of G may serve
        H / G heads next to each other, and so may k.
      k: where v is written.
      v: what is written.
      log_decay: at most 0; -inf is a decay of exactly 0. Per head, or per head and key channel (then G = H).
    """

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"]


class Transition(NamedTuple):
    """What a span does to any state: S -> Diag(decay) S + state."""

    decay: Float[Array, "B H K"]
    state: Float[Array, "B H K V"]

    column_wise = True

    def transposed(self) -> Transition:
        """Its linear part is diagonal, and so its own transpose."""
        return self


def refusal(inputs: Inputs, parameters: None, options: Options) -> str | None:
    """Heads that cannot share q and k."""
    groups, heads = inputs.k.shape[2], inputs.v.shape[2]
    if heads % groups or (inputs.log_decay.ndim == 4 and groups != heads):
        return (
            f"q and k have {groups} heads, v has {heads} and log_decay is {list(inputs.log_decay.shape)}; the heads of "
            "q and k must divide those of v, and be as many where the decay is per channel."
        )
    return None


def empty(inputs: Inputs, parameters: None, options: Options) -> Float[Array, "B H K V"]:
    """S before any token."""
    return jnp.zeros((inputs.v.shape[0], inputs.v.shape[2], inputs.k.shape[3], inputs.v.shape[3]))


def recurrent(inputs: Inputs, parameters: None, state: Float[Array, "B H K V"], segments: Segments, options: Options):
    """The definition, token by token."""
    share = inputs.v.shape[2] // inputs.k.shape[2]

    def step(s, q, k, v, log_decay):
        q, k = (jnp.repeat(x, share, axis=1) for x in (q, k))
        decay = jnp.exp(log_decay)
        s = (decay[..., None] if decay.ndim == 2 else decay)[..., None] * s + k[..., None] * v[..., None, :]
        return jnp.sum(q[..., None] * s, axis=-2), s

    return by_token(step, state, inputs, segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: None, state: Float[Array, "B H K V"], segments: Segments, options: Options):
    """The same, chunk by chunk in matrix products."""
    return by_spans(_span, state, inputs, segments, options.chunk)


def transition(inputs: Inputs, parameters: None, segments: Segments, options: Options) -> Transition:
    """What the span does to any state.

    The decay is carried as one more column of the state, which starts as ones and is written with zeros.
    """
    inputs = inputs._replace(q=None, v=jnp.pad(inputs.v, ((0, 0), (0, 0), (0, 0), (1, 0))))
    column = empty(inputs, parameters, options).at[..., 0].set(1)
    _, s = by_spans(_span, column, inputs, segments, options.chunk)
    return Transition(s[..., 0], s[..., 1:])


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`."""
    return Transition(then.decay * first.decay, apply(then, first.state))


def apply(transition: Transition, state: Float[Array, "B H K V"]) -> Float[Array, "B H K V"]:
    """The state after the span, from the state before it."""
    return transition.decay[..., None] * state + transition.state


def _span(s, q, k, v, log_decay, segments, chunk):
    """A few chunks: the state after them, and y."""
    k = jnp.where(segments.valid[..., None, None], k, 0)
    keys, values, clock = cut_heads(k, chunk), cut_heads(v, chunk), start_clock(log_decay, segments, chunk)
    left, now = decay(clock.last, clock), decay(clock, BEFORE)
    if log_decay.ndim == 3:
        writes = _per_head("nbgck,nbgrcv->nbgrkv", keys, left * values)
    else:
        writes = einsum("nbhck,nbhcv->nbhkv", keys * left, values)
    total = jnp.swapaxes(decay(clock.last, BEFORE), -1, -2)
    s, before = jax.lax.scan(lambda s, chunk: (chunk[0] * s + chunk[1], s), s, (total, writes))
    if q is None:
        return s, None
    queries = cut_heads(q, chunk)
    if log_decay.ndim == 3:
        y = now * _per_head("nbgck,nbgrkv->nbgrcv", queries, before)
    else:
        y = einsum("nbhck,nbhkv->nbhcv", queries * now, before)
    y += einsum("nbhcd,nbhdv->nbhcv", scores(queries, keys, clock), values)
    return s, join_heads(y, v, segments)


def _per_head(equation, x, heads):
    """A product of what G groups share with what each of the H heads has."""
    groups = x.shape[2]
    y = einsum(equation, x, heads.reshape(*heads.shape[:2], groups, -1, *heads.shape[3:]))
    return y.reshape(*heads.shape[:3], *y.shape[4:])


GATED_LINEAR = Recurrence(
    "gated_linear", Inputs, empty, recurrent, chunked, transition, compose, apply, refusal=refusal
)
