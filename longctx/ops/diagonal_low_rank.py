"""Matrix states whose transition is diagonal plus low rank, the core of RWKV-7.

Recurrence, for a matrix state S of K x V per head: the state decays by channel, and what it held at a_t is written to
b_t, beside the value at k_t,

    S_t = Diag(w_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T,    y_t = S_t^T q_t,    w_t = exp(log_decay_t)

Note that a_t reads the state before it decays, while the delta rule (`gated_delta`) reads it after. In the paper states
are transposed: S_t = S_{t-1} (Diag(w_t) + a_t b_t^T) + v_t k_t^T.

Chunk form. With c_i = sum of log_decay up to token i of the chunk, c_0 = 0, S the state before the chunk, and

    N_ij = sum_k a_ik b_jk exp(c_{i-1,k} - c_jk),  G_ij = sum_k a_ik k_jk exp(c_{i-1,k} - c_jk) for j < i, 0 elsewhere,
    A_ij = sum_k q_ik b_jk exp(c_ik - c_jk),       E_ij = sum_k q_ik k_jk exp(c_ik - c_jk) for j <= i, 0 elsewhere,

the rows R that the chunk reads at its a, R_i = S_{i-1}^T a_i, solve R = N R + G V + (exp(c_{i-1}) * a) S, so that with
T = (I - N)^-1 they are U + W S, where U = T G V and W = T (exp(c_{i-1}) * a), and

    y = (exp(c) * q) S + A R + E V,    S' = Diag(exp(c_C)) S + (exp(c_C - c) * b)^T R + (exp(c_C - c) * k)^T V.

Transition of a span: (M, B), S -> M S + B, as in `gated_delta`.

Reference: Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution", 2025, section on time mixing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.chunks import by_spans, cut_heads, join_heads
from longctx.ops.clock import BEFORE, Clock, decay, scores, start_clock
from longctx.ops.family import Options, Recurrence, by_token
from longctx.ops.gated_delta import Transition, apply, compose, empty, in_columns
from longctx.ops.products import einsum, unit_inverse
from longctx.typing import Segments


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: what is read from the state; neither scaled nor normalised here.
      k: where v is written.
      v: what is written.
      a: what is read from the state before it decays, to be written at b.
      b: where it is written. Diag(w) + b a^T must not expand, or the state may diverge.
      log_decay: at most 0; -inf is a decay of exactly 0.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    a: Float[Array, "B T H K"]
    b: Float[Array, "B T H K"]
    log_decay: Float[Array, "B T H K"]


def recurrent(inputs: Inputs, parameters: None, state: Float[Array, "B H K V"], segments: Segments, options: Options):
    """The definition, token by token."""

    def step(s, q, k, v, a, b, log_decay):
        read = jnp.sum(a[..., None] * s, axis=-2)
        s = jnp.exp(log_decay)[..., None] * s + b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
        return jnp.sum(q[..., None] * s, axis=-2), s

    return by_token(step, state, inputs, segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: None, state: Float[Array, "B H K V"], segments: Segments, options: Options):
    """The same, chunk by chunk in matrix products."""
    return by_spans(_span, state, inputs, segments, options.chunk)


def transition(inputs: Inputs, parameters: None, segments: Segments, options: Options) -> Transition:
    """What the span does to any state. It does not depend on q, and what is computed of it is dropped under `jit`."""
    return deferred(inputs, parameters, segments, options)[0]


def deferred(
    inputs: Inputs, parameters: None, segments: Segments, options: Options
) -> tuple[Transition, Callable[[Float[Array, "B H K V"]], Float[Array, "B T H V"]]]:
    """The span in one pass, before the state that enters it is known, as in `gated_delta`."""
    return in_columns(_span, inputs, segments, options)


def _span(s, q, k, v, a, b, log_decay, segments, chunk):
    """A few chunks: the state after them, and y."""
    valid, starts = segments.valid[..., None, None], segments.starts[..., None, None]
    k, b, a = jnp.where(valid, k, 0), jnp.where(valid, b, 0), jnp.where(starts, 0, a)
    keys, values, back = cut_heads(k, chunk), cut_heads(v, chunk), cut_heads(b, chunk)
    reads, clock = cut_heads(a, chunk), start_clock(log_decay, segments, chunk)
    # a_i meets the state after token i-1: its row stands there, and is moved down when its products are taken.
    ahead = jnp.pad(reads[..., 1:, :], ((0, 0),) * 3 + ((0, 1), (0, 0)))
    queries = cut_heads(q, chunk)
    rows, columns = jnp.concatenate([ahead, ahead, queries, queries]), jnp.concatenate([back, keys, back, keys])
    times = Clock(*(jnp.concatenate([leaf] * 4) for leaf in clock))
    products = jnp.split(scores(rows, columns, times), 4)
    inverse = unit_inverse(-_down(products[0]))
    from_start = decay(clock, BEFORE)
    fresh = einsum("nbhcd,nbhde,nbhev->nbhcv", inverse, _down(products[1]), values)
    held = einsum("nbhcd,nbhdk->nbhck", inverse, reads * _down(from_start, 1))
    left, total = decay(clock.last, clock), jnp.swapaxes(decay(clock.last, BEFORE), -1, -2)
    written = einsum("nbhck,nbhcv->nbhkv", keys * left, values)

    def step(s, chunk):
        fresh, held, out, written, total = chunk
        read = fresh + einsum("bhck,bhkv->bhcv", held, s)
        return total * s + einsum("bhck,bhcv->bhkv", out, read) + written, (s, read)

    s, (before, read) = jax.lax.scan(step, s, (fresh, held, back * left, written, total))
    y = einsum("nbhck,nbhkv->nbhcv", queries * from_start, before)
    y += einsum("nbhcd,nbhdv->nbhcv", products[2], read) + einsum("nbhcd,nbhdv->nbhcv", products[3], values)
    return s, join_heads(y, v, segments)


def _down(x, filler=0):
    """Each row moved to the next; `filler` in the first."""
    return jnp.pad(x[..., :-1, :], ((0, 0),) * 3 + ((1, 0), (0, 0)), constant_values=filler)


DIAGONAL_LOW_RANK = Recurrence(
    "diagonal_low_rank", Inputs, empty, recurrent, chunked, transition, compose, apply, deferred=deferred
)
