r"""Softmax attention of each query to blocks of keys that were chosen for it.

For query t with chosen blocks c_1 ... c_n, each of C keys,

    out_t = Σ_j Σ_{s in block c_j} exp(scale q_t . k_s - L_t) v_s

A query and one of its blocks are an *assignment*, of which there are T n. Gathering each query's keys would read every
key once for each query that chose it. Instead the assignments are sorted by block and cut into tiles, all of one block:
a tile is two matrix products, [tile, K] x [K, C] and [tile, C] x [C, V], as in the experts of a mixture (MoBA, Lu et
al., arXiv:2502.13189). The results of a query's n assignments are partial results over disjoint keys, and merge.
Work: 2 (T n + N tile) C (K + V) operations a head, N the number of blocks, whose last tiles are not full.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.partial import Partial

_TILE = 64  # assignments a tile


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
      float32 output `[B, T, G, R, V]` and logsumexp `[B, T, G, R]`; 0 and -inf where no block is chosen.
    """
    rows = functools.partial(jnp.moveaxis, destination=1)
    q, chosen = rows(q, 2), rows(chosen, 2)  # [B, G, T, ...]
    k, v = rows(k, 3), rows(v, 3)
    one = jax.vmap(jax.vmap(functools.partial(_attend, scale=scale)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), one(q, k, v, chosen))


def _attend(q, k, v, chosen, scale) -> Partial:
    """The same for one row and group: q `[T, R, K]`, k `[N, C, K]`, chosen `[T, n]`."""
    blocks, (length, count) = len(k), chosen.shape
    block = jnp.where(chosen < 0, blocks, chosen).reshape(-1)  # none is a block after the last
    order = jnp.argsort(block, stable=True)
    sizes = jnp.bincount(block, length=blocks + 1)[:blocks]
    tiles = -(-sizes // _TILE)
    first_tile = jnp.cumsum(tiles) - tiles
    # Where in its block's tiles each assignment goes; assignments to none go nowhere.
    number = jnp.arange(length * count) - (jnp.cumsum(sizes) - sizes)[jnp.minimum(block[order], blocks - 1)]
    most = length * count // _TILE + blocks
    slot = first_tile[jnp.minimum(block[order], blocks - 1)] * _TILE + number
    slot = jnp.where(block[order] < blocks, slot, most * _TILE)
    query = jnp.full(most * _TILE, -1, jnp.int32).at[slot].set(order // count, mode="drop").reshape(most, _TILE)
    owner = jnp.searchsorted(jnp.cumsum(tiles), jnp.arange(most), side="right")

    @jax.checkpoint
    def tile(queries, block):
        logits = jnp.einsum("trk,ck->trc", q[queries], k[block], preferred_element_type=jnp.float32) * scale
        peak = jax.lax.stop_gradient(logits.max(-1))
        weights = jnp.exp(logits - peak[..., None])
        total = weights.sum(-1)
        out = jnp.einsum("trc,cv->trv", weights.astype(v.dtype), v[block], preferred_element_type=jnp.float32)
        return out / total[..., None], peak + jnp.log(total)

    done = jax.lax.map(lambda args: tile(*args), (jnp.maximum(query, 0), jnp.minimum(owner, blocks - 1)))
    out, logsumexp = (x.reshape(most * _TILE, *x.shape[2:]) for x in done)
    back = jnp.full(length * count, most * _TILE, jnp.int32).at[order].set(slot.astype(jnp.int32))
    back = back.reshape(length, count)
    found = back < most * _TILE
    logsumexp = jnp.where(found[..., None], logsumexp.at[back].get(mode="clip"), -jnp.inf)
    total = jax.nn.logsumexp(logsumexp, axis=1, where=found[..., None])
    shares = jnp.where(found[..., None], jnp.exp(logsumexp - jnp.where(jnp.isneginf(total), 0.0, total)[:, None]), 0.0)
    output = jnp.einsum("tnr,tnrv->trv", shares, out.at[back].get(mode="clip"))
    return Partial(output, total)
