"""In-Place TTT: a linear map whose weights are written to mini-batch by mini-batch while the document is read.

With keys z of width F, inputs x of width D, taps c_-h ... c_h per channel and a matrix P, for mini-batch i of C tokens,
counted from the document's start:

    v_s = rate (sum over |j| <= h of c_j * x_{s+j}) P         tokens outside the mini-batch count as zeros
    y_t = z_t W_i,    W_0 = 0,    W_{i+1} = decay W_i + clip(sum over s in i of z_s^T v_s)

where clip scales its argument down to a Frobenius norm of at most `clip`. A mini-batch is read before it is written,
and one that its document's end cuts short is never written. So v may look ahead, inside its mini-batch.

Span form. The pair (x_u, z_s) is known at the later of both, so the state holds W, the sum over the pairs so far of the
mini-batch in progress (`pending`), and of the last h tokens z and its shares e_j = rate (c_j * x) P of the targets
around it. In a run of at most C tokens no more than one mini-batch completes: those of one document complete C tokens
apart, and a document that begins inside the run does not get there, unless it begins at the run's first token, which
is to forget the state beforehand. So a run's tokens read W, or W after one update, or (documents begun inside) 0.

Transition of a span. The mini-batch in progress at its start is completed by the span with a sum `head` and by pairs
across its edge; it can be clipped only once it is whole. What follows is that update, decayed, and those of whole
mini-batches. `compose` joins pending of the one, pairs across, and head of the other into a whole mini-batch: the
transitions are a monoid, clipped or not. Below T = D F / (D + F) the tokens themselves are fewer numbers (`gathers`).

Reference: "In-Place Test-Time Training", ICLR 2026 (arXiv:2604.06169), section 3.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longctx.ops import causal_conv, chunks
from longctx.ops.chunks import along
from longctx.ops.family import Recurrence, by_token
from longctx.ops.products import einsum
from longctx.typing import Segments


class Inputs(NamedTuple):
    """y has the dtype of z.

    Attributes:
      z: what reads the weights, and where they are written.
      x: what the targets are made of.
    """

    z: Float[Array, "B T F"]
    x: Float[Array, "B T D"]


class Parameters(NamedTuple):
    """What is learned in training.

    Attributes:
      taps: of the targets' convolution; the middle one multiplies the token itself, the last the one h later.
      target: P, the targets' projection.
    """

    taps: Float[Array, "2h+1 D"]
    target: Float[Array, "D D"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static.

    Attributes:
      minibatch: C. Token p of a document is in its mini-batch p // C.
      rate: step of an update.
      clip: the largest Frobenius norm of an update; 0 for any.
      decay: what an update leaves of the weights before it.
    """

    minibatch: int
    rate: float = 1.0
    clip: float = 0.0
    decay: float = 1.0


class State(NamedTuple):
    """What has been written, and the mini-batch in progress; float32."""

    weights: Float[Array, "B F D"]
    pending: Float[Array, "B F D"]
    keys: Float[Array, "B h F"]  # of the last h tokens
    shares: Float[Array, "B h 2h+1 D"]


class Tokens(NamedTuple):
    """The first h tokens of a span that continue the document in progress, zeros after the last."""

    keys: Float[Array, "B h F"]
    shares: Float[Array, "B h 2h+1 D"]
    place: Int[Array, "B h"]  # within the mini-batch: so many tokens before it belong to the same
    number: Int[Array, " B"]


class Transition(NamedTuple):
    """What a span does to any state.

    Attributes:
      kept: what is left of the weights before; 0 where a document starts.
      late: what is left of the update by the mini-batch in progress at the start; 0 if it never completes.
      open: the mini-batch in progress at the start is still so at the end.
      head: sum over the pairs that complete the mini-batch in progress at the start.
      weights: updates by the mini-batches that lie within the span.
      pending: sum over the pairs of the mini-batch in progress at the end.
      first, keys, shares: the first and the last tokens.
      clip: the largest norm of an update, 0 for any.
    """

    kept: Float[Array, " B"]
    late: Float[Array, " B"]
    open: Bool[Array, " B"]
    head: Float[Array, "B F D"]
    weights: Float[Array, "B F D"]
    pending: Float[Array, "B F D"]
    first: Tokens
    keys: causal_conv.Tail
    shares: causal_conv.Tail
    clip: Float[Array, " B"]


def empty(inputs: Inputs, parameters: Parameters, options: Options) -> State:
    """The state before any token."""
    (batch, _, width), (size, depth) = inputs.z.shape, parameters.taps.shape
    weights = jnp.zeros((batch, width, depth))
    keys, shares = jnp.zeros((batch, size // 2, width)), jnp.zeros((batch, size // 2, size, depth))
    return State(weights, weights, keys, shares)


def recurrent(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options: Options):
    """The definition, token by token."""
    taps, target = (x.astype(jnp.float32) for x in parameters)
    reach = taps.shape[0] // 2

    def step(state, z, x, position):
        weights, pending, keys, shares = state
        place = position % options.minibatch
        y = jnp.sum(z[..., None] * weights, axis=1)
        share = options.rate * jnp.matmul(taps * x[:, None], target, precision="highest")
        pending += z[..., None] * share[:, reach, None]
        for lag in range(1, reach + 1):
            pairs = z[..., None] * shares[:, -lag, reach - lag, None]
            pairs += keys[:, -lag, :, None] * share[:, reach + lag, None]
            pending += jnp.where(along(place >= lag, pairs), pairs, 0)
        norm = jnp.sqrt(jnp.maximum(jnp.sum(pending**2, axis=(1, 2), keepdims=True), 1e-30))
        update = pending * jnp.minimum(1, options.clip / norm) if options.clip else pending
        done = along(place == options.minibatch - 1, pending)
        weights = jnp.where(done, options.decay * weights + update, weights)
        keys = jnp.concatenate([keys, z[:, None]], axis=1)[:, 1:]
        shares = jnp.concatenate([shares, share[:, None]], axis=1)[:, 1:]
        return y, State(weights, jnp.where(done, 0, pending), keys, shares)

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.z.dtype)


def chunked(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options: Options):
    """The same, C tokens of the span at a time in matrix products."""

    def step(state, rows):
        z, x, segments = rows
        run = _run(z.astype(jnp.float32), x.astype(jnp.float32), segments, parameters, options)
        state = _forgotten(state, segments)
        update = _clipped(_meeting(_as_transition(state), run.transition) + run.head, run.transition.clip)
        y = einsum("btf,bfd->btd", z * run.before[..., None], state.weights)
        y += einsum("btf,bfd->btd", z * run.after[..., None], options.decay * state.weights + update)
        return apply(run.transition, state), y

    size = min(options.minibatch, inputs.z.shape[1])
    y, state = chunks.scan(step, state, (*inputs, segments), size)
    return y.astype(inputs.z.dtype), state


def transition(inputs: Inputs, parameters: Parameters, segments: Segments, options: Options) -> Transition:
    """What the span does to any state."""

    def step(first, rows):
        z, x, segments = rows
        then = _run(z.astype(jnp.float32), x.astype(jnp.float32), segments, parameters, options).transition
        return compose(_forgotten(first, segments), then), None

    state = empty(inputs, parameters, options)
    batch, reach = state.keys.shape[:2]
    keep = jnp.full(batch, reach)
    first = Tokens(state.keys, state.shares, jnp.zeros((batch, reach), jnp.int32), jnp.zeros(batch, jnp.int32))
    nothing = _as_transition(state)._replace(kept=jnp.ones(batch), open=jnp.ones(batch, bool), first=first)
    nothing = nothing._replace(keys=nothing.keys._replace(keep=keep), shares=nothing.shares._replace(keep=keep))
    return chunks.scan(step, nothing, (*inputs, segments), min(options.minibatch, inputs.z.shape[1]))[1]


def gathers(inputs: Inputs) -> bool:
    """Whether a span's tokens are fewer numbers than its sums, T (D + F) < D F: then devices exchange the tokens."""
    (_, length, width), depth = inputs.z.shape, inputs.x.shape[2]
    return length * (width + depth) < width * depth


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`."""
    meeting = _meeting(first, then)
    whole = meeting + then.head
    completes = first.open & ~then.open
    update = jnp.where(along(first.open, whole), 0, along(then.late, whole) * _clipped(whole, then.clip))
    return Transition(
        first.kept * then.kept,
        jnp.where(first.open, then.late, first.late * then.kept),
        first.open & then.open,
        jnp.where(along(completes, whole), whole, first.head),
        along(then.kept, whole) * first.weights + update + then.weights,
        jnp.where(along(then.open, meeting), meeting, 0) + then.pending,
        _first(first.first, then.first),
        causal_conv.compose(first.keys, then.keys),
        causal_conv.compose(first.shares, then.shares),
        then.clip,
    )


def apply(transition: Transition, state: State) -> State:
    """The state after the span, from the state before it."""
    after = compose(_as_transition(state), transition)
    return State(after.weights, after.pending, after.keys.x, after.shares.x.reshape(state.shares.shape))


class _Run(NamedTuple):
    """A run of at most C tokens: its tokens before and after the completion, the sum it adds to it, its transition."""

    before: Bool[Array, "B C"]
    after: Bool[Array, "B C"]
    head: Float[Array, "B F D"]
    transition: Transition


def _run(z, x, segments: Segments, parameters: Parameters, options: Options) -> _Run:
    """What a run of tokens does, a start at its first token left out (that is to forget the state beforehand)."""
    (taps, target), (batch, length, _) = parameters, x.shape
    reach, valid = taps.shape[0] // 2, segments.valid
    place = jnp.where(valid, segments.positions % options.minibatch, 0)
    run = segments.runs - segments.starts[:, :1]
    done_here = valid & (place == options.minibatch - 1)
    passed = jnp.cumsum(done_here, axis=1) - done_here  # completions before the token
    done, fresh = jnp.any(done_here, axis=1), run[:, -1] > 0
    z = jnp.where(valid[..., None], z, 0)

    targets = taps[reach] * x
    for lag in range(1, min(reach, length - 1) + 1):
        pair = (valid[:, :-lag] & (place[:, lag:] >= lag))[..., None]  # tokens t - lag and t are of one mini-batch
        back = jnp.where(pair, taps[reach - lag] * x[:, :-lag], 0)
        ahead = jnp.where(pair, taps[reach + lag] * x[:, lag:], 0)
        targets += jnp.pad(back, ((0, 0), (lag, 0), (0, 0))) + jnp.pad(ahead, ((0, 0), (0, lag), (0, 0)))
    targets = options.rate * einsum("btd,de->bte", targets, target)

    before, after = valid & (run == 0) & (passed == 0), valid & (run == 0) & (passed > 0)
    head = einsum("btf,btd->bfd", z * (before & done[:, None])[..., None], targets)
    waiting = valid & (run == run[:, -1:]) & (passed == done[:, None])
    pending = einsum("btf,btd->bfd", z * waiting[..., None], targets)

    def share(x):
        return options.rate * einsum("...kd,de->...ke", taps * x[..., None, :], target)

    # The first tokens stand together: padding is outside of documents only.
    number = jnp.minimum(jnp.sum(valid & (run == 0), axis=1), reach)
    index = jnp.argmax(valid, axis=1)[:, None] + jnp.arange(reach)
    held = jnp.arange(reach) < number[:, None]
    index = jnp.minimum(index, length - 1)[..., None]
    z_first, x_first = (jnp.where(held[..., None], jnp.take_along_axis(a, index, axis=1), 0) for a in (z, x))
    place_first = jnp.where(held, jnp.take_along_axis(place, index[..., 0], axis=1), 0)
    inside = Segments(segments.ids, segments.positions, segments.starts.at[:, 0].set(False))
    x_last = causal_conv.tail_of(x, reach, inside)
    alive = done & ~fresh
    return _Run(
        before,
        after,
        head,
        Transition(
            jnp.where(fresh, 0.0, jnp.where(done, options.decay, 1.0)),
            alive.astype(jnp.float32),
            ~done & ~fresh,
            jnp.where(along(alive, head), head, 0),
            jnp.zeros_like(head),
            pending,
            Tokens(z_first, share(x_first), place_first, number),
            causal_conv.tail_of(z, reach, inside),
            causal_conv.Tail(share(x_last.x).reshape(batch, reach, -1), x_last.keep),
            jnp.full(batch, options.clip, jnp.float32),
        ),
    )


def _meeting(first: Transition, then: Transition) -> Float[Array, "B F D"]:
    """The sum over the mini-batch in progress where two spans meet: `first`'s pending, and the pairs across."""
    tokens = then.first
    reach = tokens.keys.shape[1]
    last = first.shares.x.reshape(tokens.shares.shape)
    rows = [0.0] * 2 * reach  # targets of the last tokens before, then of the first after
    for i in range(reach):
        for lag in range(i + 1, reach + 1):
            near = (tokens.place[:, i] >= lag)[:, None]
            rows[reach + i] += jnp.where(near, last[:, reach + i - lag, reach - lag], 0)
            rows[reach + i - lag] += jnp.where(near, tokens.shares[:, i, reach + lag], 0)
    if not rows:
        return first.pending
    keys = jnp.concatenate([first.keys.x, tokens.keys], axis=1)
    return first.pending + einsum("btf,btd->bfd", keys, jnp.stack(rows, axis=1))


def _first(first: Tokens, then: Tokens) -> Tokens:
    """The first tokens of two spans, one after the other."""
    slots, number = jnp.arange(first.place.shape[1]), first.number[:, None]
    index = jnp.where(slots < number, slots, slots.shape[0] + slots - number)

    def join(a, b):
        both = jnp.concatenate([a, b], axis=1)
        return jnp.take_along_axis(both, index.reshape(*index.shape, *(1,) * (a.ndim - 2)), axis=1)

    tokens = jax.tree.map(join, first[:3], then[:3])
    return Tokens(*tokens, jnp.minimum(first.number + then.number, slots.shape[0]))


def _as_transition(state: State) -> Transition:
    """What leaves this state whatever was before."""
    batch, reach = state.keys.shape[:2]
    none, zeros = jnp.zeros(batch), jnp.zeros_like(state.weights)
    whole = jnp.zeros(batch, jnp.int32)
    first = Tokens(
        jnp.zeros_like(state.keys), jnp.zeros_like(state.shares), jnp.zeros((batch, reach), jnp.int32), whole
    )
    keys, shares = (causal_conv.Tail(a.reshape(batch, reach, -1), whole) for a in (state.keys, state.shares))
    closed = jnp.zeros(batch, bool)
    return Transition(none, none, closed, zeros, state.weights, state.pending, first, keys, shares, none)


def _clipped(update, clip):
    """`update`, scaled down to a Frobenius norm of at most `clip` where that is above 0."""
    norm = jnp.sqrt(jnp.maximum(jnp.sum(update**2, axis=(1, 2)), 1e-30))
    return update * along(jnp.where(clip > 0, clip / jnp.maximum(norm, clip), 1), update)


def _forgotten(state, segments: Segments):
    """A state or transition before a run of tokens, without what a start at its first token forgets."""
    return jax.tree.map(lambda x: jnp.where(along(segments.starts[:, 0], x), jnp.zeros_like(x), x), state)


INPLACE_TTT = Recurrence(
    "inplace_ttt",
    Inputs,
    empty,
    recurrent,
    chunked,
    transition,
    compose,
    apply,
    gathers=gathers,
    parameters=Parameters,
    options=Options,
)
