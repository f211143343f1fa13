r"""Pyramid attention, causal: the last tokens one by one, and at every level above the last W summaries of older ones.

Level 0 are the tokens; node m of level l stands for c nodes of level l - 1, its children, and so for the tokens m c^l
to (m + 1) c^l - 1 of the document. It attends to its children: its key and value are means of theirs with the softmax
of their logits g as weights, and its own logit is the log of that softmax's denominator,

    k_m^l = sum_i softmax_i(g_i) k_i,    v_m^l = sum_i softmax_i(g_i) v_i,    g_m^l = log sum_i exp(g_i),

with g_s = cap tanh(p . k_s / (sqrt(K) cap)) for a token s and a learned vector p per head: of two children the one in
which p finds more weighs more. At p = 0 they are plain means. A query at position t sees the tokens from
o = c ((t - W + 1) // c) to itself, which are the last W and up to c - 1 more, and at each level l >= 1 the last W nodes
that end before o, in one softmax with a bias b for each level:

    y_t = sum_{l, m} softmax(q_t . k_m^l / sqrt(K) + b_l) v_m^l.

With W >= c - 1 nothing is missed up to W c^(L-1) tokens before o: what no whole node of one level holds, the level
below shows.

Thanks to that choice of g_m^l a node's attention to its children is one to its tokens, with weights exp(g_s). So a span
adds to a node what its own tokens weigh, whatever stands before; were g read from the child's key, a span would have to
keep apart the children of every node that began before it. There is no running maximum, as |g_s| <= cap. State,
transition and the chunk form, with chunks of W, follow: `ops/levels.py`.

This is the tree of Pyraformer (Liu et al., "Pyraformer: Low-Complexity Pyramidal Attention for Long-Range Time Series
Modeling and Forecasting", ICLR 2022) with one pass through it. There a level is made by a strided convolution of the
one below, and then all nodes, layer by layer, attend to their neighbours, children and parents, later ones included.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longctx.ops import levels as shared
from longctx.ops.gated_linear import einsum
from longctx.ops.levels import Transition
from longctx.typing import Segments, checked

compose, apply = shared.compose, shared.apply

CAP = 20.0  # of a token's logit: one token weighs at most e^40 of another, and float32 holds sums of a billion such


@checked
def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    pool: Float[Array, "G K"],
    bias: Float[Array, "H L-1"],
    state: Float[Array, "B L R G K+V+1"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    children: int,
    window: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B L R G K+V+1"]]:
    """The definition, token by token.

    Args:
      q: queries; head h reads the keys and values of group h // (H // G).
      k: keys.
      v: values.
      pool: p, the query with which nodes attend to their children.
      bias: b, added to the logits of levels 1 to L - 1; that of level 0 is 0.
      state: before the span, None for zeros.
      segment_ids: documents of a packed row; their positions tell the nodes. A document's start forgets everything
        before it; padding leaves the state unchanged and gives 0.
      children: c, of a node; at least 2.
      window: W, tokens that a query sees at least, and nodes of each level above.

    Returns:
      y in the dtype of v, and the state after the span, float32: for each level sums of exp(g), exp(g) k and exp(g) v
      over the tokens of the last R nodes, of which the last may be in progress; at level 0, 1, k and v of tokens.

    Raises:
      ValueError: c, W or L is not possible, or G does not divide H; a state is given, but not the positions at which
        the span continues its document.
    """
    shared.check(q, k, state, segment_ids)
    number = _levels(bias, children, window).slots
    segments = Segments.of(segment_ids, *k.shape[:2])
    (batch, _, groups, width), heads = k.shape, q.shape[2]
    level, slot = np.arange(bias.shape[1] + 1)[:, None], np.arange(number)
    size, bias = children**level, jnp.pad(bias, ((0, 0), (1, 0)))

    def step(s, token):
        q, k, v, position, start, valid = token
        position = position[:, None, None]
        newest = position // size
        own = slot == newest % number
        emptied = start[:, None, None] | (own & (position % size == 0))
        score = jnp.einsum("bgk,gk->bg", k, pool, precision="highest") / math.sqrt(width)
        mass = jnp.where(level[..., None, None] == 0, 1, jnp.exp(CAP * jnp.tanh(score / CAP))[:, None, None, :, None])
        row = mass * jnp.concatenate([jnp.ones_like(k[..., :1]), k, v], axis=-1)[:, None, None]
        after = jnp.where(emptied[..., None, None], 0, s) + jnp.where(own[..., None, None], row, 0)
        m = newest - (newest - slot) % number
        oldest = jnp.maximum((position - window + 1) // children * children, 0)  # o
        whole = oldest // size  # nodes that end before it
        seen = (m >= 0) & jnp.where(level == 0, m >= oldest, (m < whole) & (m >= whole - window))
        mean = after[..., 1:] / jnp.where(after[..., :1] > 0, after[..., :1], 1)
        queries = q.reshape(batch, groups, heads // groups, width)
        logits = jnp.einsum("bgrk,blmgk->bgrlm", queries, mean[..., :width], precision="highest") / math.sqrt(width)
        logits += bias.reshape(*queries.shape[1:3], *level.shape)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -jnp.inf), axis=(-2, -1))
        y = jnp.einsum("bgrlm,blmgv->bgrv", weights, mean[..., width:], precision="highest").reshape(batch, heads, -1)
        valid = valid[:, None, None]
        return jnp.where(valid[..., None, None], after, s), jnp.where(valid, y, 0)

    tokens = (*(leaf.astype(jnp.float32) for leaf in (q, k, v)), segments.positions, segments.starts, segments.valid)
    s = jnp.zeros((batch, len(level), number, groups, 1 + width + v.shape[3])) if state is None else state
    s, y = jax.lax.scan(step, s.astype(jnp.float32), jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), s


@checked
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    pool: Float[Array, "G K"],
    bias: Float[Array, "H L-1"],
    state: Float[Array, "B L R G K+V+1"] | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    children: int,
    window: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B L R G K+V+1"]]:
    """The same as `recurrent`, W tokens at a time."""
    shared.check(q, k, state, segment_ids)
    levels = _levels(bias, children, window)
    bias = jnp.pad(bias.astype(jnp.float32), ((0, 0), (1, 0)))
    y, state = shared.chunked(levels, q, shared.Tokens.of(k, v, _mass(k, pool)), bias, state, segment_ids)
    return y.astype(v.dtype), state


@checked
def transition(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    pool: Float[Array, "G K"],
    bias: Float[Array, "H L-1"],
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    children: int,
    window: int,
) -> Transition:
    """What the span does to any state. Of `q` and `bias` only the shapes are read."""
    levels = _levels(bias, children, window)
    return shared.transition(levels, shared.Tokens.of(k, v, _mass(k, pool)), segment_ids)


def _mass(k, pool):
    """exp(g) of each token, [B, T, G]."""
    score = einsum("btgk,gk->btg", k.astype(jnp.float32), pool.astype(jnp.float32)) * k.shape[-1] ** -0.5
    return jnp.exp(CAP * jnp.tanh(score / CAP))


def slots(children: int, window: int) -> int:
    """R, nodes of each level in a state."""
    # Of tokens W + c - 1 are seen; of nodes those from (t - W + 1) // c^l - W on, while that of t is (t // c^l) itself.
    return window + max(children - 1, 1 - (1 - window) // children)


def _levels(bias, children: int, window: int) -> shared.Levels:
    if children < 2 or window < 1:
        raise ValueError(f"children is {children} and window is {window}; give at least 2 children and a window of 1.")
    count = bias.shape[1] + 1
    seen = functools.partial(_seen, children, window, count)
    return shared.Levels(children, count, slots(children, window), window, seen)


def _seen(children: int, window: int, levels: int, positions: Int[Array, "..."]):
    """First and last + 1 of the nodes that a query sees, [..., L]."""
    last, level = positions[..., None], np.arange(levels)
    whole = (last - window + 1) // children ** np.maximum(level, 1).astype(np.int32)
    return jnp.where(level == 0, children * whole, whole - window), jnp.where(level == 0, last + 1, whole)
