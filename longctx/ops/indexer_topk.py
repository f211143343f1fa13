r"""Softmax attention of each query to the n keys that a light indexer scores highest.

DeepSeek sparse attention (DeepSeek-AI, arXiv:2512.02556). J narrow heads, of weights w, compare the query's index with
the one index of each key:

    I_ts = Σ_j w_tj ReLU(qI_tj . kI_s)
    S_t = the n keys s <= t of the document with the largest I_ts, the first of equal ones; all if there are fewer
    a_hts = softmax of scale q_ht . k_s over s in S_t;    out_ht = Σ_s a_hts v_s

All heads see the same keys. The choice has no gradient: the indexer learns from

    p_ts = Σ_h a_hts / H;    loss_t = Σ_{s in S_t} p_ts (log p_ts - log softmax_s I_ts)

alone, the divergence of its own distribution over S_t from the mean of the heads', p held fixed. With n unlimited S_t
is all that a query may see: attention is full, and the loss is that of the dense warm-up.

The fast form scores queries in chunks, T² J products of width I, and gathers the chosen keys, T n of width K. Of a row
that several devices share, each needs all of the keys' indices, and of keys and values those that it chooses.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.chunks import cut, join
from longctx.ops.family import Keyed, Result
from longctx.ops.key_blocks import choose
from longctx.ops.partial import softmax, terms
from longctx.ops.row import WHOLE, Row
from longctx.ops.sizes import sizes
from longctx.typing import Segments


class Queries(NamedTuple):
    """Head h reads the keys and values of group h // (H // G); qI and w are those of the indexer."""

    q: Float[Array, "B T H K"]
    index_q: Float[Array, "B T J I"]
    weights: Float[Array, "B T J"]


class Keys(NamedTuple):
    """Of a row in which documents are contiguous; kI is the indexer's."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    index_k: Float[Array, "B S I"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What attention to the n best keys has beside arrays.

    Attributes:
      count: n; None for no limit.
      scale: of the logits; None for 1 / sqrt(K).
    """

    count: int | None
    scale: float | None = None


def chunked(
    queries: Queries,
    keys: Keys,
    parameters: None,
    segments: Segments,
    held: Segments,
    options: Options,
    row: Row = WHOLE,
) -> Result:
    """The fast form, on a part of a `row`. The loss of each token has gradients for what is the indexer's alone."""
    (q, index_q, weights), (k, v, index_k), count = queries, keys, options.count
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    index_k, held = row.gather((index_k, held))
    if count is None:
        k, v = row.gather((k, v))
        chosen, count = None, k.shape[1]
    else:

        def score(index_q, weights, ids, positions):
            def add(total, head):
                products = jnp.einsum("bti,bsi->bts", head[0], index_k, preferred_element_type=jnp.float32)
                return total + head[1][..., None] * jax.nn.relu(products), None

            # Head by head: the products of all would be J times as many as scores.
            heads = jnp.moveaxis(index_q, 2, 0), jnp.moveaxis(weights.astype(jnp.float32), 2, 0)
            start = jnp.zeros((*ids.shape, index_k.shape[1]), jnp.float32)
            scores = jax.lax.scan(add, start, heads)[0]
            return jnp.where(_visible(ids, positions, held), scores, -jnp.inf)[:, :, None, None]

        chosen = choose(score, (index_q, weights, segments.ids, segments.positions), count)[:, :, 0, 0]
        count = chosen.shape[-1]
        k, v = _fetch(row, (k, v), chosen)

    @jax.checkpoint
    def some(queries, tokens):
        if chosen is None:
            visible, keys, shared = _visible(*tokens, held), (k, v, index_k), None
        else:
            places = jnp.maximum(tokens, 0)
            keys = [jax.vmap(lambda x, places: x[places])(x, places) for x in (k, v, index_k)]
            visible, shared = tokens >= 0, 0
        each = jax.vmap(_attend, (0, 0, 0, 0, shared, shared, shared, None))  # queries
        return jax.vmap(each, (0,) * 7 + (None,))(*queries, visible, *keys, scale)  # rows

    length = q.shape[1]
    step = min(length, max(8, min(sizes().chosen, sizes().fetched // count)))

    tokens = (segments.ids, segments.positions) if chosen is None else chosen
    y, loss = jax.lax.map(lambda args: some(*args), cut(((q, index_q, weights), tokens), step))
    y, loss = join((y, loss), length)
    return Result(y.astype(v.dtype), loss)


def _visible(ids, positions, held: Segments):
    """Whether queries may see keys, `[B, T, S]`."""
    document = (ids[:, :, None] == held.ids[:, None]) & (ids > 0)[:, :, None]
    return document & (held.positions[:, None] <= positions[:, :, None])


def _fetch(row: Row, tree, chosen):
    """The chosen tokens among all of the row: blocks of one token and one group."""
    blocks = [x.reshape(*x.shape[:2], 1, 1, -1) for x in tree]
    found = row.fetch(blocks, chosen[:, :, None])
    return [x.reshape(*x.shape[:2], *like.shape[2:]) for x, like in zip(found, tree, strict=True)]


def _attend(q, index_q, weights, visible, k, v, index_k, scale):
    """One query, `[H, K]`, with `[J, I]` and `[J]`, and its keys `[n, G, K]`: what it reads, and its loss."""
    logits = jnp.einsum("grk,ngk->grn", q.reshape(k.shape[1], -1, k.shape[2]), k, preferred_element_type=jnp.float32)
    logits = jnp.where(visible, logits * scale, -jnp.inf)
    exponentials, total, _ = terms(logits)
    shares = exponentials / total[..., None]
    y = jnp.einsum("grn,ngv->grv", shares.astype(v.dtype), v, preferred_element_type=jnp.float32)
    products = jnp.einsum("ji,ni->jn", index_q, index_k, preferred_element_type=jnp.float32)
    scores = jnp.einsum("j,jn->n", weights.astype(jnp.float32), jax.nn.relu(products))
    target = jax.lax.stop_gradient(shares.mean((0, 1)))
    counts = target > 0  # of unseen keys, and of those too far below the best, nothing is left
    logs = jax.nn.log_softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min))
    loss = jnp.where(counts, target * (jnp.log(jnp.where(counts, target, 1.0)) - logs), 0.0).sum()
    return y.reshape(-1, y.shape[-1]), loss


def definition(
    queries: Queries, keys: Keys, parameters: None, segments: Segments, held: Segments, options: Options
) -> Result:
    """The definition, query by query."""
    (q, index_q, weights), (k, v, index_k), count = queries, keys, options.count
    repeats, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if options.scale is None else options.scale
    keys, values, indices = (x.astype(jnp.float32) for x in (k, v, index_k))
    keys, values = keys.repeat(repeats, axis=2), values.repeat(repeats, axis=2)

    def one(query):
        q, index, weights, document, position = query
        visible = (held.ids == document[:, None]) & (document > 0)[:, None] & (held.positions <= position[:, None])
        products = jnp.einsum("bji,bsi->bjs", index.astype(jnp.float32), indices)
        scores = jnp.einsum("bj,bjs->bs", weights, jnp.maximum(products, 0))
        if count is not None:
            order = jnp.argsort(jnp.where(visible, -scores, jnp.inf), axis=-1, stable=True)
            visible &= jnp.argsort(order, axis=-1) < count
        logits = jnp.einsum("bhk,bshk->bhs", q, keys) * scale
        attention = softmax(logits, visible[:, None])
        p, indexer = jax.lax.stop_gradient(attention.mean(1)), softmax(scores, visible)
        tiny = jnp.finfo(jnp.float32).tiny
        loss = p * (jnp.log(jnp.maximum(p, tiny)) - jnp.log(jnp.maximum(indexer, tiny)))
        return jnp.einsum("bhs,bshv->bhv", attention, values), loss.sum(-1)

    queries = q, index_q, weights, segments.ids, segments.positions
    y, loss = jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), queries))
    return Result(jnp.moveaxis(y, 0, 1).astype(v.dtype), loss.T)


INDEXER_TOPK = Keyed("indexer_topk", Queries, Keys, definition, chunked, partial=None, sharded=chunked, options=Options)
