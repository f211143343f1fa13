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

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.typing import Segments, checked

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

MATRICES = 128  # chunks times heads at once: about what a CPU's cache holds
FLOOR = -128.0  # of log decays: exp is 0 in float32 from -104 on, so that nothing changes below it


class Transition(NamedTuple):
    """What a span does to any state: S -> Diag(decay) S + state."""

    decay: Float[Array, "B H K"]
    state: Float[Array, "B H K V"]

    column_wise = True  # it treats all columns of a state alike

    def transposed(self) -> Transition:
        """Its linear part is diagonal, and so its own transpose."""
        return self


@checked
def recurrent(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"],
    state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The definition, token by token.

    Args:
      q: what is read from the state; neither scaled nor normalised here. With a decay per head, each of G may serve
        H / G heads next to each other, and so may k.
      k: where v is written.
      v: what is written.
      log_decay: at most 0; -inf is a decay of exactly 0. Per head, or per head and key channel.
      state: before the span, None for zeros.
      segment_ids: documents of a packed row. A document's start forgets everything before it; padding leaves the
        state unchanged and gives 0.

    Returns:
      y in the dtype of v, and the state after the span, float32.

    Raises:
      ValueError: shapes contradict each other; G does not divide H, or is not H though decays are per channel.
    """
    _check_groups(k, v, log_decay)
    segments = Segments.of(segment_ids, *k.shape[:2])

    def step(s, token):
        q, k, v, decay, start, valid = token
        after = jnp.where(start, 0, decay)[..., None] * s + k[..., None] * v[..., None, :]
        s = jnp.where(valid[..., None], after, s)
        return s, jnp.where(valid, jnp.sum(q[..., None] * s, axis=-2), 0)

    q, k = (jnp.repeat(leaf, v.shape[2] // k.shape[2], axis=2) for leaf in (q, k))
    decay = jnp.exp(log_decay.astype(jnp.float32))
    decay = decay[..., None] if decay.ndim == 3 else decay
    tokens = (*(leaf.astype(jnp.float32) for leaf in (q, k, v)), decay)
    tokens += (segments.starts[..., None, None], segments.valid[..., None, None])
    s = _zeros(k, v) if state is None else state.astype(jnp.float32)
    s, y = jax.lax.scan(step, s, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), s


@checked
def chunked(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"],
    state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The same as `recurrent`, chunk by chunk in matrix products; `chunk` is C, a power of two."""
    _check_groups(k, v, log_decay)
    s = _zeros(k, v) if state is None else state.astype(jnp.float32)
    return by_spans(_span, s, (q, k, v, log_decay), segment_ids, chunk)


@checked
def transition(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"],
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> Transition:
    """What the span does to any state. `q` is not read: it is there so that all functions take the same inputs.

    The decay is carried as one more column of the state, which starts as ones and is written with zeros.
    """
    values = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (1, 0)))
    column = _zeros(k, values).at[..., 0].set(1)
    _, s = by_spans(_span, column, (None, k, values, log_decay), segment_ids, chunk)
    return Transition(s[..., 0], s[..., 1:])


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`; associative. Zeros as `first` stand for the zero state."""
    return Transition(then.decay * first.decay, apply(then, first.state))


def apply(transition: Transition, state: Float[Array, "B H K V"]) -> Float[Array, "B H K V"]:
    """The state after the span, from the state before it."""
    return transition.decay[..., None] * state + transition.state


def by_spans(span, state, inputs, segment_ids, chunk: int):
    """`span(state, *inputs, segments, chunk)` over the row, a few chunks of all its heads at a time.

    Within a span all that does not depend on the state is computed for its chunks together. The backward pass keeps
    the state before each span and computes the rest again: its memory is that of one span, and on a CPU the span's
    arrays stay in the cache, which is worth more than the second computation costs.
    """
    batch, length, heads = inputs[2].shape[:3]
    segments = None if segment_ids is None else Segments.of(segment_ids, batch, length)
    chunks = -(-length // chunk)
    spans = -(-chunks // max(1, MATRICES // (batch * heads)))
    size = -(-chunks // spans) * chunk

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, spans * size - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, spans, size, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, leaves):
        return span(state, *leaves, chunk)

    state, y = jax.lax.scan(step, state, jax.tree.map(cut, (*inputs, segments)))
    if y is not None:
        y = jnp.moveaxis(y, 0, 1).reshape(batch, spans * size, *y.shape[3:])[:, :length]
    return y, state


def split(x: Float[Array, "B T H K"], chunk: int) -> Float[Array, "n B H C K"]:
    """Chunks, in float32."""
    batch, _, heads, width = x.shape
    return jnp.transpose(x.astype(jnp.float32).reshape(batch, -1, chunk, heads, width), (1, 0, 3, 2, 4))


def join(y: Float[Array, "n B H C V"], v: Float[Array, "B T H V"], segments: Segments | None):
    """The inverse of `split` for outputs, in the shape and dtype of v; 0 at padding."""
    y = jnp.transpose(y, (1, 0, 3, 2, 4)).reshape(v.shape)
    if segments is not None:
        y = jnp.where(segments.valid[..., None, None], y, 0)
    return y.astype(v.dtype)


class Clock(NamedTuple):
    """How far each token of a chunk has decayed what came before it, to be compared by `decay`.

    A sum of log decays loses its low bits when it grows, and with them the small decays that come after one large. So
    the integers nearest to the log decays, whose sums are exact, are summed apart from the rest, which stays small.

    Attributes:
      whole, rest: sum of log decays from the document's or chunk's start up to the token.
      run: documents begun in the chunk up to the token; 0 continues the state.
    """

    whole: Float[Array, "n B H C K"]
    rest: Float[Array, "n B H C K"]
    run: Int[Array, "n B 1 C 1"]

    def part(self, rows: slice) -> Clock:
        """The clock of some tokens."""
        return Clock(*(leaf[..., rows, :] for leaf in self))

    @property
    def last(self) -> Clock:
        """The clock at the chunk's end."""
        return self.part(slice(-1, None))


BEFORE = Clock(0.0, 0.0, 0)  # the clock right before the chunk


def start_clock(log_decay, segments: Segments | None, chunk: int, floor: float = FLOOR) -> Clock:
    """The clock of `[B, T, H]` or `[B, T, H, K]` log decays, of which none counts as less than `floor`."""
    log_decay = jnp.maximum(log_decay.astype(jnp.float32), floor)
    log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    batch, length = log_decay.shape[:2]
    if segments is None:
        run = jnp.zeros((batch, length // chunk, chunk), jnp.int32)
    else:
        log_decay = jnp.where((segments.valid & ~segments.starts)[..., None, None], log_decay, 0)
        run = jnp.cumsum(segments.starts.reshape(batch, -1, chunk), axis=-1, dtype=jnp.int32)
    run = jnp.swapaxes(run, 0, 1)[:, :, None]
    counted = jnp.tril(run[..., :, None] == run[..., None, :]).astype(jnp.float32)
    whole = jax.lax.stop_gradient(jnp.round(log_decay))
    whole, rest = split(whole, chunk), split(log_decay - whole, chunk)
    counted = jnp.broadcast_to(counted, (*rest.shape[:-1], chunk))
    return Clock(matmul(counted, whole), matmul(counted, rest), run[..., None])


def decay(now: Clock, since: Clock) -> Float[Array, ...]:
    """What is left at `now` of what was there at `since`; exactly 0 across a document start."""
    return jnp.exp(elapsed(now, since))


def elapsed(now: Clock, since: Clock) -> Float[Array, ...]:
    """The log of `decay`: -inf across a document start."""
    log = (now.whole - since.whole) + (now.rest - since.rest)
    return jnp.where(now.run == since.run, log, -jnp.inf)


def scores(x: Float[Array, "n B G C K"], k: Float[Array, "n B G C K"], clock: Clock) -> Float[Array, "n B H C C"]:
    """sum_k x_ik k_jk exp(b_ik - b_jk) for j <= i in one document, 0 elsewhere.

    With a decay per head the exponential leaves the sum, which is one for the heads that share x and k. With a decay
    per channel the chunk is halved until eight tokens are left, which meet pair by pair: at each halving, queries in
    the second half meet keys in the first, and the decay between them is that up to the middle times that after it,
    neither above 1.
    """
    size = x.shape[-2]
    if clock.whole.shape[-1] == 1:
        row = Clock(*(jnp.swapaxes(leaf, -1, -2) for leaf in clock))
        log = (clock.whole - row.whole) + (clock.rest - row.rest)
        seen = jnp.tril(clock.run == row.run)
        products = jnp.repeat(einsum("...ck,...dk->...cd", x, k), log.shape[-3] // x.shape[-3], axis=-3)
        return products * jnp.exp(jnp.where(seen, log, -jnp.inf))
    if size <= 8:
        now, since = (Clock(*(jnp.expand_dims(leaf, axis) for leaf in clock)) for axis in (-2, -3))
        seen = jnp.tril(jnp.ones((size, size), bool))[..., None]
        left = jnp.exp(jnp.where(seen, elapsed(now, since), -jnp.inf))
        return jnp.sum(x[..., :, None, :] * k[..., None, :, :] * left, axis=-1)
    halves = jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:-2], 2, size // 2, leaf.shape[-1]), (x, k, clock))
    near = scores(*halves)
    _, k, first = jax.tree.map(lambda leaf: leaf[..., 0, :, :], halves)
    x, _, second = jax.tree.map(lambda leaf: leaf[..., 1, :, :], halves)
    far = einsum("...ck,...dk->...cd", x * decay(second, first.last), k * decay(first.last, first))
    return jnp.block([[near[..., 0, :, :], jnp.zeros_like(far)], [far, near[..., 1, :, :]]])


def _span(s, q, k, v, log_decay, segments, chunk):
    """A few chunks: the state after them, and y."""
    k = k if segments is None else jnp.where(segments.valid[..., None, None], k, 0)
    keys, values, clock = split(k, chunk), split(v, chunk), start_clock(log_decay, segments, chunk)
    left, now = decay(clock.last, clock), decay(clock, BEFORE)
    if log_decay.ndim == 3:
        writes = _per_head("nbgck,nbgrcv->nbgrkv", keys, left * values)
    else:
        writes = einsum("nbhck,nbhcv->nbhkv", keys * left, values)
    total = jnp.swapaxes(decay(clock.last, BEFORE), -1, -2)
    s, before = jax.lax.scan(lambda s, chunk: (chunk[0] * s + chunk[1], s), s, (total, writes))
    if q is None:
        return s, None
    queries = split(q, chunk)
    if log_decay.ndim == 3:
        y = now * _per_head("nbgck,nbgrkv->nbgrcv", queries, before)
    else:
        y = einsum("nbhck,nbhkv->nbhcv", queries * now, before)
    y += einsum("nbhcd,nbhdv->nbhcv", scores(queries, keys, clock), values)
    return s, join(y, v, segments)


def _check_groups(k, v, log_decay):
    groups, heads = k.shape[2], v.shape[2]
    if heads % groups or (log_decay.ndim == 4 and groups != heads):
        raise ValueError(
            f"q and k have {groups} heads, v has {heads} and log_decay is {list(log_decay.shape)}; the heads of q and "
            "k must divide those of v, and be as many where the decay is per channel."
        )


def _per_head(equation, x, heads):
    """A product of what G groups share with what each of the H heads has."""
    groups = x.shape[2]
    y = einsum(equation, x, heads.reshape(*heads.shape[:2], groups, -1, *heads.shape[3:]))
    return y.reshape(*heads.shape[:3], *y.shape[4:])


def _zeros(k, v):
    return jnp.zeros((k.shape[0], v.shape[2], k.shape[3], v.shape[3]))
