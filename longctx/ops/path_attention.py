r"""PaTH attention: softmax attention whose keys are turned by every token that comes between them and the query.

For a query i and a key j <= i of one document, per head, with H_t = I - beta_t w_t w_t^T,

    logit_ij = q_i^T H_i H_{i-1} ... H_{j+1} k_j / sqrt(K),    out_i = sum_j softmax_j(logit_ij) v_j

Recurrence, which is also how it decodes: at every token all keys so far become k_j <- H_t k_j, then k_t joins them.

Block form. Let Q, K, W be the rows of a block of C tokens, N = tril(beta W W^T, -1), T = (I + N)^-1 diag(beta), and

    R = T W,    B = T tril(W K^T, -1).

The product of the block is P = H_C ... H_1 = I - W^T R, that up to row i the same with rows up to i, and B_sj w_s is
what token s takes from key j. So

    logits within the block  tril(Q K^T - tril(Q W^T) B) / sqrt(K)
    keys at its end          K' = K - B^T W
    queries at its start     Q' = Q - tril(Q W^T) R

and a block of queries goes over the blocks before it from right to left: it meets the keys at the end of each, then
becomes Q' <- Q' P = Q' - (Q' W^T) R.

Keys at the end of a span carry all that is in between, so to queries at the start of the next they are ordinary keys:
so spans, shards and caches meet. A span acts on keys before it by the product of its blocks.

Reference: Yang et al., "PaTH Attention: Position Encoding via Accumulating Householder Transformations", 2025
(arXiv:2505.16381), sections 2 and 3.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longctx.ops.gated_delta import unit_inverse
from longctx.ops.gated_linear import einsum, split
from longctx.ops.partial import Partial, merge, of_logits, over_blocks, softmax
from longctx.typing import Segments, checked


class Past(NamedTuple):
    """Tokens of the document in progress before a span, their keys as they are right before it."""

    keys: Float[Array, "B S H K"]
    values: Float[Array, "B S H V"]
    held: Bool[Array, "B S"]


class Span(NamedTuple):
    """A span's attention to itself, float32, and what it has to do with tokens before and after it."""

    partial: Partial
    queries: Float[Array, "B T H K"]  # at the span's start, scaled
    keys: Float[Array, "B T H K"]  # at its end
    product: Float[Array, "B H K K"]  # what it does to keys before it


@checked
def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    w: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    state: Past | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B S+T H K"]]:
    """The definition, token by token.

    Args:
      q, k, v: queries, keys, values.
      w: directions, of norm 1.
      beta: 0 to 2; 0 leaves the keys, 1 projects them, 2 reflects them.
      state: the tokens before the span; None is none, S = 0.
      segment_ids: documents of a packed row. A document sees nothing before its start; padding turns no key and
        gives 0.

    Returns:
      y in the dtype of v, and the keys of the state and of the span as they are after it, float32. Those of documents
      that ended before it mean nothing.
    """
    segments = Segments.of(segment_ids, *k.shape[:2])
    past = _nothing(k, v) if state is None else state
    keys = jnp.concatenate([past.keys.astype(jnp.float32), jnp.zeros(k.shape)], axis=1)
    values = jnp.concatenate([past.values, v], axis=1).astype(jnp.float32)
    ids = jnp.where(segments.valid, segments.runs + 1, 0)
    owners = jnp.concatenate([past.held.astype(jnp.int32), ids], axis=1)

    def step(keys, token):
        slot, q, k, w, beta, owner = token
        turned = keys - beta[:, None, :, None] * w[:, None] * jnp.sum(w[:, None] * keys, axis=-1, keepdims=True)
        turned = turned.at[:, slot].set(k)
        keys = jnp.where(owner[:, None, None, None] > 0, turned, keys)
        seen = (owners == owner[:, None]) & (owner > 0)[:, None] & (jnp.arange(keys.shape[1]) <= slot)
        logits = jnp.sum(q[:, None] * keys, axis=-1).mT * k.shape[-1] ** -0.5
        return keys, jnp.einsum("bhs,bshv->bhv", softmax(logits, seen[:, None]), values, precision="highest")

    tokens = (*(jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in (q, k, w, beta)), ids.T)
    keys, y = jax.lax.scan(step, keys, (past.keys.shape[1] + jnp.arange(k.shape[1]), *tokens))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), keys


@checked
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    w: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    state: Past | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B S+T H K"]]:
    """The same as `recurrent`, block by block in matrix products; `chunk` is C, a power of two."""
    past = _nothing(k, v) if state is None else state
    span = attend(q, k, v, w, beta, past, Segments.of(segment_ids, *k.shape[:2]), chunk)
    turned = einsum("bhij,bshj->bshi", span.product, past.keys.astype(jnp.float32))
    return span.partial.output.astype(v.dtype), jnp.concatenate([turned, span.keys], axis=1)


def attend(q, k, v, w, beta, past: Past | None, segments: Segments, chunk: int = 64) -> Span:
    """Attention of a span to itself and the tokens of `past`; arguments as `chunked`.

    Backwards, each block of queries is gone over again: memory grows linearly with T.
    """
    batch, length, heads, width = k.shape
    valid = segments.valid[..., None]
    beta = jnp.where(valid, beta.astype(jnp.float32), 0)

    def blocks(x):
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        if x.ndim == 4:
            return split(x, chunk)
        return jnp.moveaxis(x.reshape(batch, -1, chunk), 1, 0)

    ids = blocks(segments.ids)
    before = blocks(segments.valid & (segments.runs == 0))  # of the document that `past` is of
    values, beta = blocks(v), blocks(beta[..., None])
    (queries, keys, own), w, read = _prepare(blocks(q) * width**-0.5, blocks(k), values, blocks(w), beta, ids)
    numbers = jnp.arange(len(ids))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def row(_, block):
        number, q, part, owner, before = block

        def mask(held):
            return (owner[:, :, None] == held[:, None, :]) & (owner[:, :, None] > 0)

        def meet(q, earlier):
            _, k, v, w, read, held = earlier
            part = _partial(einsum("bhck,bhdk->bhcd", q, k), mask(held), v)
            return q - _turn(q, w, read), part

        def visible(earlier):
            # Documents have no gaps: what lies beyond a block of other documents is not visible either.
            return (earlier[0] < number) & mask(earlier[-1]).any()

        q, part = over_blocks(meet, visible, (q, part), (numbers, keys, values, w, read, ids))
        if past is not None and past.keys.shape[1]:
            logits = einsum("bhck,bshk->bhcs", q, past.keys.astype(jnp.float32))
            seen = before[:, :, None] & past.held[:, None, :]
            part = merge(part, _partial(logits, seen, jnp.moveaxis(past.values.astype(jnp.float32), 1, 2)))
        return None, (q, part)

    _, (queries, part) = jax.lax.scan(row, None, (numbers, queries, own, ids, before))

    def to_end(product, block):
        k, w, read = block
        return product - _turn(product, w, read), einsum("bhij,bhcj->bhci", product, k)

    identity = jnp.broadcast_to(jnp.eye(width), (batch, heads, width, width))
    product, keys = jax.lax.scan(to_end, identity, (keys, w, read), reverse=True)

    def rows(x):
        return jnp.moveaxis(x, (1, 3), (0, 2)).reshape(batch, -1, heads, *x.shape[4:])[:, :length]

    return Span(Partial(rows(part.output), rows(part.logsumexp)), rows(queries), rows(keys), product)


@jax.checkpoint
def _prepare(q, k, v, w, beta, ids):
    """What each block knows by itself: queries at its start, keys at its end, attention within; and W and R."""
    strength = jnp.swapaxes(beta, -1, -2)
    solve = unit_inverse(jnp.tril(beta * einsum("nbhck,nbhdk->nbhcd", w, w), -1)) * strength
    read = einsum("nbhcd,nbhdk->nbhck", solve, w)
    taken = einsum("nbhcd,nbhde->nbhce", solve, jnp.tril(einsum("nbhck,nbhdk->nbhcd", w, k), -1))
    met = jnp.tril(einsum("nbhck,nbhdk->nbhcd", q, w))
    logits = einsum("nbhck,nbhdk->nbhcd", q, k) - einsum("nbhcd,nbhde->nbhce", met, taken)
    seen = jnp.tril((ids[..., :, None] == ids[..., None, :]) & (ids[..., None] > 0))
    part = _partial(logits, seen, v)
    queries = q - einsum("nbhcd,nbhdk->nbhck", met, read)
    keys = k - einsum("nbhcd,nbhck->nbhdk", taken, w)
    return (queries, keys, part), w, read


def _turn(x, w, read):
    """What a block takes from rows on its right: x P = x - (x W^T) R."""
    return einsum("bhcd,bhdk->bhck", einsum("bhck,bhdk->bhcd", x, w), read)


def _partial(logits, visible, v) -> Partial:
    """Softmax of logits [..., H, C, S] where `visible` [..., C, S], as a partial result."""
    logits = jnp.where(visible[..., None, :, :], logits, -jnp.inf)
    return of_logits(logits, lambda weights: einsum("...cs,...sv->...cv", weights, v))


def _nothing(k, v) -> Past:
    batch, _, heads, width = k.shape
    return Past(
        jnp.zeros((batch, 0, heads, width)),
        jnp.zeros((batch, 0, heads, v.shape[-1])),
        jnp.zeros((batch, 0), bool),
    )
