r"""H-Transformer-1D, causal: near tokens are seen one by one, far ones as means of 2, 4, 8, ... tokens.

Level-l token m of a document is its tokens m 2^l to (m + 1) 2^l - 1, with the mean of their keys and of their values.
With blocks of N (even), a query at position t sees at level 0 the tokens s <= t of its own block and the one before,
and at level l >= 1, with u = t // 2^l, the level-l tokens m of the same two blocks of N level-l tokens,

    u // N - m // N <= 1,    of which level l - 1 does not show the parts:    u // (N/2) - m // (N/2) > 1.

So each token is seen once, at one level, up to N 2^(L-1) tokens back and more; all tokens of a document of N 2^L or
fewer. A level-l token counts for its 2^l tokens, and all levels share one softmax, with a bias b for each level:

    y_t = sum_{l, m} softmax(q_t . k_m^l / sqrt(K) + log 2^l + b_l) v_m^l.

In the paper queries far from their keys are means, too. A mean of queries knows the tokens after the first of them, so
here they stay what they are. (Its values are sums, not means: what log 2^l does here. It has no b.)

What a query sees at level l >= 1 ends at least N/2 2^l >= N tokens before it. State, transition and the chunk form,
with chunks of N, follow: `ops/levels.py`, with weights of 1 and 2 N slots, which are two blocks.

Reference: Zhu and Soricut, "H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences", ACL 2021,
arXiv:2107.11906.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longctx.ops import levels as shared
from longctx.ops.levels import Transition
from longctx.typing import Segments, checked

compose, apply = shared.compose, shared.apply


@checked
def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    bias: Float[Array, "H L-1"],
    state: Float[Array, "B L R G K+V+1"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    block: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B L R G K+V+1"]]:
    """The definition, token by token.

    Args:
      q: queries; head h reads the keys and values of group h // (H // G).
      k: keys.
      v: values.
      bias: b, added to the logits of levels 1 to L - 1; that of level 0 is 0.
      state: before the span, None for zeros.
      segment_ids: documents of a packed row; their positions tell the blocks. A document's start forgets everything
        before it; padding leaves the state unchanged and gives 0.
      block: N, even.

    Returns:
      y in the dtype of v, and the state after the span, float32: for each level sums of 1, k and v over the tokens of
      the last 2 N level-l tokens, of which the last may be in progress.

    Raises:
      ValueError: N is not even, G does not divide H, or L is not possible; a state is given, but not the positions at
        which the span continues its document.
    """
    shared.check(q, k, state, segment_ids)
    _levels(bias, block)
    segments = Segments.of(segment_ids, *k.shape[:2])
    (batch, _, groups, width), heads = k.shape, q.shape[2]
    level, slots = np.arange(bias.shape[1] + 1)[:, None], np.arange(2 * block)
    size = 2**level
    bias = level[:, 0] * math.log(2) + jnp.pad(bias, ((0, 0), (1, 0)))

    def step(s, token):
        q, k, v, position, start, valid = token
        u = position[:, None, None] // size
        own = slots == u % (2 * block)
        emptied = start[:, None, None] | (own & (position[:, None, None] % size == 0))
        row = jnp.concatenate([jnp.ones_like(k[..., :1]), k, v], axis=-1)[:, None, None]
        after = jnp.where(emptied[..., None, None], 0, s) + jnp.where(own[..., None, None], row, 0)
        m = u - (u - slots) % (2 * block)
        seen = (m >= 0) & (u // block - m // block <= 1)
        seen &= (level == 0) | (u // (block // 2) - m // (block // 2) > 1)
        mean = after[..., 1:] / jnp.where(after[..., :1] > 0, after[..., :1], 1)
        queries = q.reshape(batch, groups, heads // groups, width)
        logits = jnp.einsum("bgrk,blmgk->bgrlm", queries, mean[..., :width], precision="highest") / math.sqrt(width)
        logits += bias.reshape(*queries.shape[1:3], *level.shape)
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=(-2, -1))
        y = jnp.einsum("bgrlm,blmgv->bgrv", weights, mean[..., width:], precision="highest").reshape(batch, heads, -1)
        valid = valid[:, None, None]
        return jnp.where(valid[..., None, None], after, s), jnp.where(valid, y, 0)

    tokens = (*(leaf.astype(jnp.float32) for leaf in (q, k, v)), segments.positions, segments.starts, segments.valid)
    s = jnp.zeros((batch, len(level), len(slots), groups, 1 + width + v.shape[3])) if state is None else state
    s, y = jax.lax.scan(step, s.astype(jnp.float32), jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), s


@checked
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    bias: Float[Array, "H L-1"],
    state: Float[Array, "B L R G K+V+1"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    block: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B L R G K+V+1"]]:
    """The same as `recurrent`, N tokens at a time."""
    shared.check(q, k, state, segment_ids)
    levels = _levels(bias, block)
    counted = jnp.pad(bias.astype(jnp.float32), ((0, 0), (1, 0))) + np.log(levels.sizes)
    y, state = shared.chunked(levels, q, shared.Tokens.of(k, v), counted, state, segment_ids)
    return y.astype(v.dtype), state


@checked
def transition(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    bias: Float[Array, "H L-1"],
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    block: int,
) -> Transition:
    """What the span does to any state. Of `q` and `bias` only the shapes are read."""
    return shared.transition(_levels(bias, block), shared.Tokens.of(k, v), segment_ids)


def _levels(bias, block: int) -> shared.Levels:
    if block < 2 or block % 2:
        raise ValueError(f"block is {block}; give an even number of tokens: a level shows the halves of two blocks.")
    count = bias.shape[1] + 1
    return shared.Levels(2, count, 2 * block, block, functools.partial(_seen, block, count))


def _seen(block: int, levels: int, positions: Int[Array, "..."]):
    """First and last + 1 of the level-l tokens that a query sees, [..., L]."""
    u = positions[..., None] // 2 ** np.arange(levels, dtype=np.int32)
    half = block // 2
    return (u // block - 1) * block, jnp.where(np.arange(levels) == 0, u + 1, (u // half - 1) * half)
