r"""MoBA: each query attends to its own block of keys and to the earlier blocks that it scores highest.

Mixture of block attention (Lu et al., arXiv:2502.13189, equations 3 to 6). Documents are cut into blocks of C tokens.
With k̄_c the mean of the keys of block c, and b = t // C the query's own block,

    I_t = {b} and the n - 1 blocks c < b with the largest q_t . k̄_c, the first of equal ones
    out_t = softmax(scale q_t . k_s) v_s over the tokens s <= t of the blocks in I_t

Each head of the queries chooses for itself. The choice has no gradient. The fast form is a causal attention within
blocks merged with `ops/routed.py` over the blocks before; it costs T² / C products for the scores, and T n C for the
attention. Of a row that several devices share, each needs the means of all blocks, and the blocks that it chooses.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from longctx.ops import routed
from longctx.ops.attention import attention_partial
from longctx.ops.family import Keyed, Keys, Queries, Result
from longctx.ops.key_blocks import KeyBlocks, choose
from longctx.ops.partial import Partial, merge, softmax
from longctx.ops.patterns import Causal, Chunked
from longctx.ops.row import WHOLE, Row
from longctx.typing import Segments


@dataclasses.dataclass(frozen=True)
class Options:
    """What MoBA has beside arrays.

    Attributes:
      block: C, tokens a block.
      count: n, blocks that a query attends to, its own included.
      scale: of the logits; None for 1 / sqrt(K).
    """

    block: int
    count: int
    scale: float | None = None


def chunked(
    queries: Queries,
    keys: Keys,
    parameters: None,
    segments: Segments,
    key_segments: Segments,
    options: Options,
    row: Row = WHOLE,
) -> Result:
    """The fast form, on a part of a `row` in which documents are contiguous, of one or several devices."""
    (q,), (k, v), block = queries, keys, options.block
    batch, length, heads, width = q.shape
    groups, repeats = k.shape[2], heads // k.shape[2]
    scale = width**-0.5 if options.scale is None else options.scale
    *near, around = row.near((k, v, key_segments), block - 1)
    own = None if around is segments else around
    within = attention_partial(q, *near, Causal() & Chunked(block), segments, own, scale=scale)
    if options.count == 1:
        return Result(within.output.astype(v.dtype))
    blocks, (keys, values) = KeyBlocks.cut(near, around, block, row, k.shape[1])
    blocks, means = row.gather((blocks, keys.astype(jnp.float32).mean(2)))

    def score(q, ids, own):
        scores = jnp.einsum("btgrk,bngk->btgrn", q, means, preferred_element_type=jnp.float32)
        may = (blocks.ids[:, None] == ids[:, :, None]) & (blocks.index[:, None] < own[:, :, None])
        return jnp.where((may & (ids > 0)[:, :, None])[:, :, None, None], scores, -jnp.inf)

    by_group = q.reshape(batch, length, groups, repeats, width)
    chosen = choose(score, (by_group, segments.ids, segments.positions // block), options.count - 1)

    # Each head is a query of its own, as it chooses its own blocks.
    def single(x):
        return jnp.moveaxis(x, 3, 2).reshape(batch, length * repeats, groups, *x.shape[4:])

    chosen = single(chosen)
    keys, values = row.fetch((keys, values), chosen)
    far = routed.attend(single(by_group)[:, :, :, None], keys, values, chosen, scale)

    def together(x):
        x = x.reshape(batch, length, repeats, groups, *x.shape[4:])
        return jnp.moveaxis(x, 2, 3).reshape(batch, length, heads, *x.shape[4:])

    far = Partial(together(far.output), together(far.logsumexp))
    return Result(merge(within, far).output.astype(v.dtype))


def definition(
    queries: Queries, keys: Keys, parameters: None, segments: Segments, held: Segments, options: Options
) -> Result:
    """The definition, with all logits held at once."""
    (q,), (k, v), block = queries, keys, options.block
    repeats, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if options.scale is None else options.scale
    keys, values = (x.repeat(repeats, axis=2).astype(jnp.float32) for x in (k, v))
    same = (segments.ids[:, :, None] == held.ids[:, None, :]) & segments.valid[:, :, None]  # [B, T, S]
    own, theirs = segments.positions // block, held.positions // block
    # The mean of the keys of the block that each key is in.
    alike = (held.ids[:, :, None] == held.ids[:, None, :]) & (theirs[:, :, None] == theirs[:, None, :])
    means = jnp.einsum("bsu,buhk->bshk", alike / alike.sum(-1, keepdims=True), keys)
    scores = jnp.einsum("bthk,bshk->bhts", q.astype(jnp.float32), means)
    # The rank of each earlier block, named by its first token, among all of them.
    earlier = (same & (theirs[:, None, :] < own[:, :, None]))[:, None]
    opens = earlier & (held.positions % block == 0)[:, None, None, :]
    rank = jnp.argsort(jnp.argsort(jnp.where(opens, -scores, jnp.inf), axis=-1, stable=True), axis=-1)
    first = jnp.maximum(jnp.arange(k.shape[1]) - held.positions % block, 0)[:, None, None, :]
    chosen = earlier & (jnp.take_along_axis(rank, first, axis=-1) < options.count - 1)
    visible = chosen | (same & (theirs[:, None, :] == own[:, :, None]))[:, None]
    visible &= (held.positions[:, None, :] <= segments.positions[:, :, None])[:, None]
    logits = jnp.einsum("bthk,bshk->bhts", q, keys, preferred_element_type=jnp.float32) * scale
    return Result(jnp.einsum("bhts,bshv->bthv", softmax(logits, visible), values).astype(v.dtype))


MOBA = Keyed("moba", Queries, Keys, definition, chunked, partial=None, sharded=chunked, options=Options)
