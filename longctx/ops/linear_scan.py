"""Elementwise linear recurrence, the core of S5, LRU, RG-LRU and HGRN.

Recurrence, for a vector state of N independent channels:

    s_t = a_t s_{t-1} + x_t,    y_t = s_t,    a_t = exp(log_decay_t)

All of it real (RG-LRU, HGRN) or complex (S5, LRU: an imaginary part of the log decay rotates the state).

Chunk form. Within a chunk the state is affine in the state s before it:

    s_t = A_t s + b_t,    A_t = a_t A_{t-1},    b_t = a_t b_{t-1} + x_t,    A_0 = 1,    b_0 = 0

so that all chunks step through their C tokens together to (A_C, b_C); a scan over the T / C chunks carries the state;
and all chunks step through their tokens again, from the state before them: 2 C + T / C steps in sequence instead of T.
Products of decays are only ever multiplied up, never divided. A long row is cut into spans, which take turns.

Transition of a span: (a, b), s -> a s + b, with (a_2, b_2) after (a_1, b_1) being (a_2 a_1, a_2 b_1 + b_2).

Reference: Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", 2018, equation 5; De et
al., "Griffin", 2024, equation 4.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from longctx.ops.chunks import cut_beside, join_beside
from longctx.ops.family import Options, Recurrence, by_token
from longctx.ops.sizes import sizes
from longctx.typing import Segments


class Inputs(NamedTuple):
    """y has the dtype of x; the state is float32, or complex64 where x is.

    Attributes:
      x: what is added to the state; complex64 where the log decay is.
      log_decay: its real part is at most 0; -inf is a decay of exactly 0.
    """

    x: Inexact[Array, "B T N"]
    log_decay: Inexact[Array, "B T N"]


class Transition(NamedTuple):
    """What a span does to any state: s -> decay * s + state."""

    decay: Inexact[Array, "B N"]
    state: Inexact[Array, "B N"]

    column_wise = False

    def transposed(self) -> Transition:
        """Its linear part is diagonal, and so its own transpose."""
        return self


def empty(inputs: Inputs, parameters: None, options: Options) -> Inexact[Array, "B N"]:
    """s before any token."""
    x = inputs.x
    return jnp.zeros((x.shape[0], x.shape[2]), jnp.promote_types(x.dtype, jnp.float32))


def recurrent(inputs: Inputs, parameters: None, state: Inexact[Array, "B N"], segments: Segments, options: Options):
    """The definition, token by token."""

    def step(s, x, log_decay):
        s = jnp.exp(log_decay) * s + x
        return s, s

    return by_token(step, state, inputs, segments, inputs.x.dtype)


def chunked(inputs: Inputs, parameters: None, state: Inexact[Array, "B N"], segments: Segments, options: Options):
    """The same, chunks side by side."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def span(s, rows):
        rows = (rows[0], jnp.exp(rows[1]))
        s, before = jax.lax.scan(lambda s, chunk: (apply(chunk, s), s), s, _ends(*rows))
        return s, jax.lax.scan(lambda s, token: (token[1] * s + token[0],) * 2, before, rows)[1]

    state, y = jax.lax.scan(span, state, _spans(inputs, segments, options))
    y = join_beside(y, inputs.x.shape[1])
    return jnp.where(segments.valid[..., None], y, 0).astype(inputs.x.dtype), state


def transition(inputs: Inputs, parameters: None, segments: Segments, options: Options) -> Transition:
    """What the span does to any state."""
    zeros = empty(inputs, parameters, options)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def span(before, rows):
        ends = _ends(rows[0], jnp.exp(rows[1]))
        return jax.lax.scan(lambda before, chunk: (compose(before, chunk), None), before, ends)

    nothing = Transition(jnp.ones_like(zeros, _wide(inputs.log_decay)), zeros)
    return jax.lax.scan(span, nothing, _spans(inputs, segments, options))[0]


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`."""
    return Transition(then.decay * first.decay, apply(then, first.state))


def apply(transition: Transition, state: Inexact[Array, "B N"]) -> Inexact[Array, "B N"]:
    """The state after the span, from the state before it."""
    return transition.decay * state + transition.state


def _spans(inputs: Inputs, segments: Segments, options: Options):
    """What is added and the log decays, so that documents and padding need no more care; cut into spans."""
    x, log_decay = (leaf.astype(_wide(leaf)) for leaf in inputs)
    starts, valid = segments.starts[..., None], segments.valid[..., None]
    x = jnp.where(valid, x, 0)
    log_decay = jnp.where(valid, jnp.where(starts, -jnp.inf, log_decay), 0)
    most = max(sizes().beside, sizes().vectors // (options.chunk * x[:, 0].size))
    return cut_beside((x, log_decay), options.chunk, most)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _ends(x, decay):
    """What each chunk of a span does to a state: all chunks step together, from their first token to their last."""

    def step(before, token):
        return Transition(token[1] * before.decay, token[1] * before.state + token[0]), None

    return jax.lax.scan(step, Transition(jnp.ones_like(decay[0]), jnp.zeros_like(x[0])), (x, decay))[0]


LINEAR_SCAN = Recurrence("linear_scan", Inputs, empty, recurrent, chunked, transition, compose, apply)
