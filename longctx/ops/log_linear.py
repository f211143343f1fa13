"""Log-linear attention: a linear attention that keeps one matrix per scale of the past, and weighs them when it reads.

Token i of a document reads what token j wrote from bucket l = level(i, j): 0 for j = i, else one more than the highest
bit in which i and j differ. So bucket l >= 1 holds the 2^(l-1) tokens that bit l-1 of i counts (a Fenwick tree). All
buckets evolve as the state of the underlying linear attention does, by A_t, and new tokens go to bucket 0,

    S_t^l = A_t S_{t-1}^l' + [l = 0] w_t v_t^T,    y_t = sum_l weight_t^l (S_t^l)^T q_t,

    A_t = a_t, w_t = k_t (Mamba-2)    or    A_t = a_t (I - beta_t k_t k_t^T), w_t = beta_t k_t (Gated DeltaNet)

where S^l' is what the move from token t-1 to t makes of the buckets: with h the highest bit in which the two positions
differ, buckets 0 to h become bucket h+1, which was empty, as bit h of the first position is 0. From any position to any
later one the same rule holds. Of L buckets the last takes all that is older.

Chunk form. The underlying attention gives, for a chunk, D_ij (what i reads of j), r_i (how i reads the state before),
e_j (how j writes the state after) and M (what becomes of the state before). Then, with g_i(l) the bucket that l has
become by token i, and g(l) by the chunk's end, c,

    y_i = sum_j weight_i^level(i,j) D_ij v_j + sum_l weight_i^g_i(l) (S^l)^T r_i,
    S'^l = sum_{m: g(m) = l} M S^m + sum_{j: level(c,j) = l} e_j v_j^T.

Transition of a span: (M, h, B), S -> move(h, M S) + B, with the larger h in a composition.

Reference: Guo et al., "Log-Linear Attention", 2025, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.chunks import by_spans, cut, cut_heads, join_heads
from longctx.ops.clock import BEFORE, decay, scores, start_clock
from longctx.ops.family import Options, Recurrence, by_token
from longctx.ops.products import einsum, unit_inverse
from longctx.typing import Segments


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: what is read from the state; neither scaled nor normalised here.
      k: where v is written; with beta of norm 1 or less, or the rule may diverge.
      v: what is written.
      beta: of the delta rule, 0 to 1 (2 with negative eigenvalues); None for linear attention with decay.
      log_decay: at most 0; -inf is a decay of exactly 0.
      weight: of each bucket when the token reads.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    beta: Float[Array, "B T H"] | None
    log_decay: Float[Array, "B T H"]
    weight: Float[Array, "B T H L"]


class Transition(NamedTuple):
    """What a span does to any state: S -> move(highest, matrix S) + state.

    `matrix` is of size 1 where there is no beta. `highest` is the highest bit in which the positions before the span
    and at its end differ, -1 for a span without tokens: buckets up to it become the one above it.
    """

    matrix: Float[Array, "B H K K"] | Float[Array, "B H 1 1"]
    highest: Int[Array, " B"]
    state: Float[Array, "B L H K V"]


State = Float[Array, "B L H K V"]


def empty(inputs: Inputs, parameters: None, options: Options) -> State:
    """The buckets before any token."""
    k, v, weight = inputs.k, inputs.v, inputs.weight
    return jnp.zeros((k.shape[0], weight.shape[-1], k.shape[2], k.shape[3], v.shape[3]))


def recurrent(inputs: Inputs, parameters: None, state: State, segments: Segments, options: Options):
    """The definition, token by token."""
    levels = jnp.arange(inputs.weight.shape[-1])[:, None, None, None]

    def step(s, q, k, v, beta, log_decay, weight, position):
        # Buckets up to the number of zeros at the end of the position become one.
        zeros = jax.lax.population_count((position & -position) - 1)[:, None, None, None, None]
        moved = jnp.sum(jnp.where(levels <= zeros, s, 0), axis=1, keepdims=True)
        s = jnp.where(levels <= zeros, 0, s) + jnp.where(levels == jnp.minimum(zeros + 1, len(levels) - 1), moved, 0)
        s = jnp.exp(log_decay)[:, None, :, None, None] * s
        if beta is not None:
            held = jnp.sum(k[:, None, ..., None] * s, axis=-2, keepdims=True)
            s -= (beta[..., None] * k)[:, None, ..., None] * held
            v = beta[..., None] * v
        s += jnp.where(levels == 0, (k[..., None] * v[..., None, :])[:, None], 0)
        read = jnp.sum(q[:, None, ..., None] * s, axis=-2)
        return jnp.sum(jnp.moveaxis(weight, -1, 1)[..., None] * read, axis=1), s

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: None, state: State, segments: Segments, options: Options):
    """The same, chunk by chunk in matrix products."""
    return by_spans(_span, state, inputs, segments, options.chunk)


def transition(inputs: Inputs, parameters: None, segments: Segments, options: Options) -> Transition:
    """What the span does to any state. Of the weights only the number counts."""
    batch, _, heads, width = inputs.k.shape
    identity = jnp.zeros((batch, heads, 1, 1)) + jnp.eye(1 if inputs.beta is None else width)
    nothing = Transition(identity, jnp.full(batch, -1), empty(inputs, parameters, options))

    def span(before, *rows):
        return jax.lax.scan(lambda before, chunk: (compose(before, chunk), None), before, _chunks(*rows)[0])

    return by_spans(span, nothing, inputs._replace(q=None), segments, options.chunk)[1]


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`."""
    matrix = einsum("bhij,bhjk->bhik", then.matrix, first.matrix)
    return Transition(matrix, jnp.maximum(first.highest, then.highest), apply(then, first.state))


def apply(transition: Transition, state: Float[Array, "B L H K V"]) -> Float[Array, "B L H K V"]:
    """The state after the span, from the state before it."""
    matrix = transition.matrix
    alone = matrix[:, None] * state if matrix.shape[-1] == 1 else einsum("bhij,blhjv->blhiv", matrix, state)
    moves = jax.nn.one_hot(_move(transition.highest, state.shape[1]), state.shape[1])
    return einsum("blm,blhkv->bmhkv", moves, alone) + transition.state


def _level(i, j, levels: int):
    """The bucket from which the token at position i reads the one at position j <= i, of `levels` buckets."""
    return jnp.minimum(32 - jax.lax.clz(i ^ j), levels - 1)


def _move(highest, levels: int):
    """[..., L]: what becomes of each bucket where bits up to `highest` change."""
    old, highest = jnp.arange(levels), highest[..., None]
    return jnp.where(old <= highest, jnp.minimum(highest + 1, levels - 1), old)


def _chunks(q, k, v, beta, log_decay, weight, segments, chunk):
    """The chunks' transitions and, unless q is None, what they read: weighted D, r, the weights of buckets before."""
    levels = weight.shape[-1]
    k = jnp.where(segments.valid[..., None, None], k, 0)
    keys, values, clock = cut_heads(k, chunk), cut_heads(v, chunk), start_clock(log_decay, segments, chunk)
    from_start, total = decay(clock, BEFORE), decay(clock.last, BEFORE)
    out = keys * decay(clock.last, clock)
    if beta is not None:
        strength = cut_heads(beta[..., None], chunk)
        inverse = unit_inverse(jnp.tril(strength * scores(keys, keys, clock), -1)) * jnp.swapaxes(strength, -1, -2)
        erased = einsum("nbhcd,nbhdk->nbhck", inverse, from_start * keys)
        total = total * jnp.eye(keys.shape[-1]) - einsum("nbhck,nbhcj->nbhkj", out, erased)
        out = einsum("nbhcd,nbhck->nbhdk", inverse, out)

    positions, valid = cut((segments.positions, segments.valid), chunk)
    some, first = jnp.any(valid, axis=-1), jnp.argmax(valid, axis=-1, keepdims=True)
    last = chunk - 1 - jnp.argmax(valid[..., ::-1], axis=-1, keepdims=True)
    before, end = (jnp.take_along_axis(positions, at, axis=-1) for at in (first, last))
    before -= 1
    highest = jnp.where(some, _level(before, end, 33)[..., 0] - 1, -1)
    at_end = jax.nn.one_hot(_level(end, positions, levels), levels)
    writes = einsum("nbcl,nbhck,nbhcv->nblhkv", at_end, out, values)
    chunks = Transition(total, highest, writes)
    if q is None:
        return chunks, None

    queries, weights = cut_heads(q, chunk), cut_heads(weight, chunk)
    within, reads = scores(queries, keys, clock), queries * from_start
    if beta is not None:
        reads -= einsum("nbhcd,nbhdk->nbhck", within, erased)
        within = einsum("nbhcd,nbhde->nbhce", within, inverse)
    pairs = jax.nn.one_hot(_level(positions[..., :, None], positions[..., None, :], levels), levels)
    within *= einsum("nbcdl,nbhcl->nbhcd", pairs, weights)
    moves = jax.nn.one_hot(_move(_level(before, positions, 33) - 1, levels), levels)
    return chunks, (within, reads, einsum("nbclm,nbhcm->nbhcl", moves, weights))


def _span(s, q, k, v, beta, log_decay, weight, segments, chunk):
    """A few chunks: the state after them, and y."""
    chunks, (within, reads, weights) = _chunks(q, k, v, beta, log_decay, weight, segments, chunk)

    def step(s, chunk):
        transition, reads, weights = chunk
        return apply(transition, s), einsum("bhck,bhcl,blhkv->bhcv", reads, weights, s)

    s, y = jax.lax.scan(step, s, (chunks, reads, weights))
    return s, join_heads(y + einsum("nbhcd,nbhdv->nbhcv", within, cut_heads(v, chunk)), v, segments)


LOG_LINEAR = Recurrence("log_linear", Inputs, empty, recurrent, chunked, transition, compose, apply, counts=True)
