"""The gated delta rule: DeltaNet (no decay), Gated DeltaNet (one decay per head) and KDA (one per key channel).

Recurrence, for a matrix state S of K x V per head: the state decays, then what it holds at k_t moves towards v_t,

    S <- Diag(a_t) S,    S <- S + beta_t k_t (v_t - S^T k_t)^T,    y_t = S^T q_t,    a_t = exp(log_decay_t)

Chunk form. With b_i = sum of log_decay up to token i of the chunk, S the state before the chunk, and

    N_ij = beta_i sum_k k_ik k_jk exp(b_ik - b_jk) for j < i,    A_ij = sum_k q_ik k_jk exp(b_ik - b_jk) for j <= i,
    T = (I + N)^-1,    U = T (beta v),    W = T (beta exp(b) * k),

the rows that the chunk really adds are U - W S, and

    y = (exp(b) * q) S + A (U - W S),    S' = Diag(exp(b_C)) S + (exp(b_C - b) * k)^T (U - W S).

Transition of a span: (M, B), S -> M S + B, with (M_2, B_2) after (M_1, B_1) being (M_2 M_1, M_2 B_1 + B_2).

The span before S is known: from the state [I, 0], with values [0, v], it leaves [M, B] and puts out rows [r_t, y_t],
and from S it puts out y_t + S^T r_t. So one pass over a device's tokens is enough, whatever comes from those before.

Reference: Yang et al., "Gated Delta Networks", 2025, section 3.3; Kimi Team, "Kimi Linear", 2025, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.chunks import by_spans, cut_heads, join_heads
from longctx.ops.clock import BEFORE, decay, scores, start_clock
from longctx.ops.family import Options, Recurrence, by_token
from longctx.ops.products import einsum, unit_inverse
from longctx.typing import Segments


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: what is read from the state; neither scaled nor normalised here.
      k: where v is written; of norm 1 or less, or the rule may diverge.
      v: what is written.
      beta: how much of what the state holds at k is replaced, 0 to 1 (2 with negative eigenvalues).
      log_decay: at most 0; -inf is a decay of exactly 0. Per head, or per head and key channel.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    beta: Float[Array, "B T H"]
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"]


class Transition(NamedTuple):
    """What a span does to any state: S -> matrix S + state."""

    matrix: Float[Array, "B H K K"]
    state: Float[Array, "B H K V"]

    column_wise = True

    def transposed(self) -> Transition:
        """With the transpose of its linear part."""
        return self._replace(matrix=jnp.swapaxes(self.matrix, -1, -2))


def empty(inputs, parameters: None, options: Options) -> Float[Array, "B H K V"]:
    """S before any token, of inputs that have keys k and values v."""
    batch, heads, width = (inputs.k.shape[axis] for axis in (0, -2, -1))
    return jnp.zeros((batch, heads, width, inputs.v.shape[-1]))


def recurrent(inputs: Inputs, parameters: None, state: Float[Array, "B H K V"], segments: Segments, options: Options):
    """The definition, token by token."""

    def step(s, q, k, v, beta, log_decay):
        decay = jnp.exp(log_decay)
        s = (decay[..., None] if decay.ndim == 2 else decay)[..., None] * s
        error = v - jnp.sum(k[..., None] * s, axis=-2)
        s += (beta[..., None] * k)[..., None] * error[..., None, :]
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
    """The span in one pass, before the state that enters it is known: what it does to any, and y as a function of it.

    M is carried as K more columns of the state, which start as the identity and are written with zeros. What a token
    reads of these columns it reads of the state that enters.
    """
    return in_columns(_span, inputs, segments, options)


def in_columns(span: Callable, inputs, segments: Segments, options: Options):
    """`deferred` of a family whose `span`, as that of `by_spans`, treats all columns of states and values alike."""
    dtype, width = inputs.v.dtype, inputs.k.shape[-1]

    def beside(s, q, k, v, *others):
        v = jnp.pad(v.astype(jnp.float32), ((0, 0), (0, 0), (0, 0), (width, 0)))
        return span(s, q, k, v, *others)

    zeros = empty(inputs, None, options)
    identity = jnp.broadcast_to(jnp.eye(width), (*zeros.shape[:2], width, width))
    y, s = by_spans(beside, jnp.concatenate([identity, zeros], axis=-1), inputs, segments, options.chunk)

    def outputs(state):
        reads, own = jnp.split(y, [width], axis=-1)
        return (own + einsum("bthk,bhkv->bthv", reads, state)).astype(dtype)

    return Transition(s[..., :width], s[..., width:]), outputs


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`."""
    return Transition(einsum("bhij,bhjk->bhik", then.matrix, first.matrix), apply(then, first.state))


def apply(transition: Transition, state: Float[Array, "B H K V"]) -> Float[Array, "B H K V"]:
    """The state after the span, from the state before it."""
    return einsum("bhij,bhjv->bhiv", transition.matrix, state) + transition.state


def _span(s, q, k, v, beta, log_decay, segments, chunk):
    """A few chunks: the state after them, and y."""
    k = jnp.where(segments.valid[..., None, None], k, 0)
    keys, values, clock = cut_heads(k, chunk), cut_heads(v, chunk), start_clock(log_decay, segments, chunk)
    strength = cut_heads(beta[..., None], chunk)
    inverse = unit_inverse(jnp.tril(strength * scores(keys, keys, clock), -1)) * jnp.swapaxes(strength, -1, -2)
    fresh = einsum("nbhcd,nbhdv->nbhcv", inverse, values)
    erased = einsum("nbhcd,nbhdk->nbhck", inverse, decay(clock, BEFORE) * keys)
    out, total = keys * decay(clock.last, clock), jnp.swapaxes(decay(clock.last, BEFORE), -1, -2)

    def step(s, chunk):
        fresh, erased, out, total = chunk
        rows = fresh - einsum("bhck,bhkv->bhcv", erased, s)
        return total * s + einsum("bhck,bhcv->bhkv", out, rows), (s, rows)

    s, (before, rows) = jax.lax.scan(step, s, (fresh, erased, out, total))
    queries = cut_heads(q, chunk)
    y = einsum("nbhck,nbhkv->nbhcv", queries * decay(clock, BEFORE), before)
    y += einsum("nbhcd,nbhdv->nbhcv", scores(queries, keys, clock), rows)
    return s, join_heads(y, v, segments)


GATED_DELTA = Recurrence(
    "gated_delta", Inputs, empty, recurrent, chunked, transition, compose, apply, deferred=deferred
)
