r"""MoBA: each query attends to its own block of keys and to the earlier blocks that it scores highest.

Mixture of block attention (Lu et al., arXiv:2502.13189, equations 3 to 6). Documents are cut into blocks of C tokens.
With k̄_c the mean of the keys of block c, and b = t // C the query's own block,

    I_t = {b} and the n - 1 blocks c < b with the largest q_t . k̄_c
    out_t = softmax(scale q_t . k_s) v_s over the tokens s <= t of the blocks in I_t

Each head of the queries chooses for itself. The choice has no gradient. The fast form is a causal attention within
blocks merged with `ops/routed.py` over the blocks before; it costs T² / C products for the scores, and T n C for the
attention.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops import routed
from longctx.ops.attention import attention_partial
from longctx.ops.key_blocks import KeyBlocks, choose
from longctx.ops.partial import Partial, merge
from longctx.ops.patterns import Causal, Chunked
from longctx.typing import Segments, checked


@checked
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    segments: Segments,
    held: Segments,
    *,
    block: int,
    count: int,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """The fast form.

    Args:
      q: queries; head h reads the keys and values of group h // (H // G).
      k, v: keys and values of a row in which documents are contiguous; it holds the queries' own tokens.
      segments: of the queries.
      held: of the keys.
      block: C, tokens a block.
      count: n, blocks that a query attends to, its own included.
      scale: of the logits; None for 1 / sqrt(K).

    Returns:
      `[B, T, H, V]` in v's dtype; 0 for padding.
    """
    batch, length, heads, width = q.shape
    groups, repeats = k.shape[2], heads // k.shape[2]
    scale = width**-0.5 if scale is None else scale
    within = attention_partial(q, k, v, Causal() & Chunked(block), segments, held, scale=scale)
    blocks = KeyBlocks.of(held, block)
    if count > 1 and blocks.start.shape[1]:
        keys, values = blocks.gather(k, block), blocks.gather(v, block)
        before = blocks.index[:, None] < (segments.positions // block)[:, :, None]
        may = before & (blocks.ids[:, None] == segments.ids[:, :, None]) & segments.valid[:, :, None]
        by_group = q.reshape(batch, length, groups, repeats, width)
        means = keys.astype(jnp.float32).mean(2)
        chosen = choose(by_group, means, may, count - 1, share=False)
        # Each head is a query of its own, as it chooses its own blocks.
        single = jnp.moveaxis(by_group, 3, 2).reshape(batch, length * repeats, groups, 1, width)
        chosen = jnp.moveaxis(chosen, 3, 2).reshape(batch, length * repeats, groups, -1)
        far = routed.attend(single, keys, values, chosen, scale)
        out = jnp.moveaxis(far.output.reshape(batch, length, repeats, groups, -1), 2, 3)
        total = jnp.moveaxis(far.logsumexp.reshape(batch, length, repeats, groups), 2, 3)
        far = Partial(out.reshape(batch, length, heads, -1), total.reshape(batch, length, heads))
        within = merge(within, far)
    return within.output.astype(v.dtype)


@checked
def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    segments: Segments,
    held: Segments,
    *,
    block: int,
    count: int,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """The definition, query by query; arguments as `chunked`."""
    repeats, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat(repeats, axis=2).astype(jnp.float32), v.repeat(repeats, axis=2)
    same = (segments.ids[:, :, None] == held.ids[:, None, :]) & segments.valid[:, :, None]  # [B, T, S]
    own, theirs = segments.positions // block, held.positions // block
    # The score of the block that each key is in.
    alike = (held.ids[:, :, None] == held.ids[:, None, :]) & (theirs[:, :, None] == theirs[:, None, :])
    means = jnp.einsum("bsu,buhk->bshk", alike / alike.sum(-1, keepdims=True), k)
    scores = jnp.einsum("bthk,bshk->bhts", q, means, preferred_element_type=jnp.float32)
    earlier = (same & (theirs[:, None, :] < own[:, :, None]))[:, None]
    # A block is among the n - 1 best if fewer than that many earlier ones, told by their first tokens, beat it.
    first = earlier & (held.positions % block == 0)[:, None, None, :]
    beats = first[:, :, :, None, :] & (scores[:, :, :, None, :] > scores[..., None])
    chosen = earlier & (beats.sum(-1) < count - 1)
    seen = chosen | (same & (theirs[:, None, :] == own[:, :, None]))[:, None]
    seen &= (held.positions[:, None, :] <= segments.positions[:, :, None])[:, None]
    logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(seen, logits, -jnp.inf)
    peak = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - peak)
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return jnp.einsum("bhts,bshv->bthv", weights, v.astype(jnp.float32)).astype(v.dtype)
