r"""CoPE, contextual position encoding: softmax attention whose positions count the tokens that the query lets count.

For query t and the keys s <= t of its document, per head, with gates g_ts = sigmoid(scale q_t . k_s),

    p_ts = min(sum_{s <= u <= t} g_tu, N - 1)
    logit_ts = scale q_t . k_s + q_t . e(p_ts),    out_t = sum_s softmax_s(logit_ts) v_s

with N learned embeddings e_0 ... e_{N-1}, which heads share, and between two of them

    e(p) = (p - n) e_{ceil p} + (1 - p + n) e_n,    n = floor p.

The paper's formulas leave the scale out; this is the code in its appendix, where gates are of the scaled products and
the term of positions has no scale. The released code scales that term too unless `--cope-nodiv` is given: its
embeddings are then those here over the scale.

Block form. q_t . e(p) lies between two of the N products q_t . e_n, which are made once for each query. Blocks of keys
are visited from the last to the first. For each query go along the sum G_t of the gates of the keys visited so far and
the partial softmax over them; in the next block

    p_ts = min(G_t + sum_{u >= s} g_tu, N - 1)

so that keys may be in a cache or on other devices, if only the later ones come first. Devices that share a row pass
their keys and values round: device p meets its own keys, then those of p-1, of p-2, and so on; the sums of gates and
the partial softmax stay with the queries. Keys of later shards, which come last, are after all queries and cost no
work. Backwards this is differentiated plainly, so that a device keeps the keys and values of all shards.

Reference: Golovneva et al., "Contextual Position Encoding: Learning to Count What's Important", 2024
(arXiv:2405.18719), section 4.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.chunks import cut
from longctx.ops.family import Keyed, Keys, Queries, Result
from longctx.ops.partial import Partial, of_logits, over_blocks, softmax
from longctx.ops.products import einsum
from longctx.ops.row import Row
from longctx.typing import Segments


class Visited(NamedTuple):
    """What a query knows of the keys visited so far, the later ones of its document. All float32."""

    partial: Partial
    gates: Float[Array, "B T H"]  # their sum


class Parameters(NamedTuple):
    """Embeddings of the positions 0 to N - 1."""

    embeddings: Float[Array, "N K"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What CoPE has beside arrays.

    Attributes:
      scale: of the products of queries and keys; None for 1 / sqrt(K).
      chunk: tokens a block of queries and of keys.
    """

    scale: float | None = None
    chunk: int = 128


def definition(
    queries: Queries, keys: Keys, parameters: Parameters, segments: Segments, held: Segments, options: Options
) -> Result:
    """The definition. Holds all logits. Keys of a document are in the order of their positions."""
    (q,), (k, v), (embeddings,) = queries, keys, parameters
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    q = q.astype(jnp.float32)
    k, v32 = (x.astype(jnp.float32).repeat(q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    visible = segments.before(held)[:, None]
    logits = scale * jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")
    gates = jnp.where(visible, jax.nn.sigmoid(logits), 0.0)
    positions = jnp.minimum(jnp.flip(jnp.cumsum(jnp.flip(gates, -1), -1), -1), len(embeddings) - 1)
    products = jnp.einsum("bthk,nk->bhtn", q, embeddings.astype(jnp.float32), precision="highest")
    below, above = jnp.floor(positions), jnp.ceil(positions)
    low, high = (jnp.take_along_axis(products, n.astype(jnp.int32), axis=-1) for n in (below, above))
    logits += (positions - below) * high + (1 - positions + below) * low
    y = jnp.einsum("bhts,bshv->bthv", softmax(logits, visible), v32, precision="highest")
    return Result(y.astype(v.dtype))


def chunked(
    queries: Queries, keys: Keys, parameters: Parameters, segments: Segments, held: Segments, options: Options
) -> Result:
    """The same, by blocks of queries and keys; memory grows linearly with T and S."""
    visited = attend(queries, keys, parameters, segments, held, options)
    return Result(visited.partial.output.astype(keys.v.dtype))


def sharded(
    queries: Queries,
    keys: Keys,
    parameters: Parameters,
    segments: Segments,
    held: Segments,
    options: Options,
    row: Row,
) -> Result:
    """Keys and values go round the devices, and meet the queries from the last to the first."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def hop(carry, _):
        visited, (keys, held) = carry
        visited = attend(queries, keys, parameters, segments, held, options, visited)
        # The last hop sends the keys home for nothing, which costs less than a second copy of it to compile.
        return (visited, row.onward((keys, held))), None

    start = _nothing(queries.q, keys.v), (keys, held)
    (visited, _), _ = jax.lax.scan(hop, start, None, length=row.parts)
    return Result(visited.partial.output.astype(keys.v.dtype))


def attend(
    queries: Queries,
    keys: Keys,
    parameters: Parameters,
    segments: Segments,
    held: Segments,
    options: Options,
    after: Visited | None = None,
) -> Visited:
    """Attention to these keys once those `after` them have been visited.

    The keys of a document that are in `after` must all be later than those given here. Backwards, each block of
    queries visits its keys again.
    """
    (q,), (k, v), (embeddings,), chunk = queries, keys, parameters, options.chunk
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    scale = width**-0.5 if options.scale is None else options.scale
    last = len(embeddings) - 1

    def of_queries(x):  # [blocks, B, G, R, C, ...]
        x = _blocks(x.astype(jnp.float32), chunk)
        return jnp.moveaxis(x.reshape(*x.shape[:3], groups, -1, *x.shape[4:]), 2, 4)

    if after is None:
        after = _nothing(q, v)
    rows = of_queries(q), jax.tree.map(of_queries, after), _tokens(segments, chunk)
    keys = *(_blocks(x.astype(jnp.float32), chunk) for x in (k, v)), _tokens(held, chunk)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def row(_, block):
        q, visited, (ids, positions) = block
        products = einsum("bgrik,nk->bgrin", q, embeddings.astype(jnp.float32))

        def mask(block):
            *_, (k_ids, k_positions) = block
            document = (ids[:, :, None] == k_ids[:, None, :]) & (ids[:, :, None] > 0)
            return document & (k_positions[:, None, :] <= positions[:, :, None])

        def meet(sums, block):
            k, v, _ = block
            visible = mask(block)[:, None, None]
            logits = scale * einsum("bgrik,bjgk->bgrij", q, k)
            gates = jnp.where(visible, jax.nn.sigmoid(logits), 0.0)
            counted = sums[..., None] + jax.lax.cumsum(gates, axis=gates.ndim - 1, reverse=True)
            logits = jnp.where(visible, logits + _between(products, jnp.minimum(counted, last)), -jnp.inf)
            return counted[..., 0], of_logits(logits, lambda weights: einsum("bgrij,bjgv->bgriv", weights, v))

        gates, partial = over_blocks(meet, lambda block: mask(block).any(), (visited.gates, visited.partial), keys)
        return None, Visited(partial, gates)

    _, visited = jax.lax.scan(row, None, rows)

    def by_token(x):
        x = jnp.moveaxis(x, (0, 4), (1, 2))  # [B, blocks, C, G, R, ...]
        return x.reshape(batch, -1, heads, *x.shape[5:])[:, :length]

    return jax.tree.map(by_token, visited)


def _nothing(q: Float[Array, "B T H K"], v: Float[Array, "B S G V"]) -> Visited:
    """Before any key."""
    rows = q.shape[:3]
    return Visited(Partial(jnp.zeros((*rows, v.shape[-1])), jnp.full(rows, -jnp.inf)), jnp.zeros(rows))


def _blocks(x, size):
    """`[blocks, B, C, ...]`."""
    return cut(x, min(size, x.shape[1]))


def _tokens(segments: Segments, size: int):
    """Ids and positions by block."""
    return _blocks(segments.ids, size), _blocks(segments.positions, size)


def _between(products, positions):
    """The products at fractional positions, each on the line between two."""
    below, above = jnp.floor(positions), jnp.ceil(positions)
    low, high = (jnp.take_along_axis(products, n.astype(jnp.int32), axis=-1) for n in (below, above))
    return low + (positions - below) * (high - low)


COPE = Keyed(
    "cope",
    Queries,
    Keys,
    definition,
    chunked,
    partial=None,
    sharded=sharded,
    parameters=Parameters,
    options=Options,
)
