"""Selective scan, the core of Mamba: a diagonal state-space model per channel whose step, B and C depend on the token.

Recurrence, for D channels with a state of N numbers each (A negative):

    h_t = exp(delta_t A) * h_{t-1} + (delta_t x_t) b_t^T,    y_t = h_t c_t

Chunk form. What a chunk does to a state is elementwise affine: its decay is exp(A sum_t delta_t), what it writes is its
last state from the zero state. All chunks step through their tokens together to find it, a scan over chunks carries the
state, and all chunks step through their tokens again, from the state before them, to give y. A row is cut into spans,
which take turns: the states of tokens are never held, but those of one span in its backward pass.

Transition of a span: (a, B), h -> a * h + B elementwise; (a_2, B_2) after (a_1, B_1) is (a_2 a_1, a_2 B_1 + B_2).

Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, algorithm 2, with the
simplified discretisation of B in the authors' code: delta_t b_t.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.gated_linear import einsum
from longctx.ops.linear_scan import cut, join
from longctx.typing import Segments, checked

NUMBERS = 2**16  # in the states of chunks side by side; the backward pass of a span holds C times as many


class Transition(NamedTuple):
    """What a span does to any state: h -> decay * h + state."""

    decay: Float[Array, "B D N"]
    state: Float[Array, "B D N"]

    column_wise = False

    def transposed(self) -> Transition:
        """Its linear part is diagonal, and so its own transpose."""
        return self


@checked
def recurrent(
    x: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    a: Float[Array, "D N"],
    state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The definition, token by token.

    Args:
      x: inputs.
      delta: steps, at least 0; a step of 0 leaves the state as it is.
      b: where inputs are written.
      c: what is read from the state.
      a: rates of the continuous system, at most 0.
      state: before the span, None for zeros.
      segment_ids: documents of a packed row. A document's start forgets everything before it; padding leaves the
        state unchanged and gives 0.

    Returns:
      y in the dtype of x, and the state after the span, float32.
    """
    segments = Segments.of(segment_ids, *x.shape[:2])

    def step(h, token):
        x, delta, b, c, start, valid = token
        decay = jnp.where(start, 0, jnp.exp(delta[..., None] * a))
        after = decay * h + (delta * x)[..., None] * b[:, None]
        h = jnp.where(valid, after, h)
        return h, jnp.where(valid[..., 0], jnp.sum(h * c[:, None], axis=-1), 0)

    tokens = tuple(leaf.astype(jnp.float32) for leaf in (x, delta, b, c))
    tokens += (segments.starts[..., None, None], segments.valid[..., None, None])
    h = jnp.zeros((x.shape[0], *a.shape)) if state is None else state.astype(jnp.float32)
    h, y = jax.lax.scan(step, h, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), h


@checked
def chunked(
    x: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    a: Float[Array, "D N"],
    state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The same as `recurrent`, chunks side by side; `chunk` is their length C."""
    h = jnp.zeros((x.shape[0], *a.shape)) if state is None else state.astype(jnp.float32)
    leaves = _cut(x, delta, b, c, a, segment_ids, chunk)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def span(h, leaves):
        h, before = jax.lax.scan(lambda h, chunk: (apply(chunk, h), h), h, _ends(*leaves, a))
        return h, _states(before, *leaves, a)[1]

    h, y = jax.lax.scan(span, h, leaves)
    y = join(y, x.shape[1])
    if segment_ids is not None:
        y = jnp.where(Segments.of(segment_ids, *x.shape[:2]).valid[..., None], y, 0)
    return y.astype(x.dtype), h


@checked
def transition(
    x: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    a: Float[Array, "D N"],
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> Transition:
    """What the span does to any state. `c` is not read: it is there so that all functions take the same inputs."""
    nothing = Transition(*(jnp.full((x.shape[0], *a.shape), fill, jnp.float32) for fill in (1, 0)))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def span(before, leaves):
        return jax.lax.scan(lambda before, chunk: (compose(before, chunk), None), before, _ends(*leaves, a))

    return jax.lax.scan(span, nothing, _cut(x, delta, b, None, a, segment_ids, chunk))[0]


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`; associative. Zeros as `first` stand for the zero state."""
    return Transition(then.decay * first.decay, apply(then, first.state))


def apply(transition: Transition, state: Float[Array, "B D N"]) -> Float[Array, "B D N"]:
    """The state after the span, from the state before it."""
    return transition.decay * state + transition.state


def _cut(x, delta, b, c, a, segment_ids, chunk):
    """The tokens in float32, cut into spans; padding has a step of 0."""
    segments = Segments.of(segment_ids, *x.shape[:2])
    x, delta, b = (leaf.astype(jnp.float32) for leaf in (x, delta, b))
    delta = jnp.where(segments.valid[..., None], delta, 0)
    c = None if c is None else c.astype(jnp.float32)
    return cut((x, delta, b, c, segments.starts), chunk, NUMBERS // (x.shape[0] * a.size))


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
