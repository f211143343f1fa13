"""Gated DeltaProduct: n steps of the delta rule per token, so that a token may turn the state, not only reflect it.

Recurrence, for a matrix state S of K x V per head: the state decays once, moves n times, and is read once,

    S <- a_t S,    S <- S + beta_ti k_ti (v_ti - S^T k_ti)^T for i = 1, ..., n,    y_t = S^T q_t

so that S_t = H_tn ... H_t1 a_t S_{t-1} + writes, with H_ti = I - beta_ti k_ti k_ti^T. With beta_ti up to 2 they
are reflections, of which n make any rotation of n dimensions.

Chunk form and transition: those of `gated_delta` on n T steps in place of T tokens, of which the first of each token
decays and the last is read.

Reference: Siems et al., "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", 2025,
section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops import gated_delta
from longctx.ops.gated_delta import Transition, apply, compose
from longctx.typing import Segments, checked

__all__ = ["Transition", "apply", "chunked", "compose", "deferred", "recurrent", "transition"]


@checked
def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T n H K"],
    v: Float[Array, "B T n H V"],
    beta: Float[Array, "B T n H"],
    log_decay: Float[Array, "B T H"],
    state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The definition, token by token.

    Args:
      q: what is read from the state after the token's n steps; neither scaled nor normalised here.
      k: where each step writes; of norm 1 or less, or the rule may diverge.
      v: what each step writes.
      beta: how much of what the state holds at k a step replaces, 0 to 2.
      log_decay: of the state before the token's steps, at most 0; -inf is a decay of exactly 0.
      state: before the span, None for zeros.
      segment_ids: documents of a packed row. A document's start forgets everything before it; padding leaves the
        state unchanged and gives 0.

    Returns:
      y in the dtype of v, and the state after the span, float32.
    """
    batch, length, steps, heads, width = k.shape
    segments = Segments.of(segment_ids, batch, length)

    def token(s, inputs):
        q, k, v, beta, decay, start, valid = inputs
        after = jnp.where(start, 0, decay)[..., None] * s
        for i in range(steps):
            error = v[:, i] - jnp.sum(k[:, i, ..., None] * after, axis=-2)
            after += (beta[:, i] * k[:, i])[..., None] * error[..., None, :]
        s = jnp.where(valid[..., None], after, s)
        return s, jnp.where(valid, jnp.sum(q[..., None] * s, axis=-2), 0)

    decay = jnp.exp(log_decay.astype(jnp.float32))[..., None]
    tokens = (*(leaf.astype(jnp.float32) for leaf in (q, k, v, beta[..., None])), decay)
    tokens += (segments.starts[..., None, None], segments.valid[..., None, None])
    empty = jnp.zeros((batch, heads, width, v.shape[-1]))
    s = empty if state is None else state.astype(jnp.float32)
    s, y = jax.lax.scan(token, s, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), s


@checked
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T n H K"],
    v: Float[Array, "B T n H V"],
    beta: Float[Array, "B T n H"],
    log_decay: Float[Array, "B T H"],
    state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The same as `recurrent`, in chunks of C steps; `chunk` is C, a power of two."""
    *inputs, segments = _steps(q, k, v, beta, log_decay, segment_ids)
    y, state = gated_delta.chunked(*inputs, state, segments, chunk)
    return y[:, k.shape[2] - 1 :: k.shape[2]], state


@checked
def transition(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T n H K"],
    v: Float[Array, "B T n H V"],
    beta: Float[Array, "B T n H"],
    log_decay: Float[Array, "B T H"],
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> Transition:
    """What the span does to any state, as in `gated_delta`."""
    return deferred(q, k, v, beta, log_decay, segment_ids, chunk)[0]


@checked
def deferred(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T n H K"],
    v: Float[Array, "B T n H V"],
    beta: Float[Array, "B T n H"],
    log_decay: Float[Array, "B T H"],
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> tuple[Transition, Callable[[Float[Array, "B H K V"]], Float[Array, "B T H V"]]]:
    """The span in one pass, before the state that enters it is known, as in `gated_delta`."""
    *inputs, segments = _steps(q, k, v, beta, log_decay, segment_ids)
    after, outputs = gated_delta.deferred(*inputs, segments, chunk)
    return after, lambda state: outputs(state)[:, k.shape[2] - 1 :: k.shape[2]]


def _steps(q, k, v, beta, log_decay, segment_ids):
    """The inputs of `gated_delta` on n T steps: the first of each token decays, and starts its document."""
    batch, length, steps = k.shape[:3]

    def flat(x):
        return x.reshape(batch, length * steps, *x.shape[3:])

    def first(x):
        return flat(jnp.pad(x[:, :, None], ((0, 0), (0, 0), (0, steps - 1)) + ((0, 0),) * (x.ndim - 2)))

    if segment_ids is not None:
        segments = Segments.of(segment_ids, batch, length)
        ids, positions = (jnp.repeat(leaf, steps, axis=1) for leaf in (segments.ids, segments.positions))
        segment_ids = Segments(ids, positions, first(segments.starts))
    return jnp.repeat(q, steps, axis=1), flat(k), flat(v), flat(beta), first(log_decay), segment_ids
