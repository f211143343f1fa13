r"""Attention within buckets: what a query attends to is the keys before it that fell into its own bucket.

In each of R rounds every query and key of a head has a hash, the number of a bucket. With m_ts the number of rounds in
which those of query t and key s agree (Kitaev et al., arXiv:2001.04451, Reformer),

    out_t = Σ_{s < t of the document} m_ts exp(scale q_t . k_s - L_t) v_s

with L_t the logarithm of the denominator. As in Reformer a token does not see itself, which among keys made from the
same vector as the queries would always score highest, unless there is nothing else to see: then out_t = v_t.

A key that agrees in m rounds counts m times, so that the rounds are a sum: each is an attention of its own, and they
mix by their denominators. Reformer divides m out, for which each round must know the hashes of all; here a key counts
the more, the likelier it is to agree.

The bucket is the nearest by angle of N vectors: random ones and their opposites (Reformer), or centroids that learn
(Roy et al., arXiv:2003.05997, Routing Transformer). The choice has no gradient.

The fast form sorts the row by (document, bucket, position), once a round, and is then attention under `Causal` with a
document for each bucket: blocks of different buckets never meet. A round's work is T² / N products if the buckets are
of one size, and T times the size of the largest if not; if all tokens fall into one, that of full attention.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.attention import attention_partial
from longctx.ops.family import Keyed, Result
from longctx.ops.partial import Partial, merge, softmax
from longctx.ops.patterns import Causal
from longctx.ops.row import Row
from longctx.typing import Segments, checked


@checked
def nearest(
    x: Float[Array, "B T H K"], directions: Float[Array, "H R N K"]
) -> tuple[Int[Array, "B T H R"], Float[Array, "B T H R"]]:
    """The direction with the largest product, the first of equal ones, for each token, head and round.

    Args:
      x: queries and keys before rotary positions, of any norm.
      directions: N a round, of equal norm.

    Returns:
      its number, and the product, float32.
    """
    products = jnp.einsum("bthk,hrnk->bthrn", x.astype(jnp.float32), directions, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(products, axis=-1).astype(jnp.int32), products.max(-1)


class Queries(NamedTuple):
    """Head h reads the keys and values of group h // (H // G). Hashes are numbers of buckets, from 0 to N - 1.

    Attributes:
      own: values of the queries' own tokens.
    """

    q: Float[Array, "B T H K"]
    own: Float[Array, "B T G V"]
    hashes: Int[Array, "B T H R"]


class Keys(NamedTuple):
    """Keys, values and the numbers of their buckets, in any order."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    hashes: Int[Array, "B S G R"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What attention within buckets has beside arrays.

    Attributes:
      buckets: N.
      scale: of the logits; None for 1 / sqrt(K).
    """

    buckets: int
    scale: float | None = None


def chunked(
    queries: Queries, keys: Keys, parameters: None, segments: Segments, held: Segments, options: Options
) -> Result:
    """The fast form."""
    call = queries, keys, parameters, segments, held, options
    return finish(partial(*call), *call)


def sharded(
    queries: Queries,
    keys: Keys,
    parameters: None,
    segments: Segments,
    key_segments: Segments,
    options: Options,
    row: Row,
) -> Result:
    """A bucket's tokens are everywhere: keys, values and hashes go round the devices, once for all rounds of hashing.

    The bytes are those of full attention, and the hashes. What is saved is work: a device sorts the keys that it holds
    at each hop, and attends bucket by bucket.
    """

    def some(q, entries, mine, theirs):
        (hashes, segments), (key_hashes, held) = mine, theirs
        others = Keys(*entries, key_hashes)
        return partial(Queries(q, queries.own, hashes), others, None, segments, held, options)

    hashes = (queries.hashes, segments), (keys.hashes, key_segments)
    others = row.merged(some, queries.q, (keys.k, keys.v), *hashes)
    return finish(others, queries, keys, parameters, segments)


def finish(others: Partial, queries: Queries, keys: Keys, parameters: None, segments: Segments, *_) -> Result:
    """What a token sees of the others, or its own value if that is nothing; 0 for padding."""
    own = jnp.repeat(queries.own, others.output.shape[2] // queries.own.shape[2], axis=2)
    alone = segments.valid[..., None, None] & jnp.isneginf(others.logsumexp)[..., None]
    return Result(jnp.where(alone, own, others.output.astype(own.dtype)))


def partial(
    queries: Queries, keys: Keys, parameters: None, segments: Segments, held: Segments, options: Options
) -> Partial:
    """Attention to those of these keys that stand before the query."""
    (q, _, q_hashes), (k, v, k_hashes), buckets = queries, keys, options.buckets
    batch, length, heads, width = q.shape
    groups, rounds = k.shape[2], k_hashes.shape[3]

    def sort(arrays, numbers, segments):
        """Rows of one group and round each, `[B G R, tokens, 1, ...]`, in order; and the order."""
        repeats = numbers.shape[2] // groups  # heads of a group, which are queries of their own

        def rows(x):  # [B, T, H, ...] -> [B, G, tokens, ...]
            x = jnp.moveaxis(x.reshape(*x.shape[:2], groups, repeats, *x.shape[3:]), 2, 1)
            return x.reshape(batch, groups, -1, *x.shape[4:])

        number = jnp.moveaxis(rows(numbers), 3, 2)
        document, positions, valid = (
            jnp.repeat(x, repeats, axis=1)[:, None, None] for x in (segments.ids, segments.positions, segments.valid)
        )
        ids = jnp.where(valid, document * buckets + number, 0)
        order = jnp.argsort(ids, axis=-1, stable=True)

        def take(x):  # [B, G, tokens, ...] in the orders of all rounds
            x = jax.vmap(jax.vmap(lambda x, order: x[order]))(rows(x), order)
            return x.reshape(-1, x.shape[3], 1, x.shape[4])

        ids, positions = (
            jnp.take_along_axis(jnp.broadcast_to(x, order.shape), order, axis=-1).reshape(-1, order.shape[-1])
            for x in (ids, positions)
        )
        return [take(x) for x in arrays], Segments(ids, positions, jnp.zeros_like(ids, bool)), order

    before = dataclasses.replace(segments, positions=segments.positions - 1)
    (q,), of_queries, order = sort((q,), q_hashes, before)
    (k, v), of_keys, _ = sort((k, v), k_hashes, held)
    scale = width**-0.5 if options.scale is None else options.scale
    sorted_ = attention_partial(q, k, v, Causal(), of_queries, of_keys, scale=scale)
    back = jnp.argsort(order, axis=-1)

    def restore(x):
        x = x.reshape(*order.shape, -1)
        x = jnp.take_along_axis(x, back[..., None], axis=3)
        x = x.reshape(batch, groups, rounds, length, heads // groups, -1)
        return jnp.moveaxis(x, (2, 1), (0, 3)).reshape(rounds, batch, length, heads, -1)

    output, logsumexp = restore(sorted_.output), restore(sorted_.logsumexp)[..., 0]
    return functools.reduce(merge, map(Partial, output, logsumexp))


def definition(
    queries: Queries, keys: Keys, parameters: None, segments: Segments, held: Segments, options: Options
) -> Result:
    """The definition, all pairs at once."""
    (q, own, q_hashes), (k, v, k_hashes) = queries, keys
    repeats, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if options.scale is None else options.scale
    k, v, own, k_hashes = (x.repeat(repeats, axis=2) for x in (k, v, own, k_hashes))
    visible = (segments.ids[:, :, None] == held.ids[:, None, :]) & segments.valid[:, :, None]
    visible &= held.positions[:, None, :] < segments.positions[:, :, None]  # [B, T, S]
    agree = (q_hashes[:, :, None] == k_hashes[:, None, :]).sum(-1).mT * visible[:, :, None]  # m, [B, T, H, S]
    logits = jnp.einsum("bthk,bshk->bths", q, k, preferred_element_type=jnp.float32) * scale
    weights = softmax(logits + jnp.log(jnp.maximum(agree, 1)), agree > 0)
    others = jnp.einsum("bths,bshv->bthv", weights, v.astype(jnp.float32)).astype(v.dtype)
    alone = segments.valid[..., None] & (agree == 0).all(-1)
    return Result(jnp.where(alone[..., None], own, others))


LSH = Keyed("lsh", Queries, Keys, definition, chunked, partial, sharded, finish, options=Options)
