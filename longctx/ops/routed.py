r"""Softmax attention of each query to blocks of keys that were chosen for it.

For query t with chosen blocks c_1 ... c_n, each of C keys,

    L_t = log Σ_j Σ_{s in block c_j} exp(scale q_t . k_s)
    out_t = Σ_j Σ_{s in block c_j} exp(scale q_t . k_s - L_t) v_s

A query and one of its blocks are an *assignment*, of which there are T n. Gathering each query's keys would read every
key once for each query that chose it. Instead the assignments are sorted by block and cut into tiles, all of one block:
a tile is two matrix products, [tile, K] x [K, C] and [tile, C] x [C, V], as in the experts of a mixture (MoBA, Lu et
al., arXiv:2502.13189). Its results are partial results over keys that no other tile of the same queries has, and merge
with what is there. Work: 2 (T n + N tile) C (K + V) operations a head, N the number of blocks, whose last tiles are not
full. The backward pass computes the weights of each tile again from L, as in `ops/blockwise.py`; memory is that of
inputs and outputs, and T n numbers of queries.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.partial import Partial, merge, of_logits
from longctx.ops.sizes import sizes


class Tiles(NamedTuple):
    """What each tile works on, in the order of the blocks.

    Attributes:
      block: index of the block.
      queries: indices of different queries, T where there is none.
    """

    block: Int[Array, " tiles"]
    queries: Int[Array, "tiles size"]


def attend(
    q: Float[Array, "B T G R K"],
    k: Float[Array, "B N C G K"],
    v: Float[Array, "B N C G V"],
    chosen: Int[Array, "B T G n"],
    scale: float,
) -> Partial:
    """Attention of every query to all keys of the blocks chosen for its group.

    Args:
      q: queries, R heads to a group.
      k, v: keys and values by block.
      chosen: indices of blocks, different ones for each query; -1 for none.
      scale: of the logits.

    Returns:
      float32 output `[B, T, G, R, V]` and logsumexp `[B, T, G, R]`; 0 and -inf where no block is chosen. First
      derivatives only.
    """
    q, chosen = (jnp.moveaxis(x, 2, 1) for x in (q, chosen))  # [B, G, T, ...]
    k, v = (jnp.moveaxis(x, 3, 1) for x in (k, v))  # [B, G, N, C, ...]
    tiles = _by_head(functools.partial(_tiles, blocks=k.shape[2]))(chosen)
    partial = _by_head(functools.partial(_attend, scale))(q, k, v, tiles)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), partial)


def _by_head(f):
    """`f` for each row of the batch and each group; what follows is about one of these."""
    return jax.vmap(jax.vmap(f))


def _tiles(chosen: Int[Array, "T n"], blocks: int) -> Tiles:
    """The tiles of all assignments; as many as there can be."""
    tile, (length, count) = sizes().tile, chosen.shape
    most = length * count // tile + min(blocks, length * count)
    block = jnp.where(chosen < 0, blocks, chosen).reshape(-1)  # none is a block after the last
    order = jnp.argsort(block, stable=True)
    counts = jnp.bincount(block, length=blocks + 1)[:blocks]
    tiles = -(-counts // tile)
    ends = jnp.cumsum(tiles)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(most), side="right"), blocks - 1)
    # Numbers of each tile's assignments among those of its block; beyond the last block's last there are none.
    number = (jnp.arange(most) - (ends - tiles)[owner])[:, None] * tile + jnp.arange(tile)
    place = (jnp.cumsum(counts) - counts)[owner][:, None] + number
    queries = order.at[place].get(mode="clip") // count
    return Tiles(owner, jnp.where(number < counts[owner][:, None], queries, length))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q, k, v, tiles: Tiles) -> Partial:
    return _forward(scale, q, k, v, tiles)[0]


def _forward(scale, q, k, v, tiles):
    def step(part, tile):
        logits = _logits(scale, _rows(q, tile), k[tile.block])
        values = v[tile.block]
        read = functools.partial(jnp.einsum, "trc,cv->trv", preferred_element_type=jnp.float32)
        found = of_logits(logits, lambda weights: read(weights.astype(v.dtype), values))
        merged = merge(jax.tree.map(lambda x: _rows(x, tile), part), found)
        return jax.tree.map(lambda x, rows: x.at[tile.queries].set(rows, mode="drop"), part, merged), None

    shape = q.shape[:2]
    nothing = Partial(jnp.zeros((*shape, v.shape[-1])), jnp.full(shape, -jnp.inf))
    part, _ = jax.lax.scan(step, nothing, tiles)
    return part, (q, k, v, tiles, part)


def _backward(scale, residuals, cotangent):
    q, k, v, tiles, part = residuals
    share = (cotangent.output * part.output).sum(-1) - cotangent.logsumexp
    d_out = cotangent.output.astype(v.dtype)

    def step(gradients, tile):
        dq, dk, dv = gradients
        rows, slopes, keys = _rows(q, tile), _rows(d_out, tile), k[tile.block]
        weights = jnp.exp(_logits(scale, rows, keys) - _rows(part.logsumexp, tile)[..., None])
        d_weights = jnp.einsum("trv,cv->trc", slopes, v[tile.block], preferred_element_type=jnp.float32)
        d_logits = (weights * (d_weights - _rows(share, tile)[..., None]) * scale).astype(q.dtype)
        weights = weights.astype(v.dtype)
        to_queries = jnp.einsum("trc,ck->trk", d_logits, keys, preferred_element_type=jnp.float32)
        to_keys = jnp.einsum("trc,trk->ck", d_logits, rows, preferred_element_type=jnp.float32)
        to_values = jnp.einsum("trc,trv->cv", weights, slopes, preferred_element_type=jnp.float32)
        dq = dq.at[tile.queries].add(to_queries, mode="drop")
        return (dq, dk.at[tile.block].add(to_keys), dv.at[tile.block].add(to_values)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    gradients, _ = jax.lax.scan(step, zeros, tiles)
    return *(x.astype(like.dtype) for x, like in zip(gradients, (q, k, v), strict=True)), None


_attend.defvjp(_forward, _backward)


def _rows(x, tile: Tiles):
    """The rows of a tile's queries, zeros where there is none: these add nothing to any gradient."""
    return x.at[tile.queries].get(mode="fill", fill_value=0)


def _logits(scale, q, k):
    return jnp.einsum("trk,ck->trc", q, k, preferred_element_type=jnp.float32) * scale
