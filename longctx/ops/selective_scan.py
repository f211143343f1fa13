"""Selective scan, the core of Mamba: a diagonal state-space model per channel whose step, B and C depend on the token.

Recurrence, for D channels with a state of N numbers each (A negative):

    h_t = exp(delta_t A) * h_{t-1} + (delta_t x_t) b_t^T,    y_t = h_t c_t

Chunk form. What a chunk does to a state is elementwise affine: its decay is exp(A sum_t delta_t), what it writes is its
last state from the zero state. All chunks step through their tokens together to find it, a scan over chunks carries the
state, and all chunks step through their tokens again, from the state before them, to give y. Where a state is so large
that chunks are not worked on side by side, a chunk is read once. A row is cut into spans, which take turns: the states
of tokens are never held, but those of one span in its backward pass.

Transition of a span: (a, B), h -> a * h + B elementwise; (a_2, B_2) after (a_1, B_1) is (a_2 a_1, a_2 B_1 + B_2).

Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, algorithm 2, with the
simplified discretisation of B in the authors' code: delta_t b_t.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.chunks import cut_beside, join_beside
from longctx.ops.family import Options, Recurrence, by_token
from longctx.ops.products import einsum
from longctx.ops.sizes import sizes
from longctx.typing import Segments


class Inputs(NamedTuple):
    """y has the dtype of x.

    Attributes:
      x: inputs.
      delta: steps, at least 0; a step of 0 leaves the state as it is.
      b: where inputs are written.
      c: what is read from the state.
    """

    x: Float[Array, "B T D"]
    delta: Float[Array, "B T D"]
    b: Float[Array, "B T N"]
    c: Float[Array, "B T N"]


class Parameters(NamedTuple):
    """Rates of the continuous system, at most 0."""

    a: Float[Array, "D N"]


class Transition(NamedTuple):
    """What a span does to any state: h -> decay * h + state."""

    decay: Float[Array, "B D N"]
    state: Float[Array, "B D N"]

    column_wise = False

    def transposed(self) -> Transition:
        """Its linear part is diagonal, and so its own transpose."""
        return self


def empty(inputs: Inputs, parameters: Parameters, options: Options) -> Float[Array, "B D N"]:
    """h before any token."""
    return jnp.zeros((inputs.x.shape[0], *parameters.a.shape))


def recurrent(
    inputs: Inputs, parameters: Parameters, state: Float[Array, "B D N"], segments: Segments, options: Options
):
    """The definition, token by token."""

    def step(h, x, delta, b, c):
        h = jnp.exp(delta[..., None] * parameters.a) * h + (delta * x)[..., None] * b[:, None]
        return jnp.sum(h * c[:, None], axis=-1), h

    return by_token(step, state, inputs, segments, inputs.x.dtype)


def chunked(inputs: Inputs, parameters: Parameters, state: Float[Array, "B D N"], segments: Segments, options: Options):
    """The same, chunks side by side."""
    (a,) = parameters

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def span(h, rows):
        if rows[0].shape[1] == 1:  # a chunk alone is read once
            h, y = _states(h[None], *rows, a)
            return h[0], y
        h, before = jax.lax.scan(lambda h, chunk: (apply(chunk, h), h), h, _ends(*rows, a))
        return h, _states(before, *rows, a)[1]

    state, y = jax.lax.scan(span, state, _spans(inputs, a, segments, options))
    y = join_beside(y, inputs.x.shape[1])
    return jnp.where(segments.valid[..., None], y, 0).astype(inputs.x.dtype), state


def transition(inputs: Inputs, parameters: Parameters, segments: Segments, options: Options) -> Transition:
    """What the span does to any state."""
    (a,), zeros = parameters, empty(inputs, parameters, options)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def span(before, rows):
        return jax.lax.scan(lambda before, chunk: (compose(before, chunk), None), before, _ends(*rows, a))

    nothing = Transition(jnp.ones_like(zeros), zeros)
    return jax.lax.scan(span, nothing, _spans(inputs._replace(c=None), a, segments, options))[0]


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`."""
    return Transition(then.decay * first.decay, apply(then, first.state))


def apply(transition: Transition, state: Float[Array, "B D N"]) -> Float[Array, "B D N"]:
    """The state after the span, from the state before it."""
    return transition.decay * state + transition.state


def _spans(inputs: Inputs, a, segments: Segments, options: Options):
    """The tokens in float32, cut into spans; padding has a step of 0."""
    x, delta, b, c = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tuple(inputs))
    delta = jnp.where(segments.valid[..., None], delta, 0)
    return cut_beside((x, delta, b, c, segments.starts), options.chunk, sizes().states // (x.shape[0] * a.size))


def _ends(x, delta, b, c, starts, a):
    """What each chunk of a span does to a state."""
    zeros = jnp.zeros((*x.shape[1:], a.shape[1]))
    decay = jnp.exp(jnp.sum(delta, axis=0)[..., None] * a)
    decay = jnp.where(jnp.any(starts, axis=0)[..., None, None], 0, decay)
    return Transition(decay, _states(zeros, x, delta, b, None, starts, a)[0])


def _states(h, x, delta, b, c, starts, a):
    """The states after a span's chunks, from those before them, and y. The backward pass keeps the states alone."""
    # A spread over the chunks has its gradient summed over them once, not at every token; and products in place of sums
    # have products for gradients, which XLA:CPU takes in less time than sums.
    a, ones = jnp.broadcast_to(a, h.shape), jnp.ones(a.shape[1])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(h, token):
        x, delta, b, c, start = token
        decay = jnp.where(start[..., None, None], 0, jnp.exp(einsum("nbd,s->nbds", delta, ones) * a))
        h = decay * h + einsum("nbd,nbs->nbds", delta * x, b)
        return h, None if c is None else einsum("nbds,nbs->nbd", h, c)

    return jax.lax.scan(step, h, (x, delta, b, c, starts))


SELECTIVE_SCAN = Recurrence(
    "selective_scan", Inputs, empty, recurrent, chunked, transition, compose, apply, parameters=Parameters
)
