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
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops import gated_delta
from longctx.ops.family import Options, Recurrence, by_token
from longctx.ops.gated_delta import Transition, apply, compose, empty
from longctx.typing import Segments


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: what is read from the state after the token's n steps; neither scaled nor normalised here.
      k: where each step writes; of norm 1 or less, or the rule may diverge.
      v: what each step writes.
      beta: how much of what the state holds at k a step replaces, 0 to 2.
      log_decay: of the state before the token's steps, at most 0; -inf is a decay of exactly 0.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T n H K"]
    v: Float[Array, "B T n H V"]
    beta: Float[Array, "B T n H"]
    log_decay: Float[Array, "B T H"]


def recurrent(inputs: Inputs, parameters: None, state: Float[Array, "B H K V"], segments: Segments, options: Options):
    """The definition, token by token."""

    def step(s, q, k, v, beta, log_decay):
        s = jnp.exp(log_decay)[..., None, None] * s
        for i in range(k.shape[1]):
            error = v[:, i] - jnp.sum(k[:, i, ..., None] * s, axis=-2)
            s += (beta[:, i, :, None] * k[:, i])[..., None] * error[..., None, :]
        return jnp.sum(q[..., None] * s, axis=-2), s

    return by_token(step, state, inputs, segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: None, state: Float[Array, "B H K V"], segments: Segments, options: Options):
    """The same, in chunks of C steps."""
    y, state = gated_delta.chunked(*_steps(inputs, parameters, state, segments), options)
    return _last(y, inputs), state


def transition(inputs: Inputs, parameters: None, segments: Segments, options: Options) -> Transition:
    """What the span does to any state, as in `gated_delta`."""
    return deferred(inputs, parameters, segments, options)[0]


def deferred(
    inputs: Inputs, parameters: None, segments: Segments, options: Options
) -> tuple[Transition, Callable[[Float[Array, "B H K V"]], Float[Array, "B T H V"]]]:
    """The span in one pass, before the state that enters it is known, as in `gated_delta`."""
    after, outputs = gated_delta.deferred(*_steps(inputs, parameters, segments), options)
    return after, lambda state: _last(outputs(state), inputs)


def _steps(inputs: Inputs, *others):
    """The same of n T steps for `gated_delta`: the first of each token decays, and starts its document."""
    batch, length, steps = inputs.k.shape[:3]
    *others, segments = others

    def flat(x):
        return x.reshape(batch, length * steps, *x.shape[3:])

    def first(x):
        return flat(jnp.pad(x[:, :, None], ((0, 0), (0, 0), (0, steps - 1)) + ((0, 0),) * (x.ndim - 2)))

    q, k, v, beta, log_decay = inputs
    inputs = gated_delta.Inputs(jnp.repeat(q, steps, axis=1), flat(k), flat(v), flat(beta), first(log_decay))
    ids, positions = (jnp.repeat(leaf, steps, axis=1) for leaf in (segments.ids, segments.positions))
    return inputs, *others, Segments(ids, positions, first(segments.starts))


def _last(y, inputs: Inputs):
    """The outputs of tokens, of those of their steps."""
    steps = inputs.k.shape[2]
    return y[:, steps - 1 :: steps]


GATED_DELTA_PRODUCT = Recurrence(
    "gated_delta_product", Inputs, empty, recurrent, chunked, transition, compose, apply, deferred=deferred
)
