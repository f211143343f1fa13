r"""PaTH attention: softmax attention whose keys are changed by every token that comes between them and the query.

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
so spans, shards and caches meet. A span acts on keys before it by the product of its blocks. Device p of those that
share a row meets the keys of p-1, multiplies its queries by the product of that shard, meets the keys of p-2, and so
on: keys, values and products ([K, K] per head) go round. Backwards this is differentiated plainly, so that a device
keeps the keys and values of all shards.

Reference: Yang et al., "PaTH Attention: Position Encoding via Accumulating Householder Transformations", 2025
(arXiv:2505.16381), sections 2 and 3.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.attention import attention_partial
from longctx.ops.chunks import cut
from longctx.ops.family import Keyed, Result
from longctx.ops.partial import Partial, merge, of_logits, over_blocks, softmax
from longctx.ops.patterns import Causal
from longctx.ops.products import einsum, unit_inverse
from longctx.ops.row import Row
from longctx.typing import Segments


class Queries(NamedTuple):
    """Queries, and what the span's tokens do to the keys before them.

    Attributes:
      w: directions, of norm 1.
      beta: 0 to 2; 0 leaves the keys, 1 projects them, 2 reflects them; padding leaves them.
    """

    q: Float[Array, "B T H K"]
    w: Float[Array, "B T H K"]
    beta: Float[Array, "B T H"]


class Keys(NamedTuple):
    """Of tokens before the span, with keys as they are right before it, and last of its own T tokens."""

    k: Float[Array, "B S H K"]
    v: Float[Array, "B S H V"]


@dataclasses.dataclass(frozen=True)
class Options:
    """C, tokens a block, is a power of two."""

    chunk: int = 64


class Span(NamedTuple):
    """A span's attention to itself, float32, and what it has to do with tokens before and after it."""

    partial: Partial
    queries: Float[Array, "B T H K"]  # at the span's start, scaled
    keys: Float[Array, "B T H K"]  # at its end
    product: Float[Array, "B H K K"]  # what it does to keys before it


def definition(
    queries: Queries, keys: Keys, parameters: None, segments: Segments, held: Segments, options: Options
) -> Result:
    """The definition, token by token; gives all keys after the span, of which those of past documents mean nothing."""
    first, values = keys.k.shape[1] - queries.q.shape[1], keys.v.astype(jnp.float32)

    def step(keys, token):
        slot, q, k, w, beta, owner = token
        after = keys - beta[:, None, :, None] * w[:, None] * jnp.sum(w[:, None] * keys, axis=-1, keepdims=True)
        keys = jnp.where(owner[:, None, None, None] > 0, after.at[:, slot].set(k), keys)
        visible = (held.ids == owner[:, None]) & (owner > 0)[:, None] & (jnp.arange(keys.shape[1]) <= slot)
        logits = jnp.sum(q[:, None] * keys, axis=-1).mT * q.shape[-1] ** -0.5
        return keys, jnp.einsum("bhs,bshv->bhv", softmax(logits, visible[:, None]), values, precision="highest")

    (q, w, beta), before = queries, keys.k.astype(jnp.float32)
    tokens = (jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in (q, before[:, first:], w, beta))
    slots = first + jnp.arange(q.shape[1])
    after, y = jax.lax.scan(step, before.at[:, first:].set(0.0), (slots, *tokens, segments.ids.T))
    return Result(jnp.moveaxis(y, 0, 1).astype(keys.v.dtype), keys=after)


def chunked(
    queries: Queries, keys: Keys, parameters: None, segments: Segments, held: Segments, options: Options
) -> Result:
    """The same, block by block in matrix products."""
    if queries.q.shape[1] == 1:
        return definition(queries, keys, parameters, segments, held, options)
    span = attend(queries, keys, segments, held, options)
    past = keys.k[:, : keys.k.shape[1] - queries.q.shape[1]].astype(jnp.float32)
    after = jnp.concatenate([einsum("bhij,bshj->bshi", span.product, past), span.keys], axis=1)
    return Result(span.partial.output.astype(keys.v.dtype), keys=after)


def sharded(
    queries: Queries, keys: Keys, parameters: None, segments: Segments, held: Segments, options: Options, row: Row
) -> Result:
    """Keys, values and products go round the devices, and meet the queries from the last to the first."""
    span = attend(queries, keys, segments, held, options)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def hop(carry, _):
        part, q, others = carry
        k, v, product, owners = others = row.onward(others)
        part = merge(part, attention_partial(q, k, v, Causal(), segments, owners, scale=1.0))
        return (part, einsum("bthi,bhij->bthj", q, product), others), None

    own = span.keys, keys.v.astype(jnp.float32), span.product, segments
    (part, _, _), _ = jax.lax.scan(hop, (span.partial, span.queries, own), None, length=row.parts - 1)
    # The keys at the end of the row are for a cache, which training has not: then they cost nothing.
    products, after = row.gather(span.product[:, None]), span.keys
    for other in range(1, row.parts):
        after = jnp.where(other > row.index, einsum("bhij,bshj->bshi", products[:, other], after), after)
    return Result(part.output.astype(keys.v.dtype), keys=after)


def attend(queries: Queries, keys: Keys, segments: Segments, held: Segments, options: Options) -> Span:
    """Attention of a span to itself and to the tokens before it.

    Backwards, each block of queries is gone over again: memory grows linearly with T.
    """
    (q, w, beta), (k, v), chunk = queries, keys, options.chunk
    batch, length, heads, width = q.shape
    before = k.shape[1] - length
    past = *(x[:, :before].astype(jnp.float32) for x in (k, v)), held.ids[:, :before]
    beta = jnp.where(segments.valid[..., None], beta.astype(jnp.float32), 0)

    def blocks(x):
        x = cut(x, chunk)
        return jnp.swapaxes(x, 2, 3).astype(jnp.float32) if x.ndim == 5 else x

    ids = blocks(segments.ids)
    values, beta = blocks(v[:, before:]), blocks(beta[..., None])
    k = blocks(k[:, before:])
    (queries, keys, own), w, read = _prepare(blocks(q) * width**-0.5, k, values, blocks(w), beta, ids)
    numbers = jnp.arange(len(ids))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def row(_, block):
        number, q, part, owner = block

        def mask(held):
            return (owner[:, :, None] == held[:, None, :]) & (owner[:, :, None] > 0)

        def meet(q, earlier):
            _, k, v, w, read, held = earlier
            part = _partial(einsum("bhck,bhdk->bhcd", q, k), mask(held), v)
            return q - _taken(q, w, read), part

        def visible(earlier):
            # Documents have no gaps: what lies beyond a block of other documents is not visible either.
            return (earlier[0] < number) & mask(earlier[-1]).any()

        q, part = over_blocks(meet, visible, (q, part), (numbers, keys, values, w, read, ids))
        if before:
            k, v, of_past = past
            part = merge(part, _partial(einsum("bhck,bshk->bhcs", q, k), mask(of_past), jnp.moveaxis(v, 1, 2)))
        return None, (q, part)

    _, (queries, part) = jax.lax.scan(row, None, (numbers, queries, own, ids))

    def to_end(product, block):
        k, w, read = block
        return product - _taken(product, w, read), einsum("bhij,bhcj->bhci", product, k)

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
    visible = jnp.tril((ids[..., :, None] == ids[..., None, :]) & (ids[..., None] > 0))
    part = _partial(logits, visible, v)
    queries = q - einsum("nbhcd,nbhdk->nbhck", met, read)
    keys = k - einsum("nbhcd,nbhck->nbhdk", taken, w)
    return (queries, keys, part), w, read


def _taken(x, w, read):
    """What a block takes from rows on its right: x P = x - (x W^T) R."""
    return einsum("bhcd,bhdk->bhck", einsum("bhck,bhdk->bhcd", x, w), read)


def _partial(logits, visible, v) -> Partial:
    """Softmax of logits [..., H, C, S] where `visible` [..., C, S], as a partial result."""
    logits = jnp.where(visible[..., None, :, :], logits, -jnp.inf)
    return of_logits(logits, lambda weights: einsum("...cs,...sv->...cv", weights, v))


PATH = Keyed("path_attention", Queries, Keys, definition, chunked, partial=None, sharded=sharded, options=Options)
