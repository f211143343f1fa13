r"""Pyramid attention, causal: the last tokens one by one, and at every level above the last W summaries of older ones.

Level 0 are the tokens; node m of level l stands for c nodes of level l - 1, its children, and so for the tokens m c^l
to (m + 1) c^l - 1 of the document. It attends to its children: its key and value are means of theirs with the softmax
of their logits g as weights, and its own logit is the log of that softmax's denominator,

    k_m^l = sum_i softmax_i(g_i) k_i,    v_m^l = sum_i softmax_i(g_i) v_i,    g_m^l = log sum_i exp(g_i),

with g_s = cap tanh(p . k_s / (sqrt(K) cap)) for a token s and a learned vector p per head: of two children the one in
which p finds more weighs more. At p = 0 they are plain means. Visible to a query at position t are the tokens from
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

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longctx.ops import levels as shared
from longctx.ops.family import Recurrence, by_token
from longctx.ops.levels import Transition, apply, compose
from longctx.ops.products import einsum
from longctx.typing import Segments

CAP = 20.0  # of a token's logit: one token weighs at most e^40 of another, and float32 holds sums of a billion such


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: queries; head h reads the keys and values of group h // (H // G).
      k: keys.
      v: values.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T G V"]


class Parameters(NamedTuple):
    """What is learned in training.

    Attributes:
      pool: p, the query with which nodes attend to their children.
      bias: b, added to the logits of levels 1 to L - 1; that of level 0 is 0.
    """

    pool: Float[Array, "G K"]
    bias: Float[Array, "H L-1"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static.

    Attributes:
      children: c, of a node; at least 2.
      window: W, tokens that are visible to a query at least, and nodes of each level above.
    """

    children: int
    window: int


# Of each level sums of exp(g), exp(g) k and exp(g) v over the tokens of the last R nodes, of which the last may be in
# progress; at level 0, 1, k and v of tokens.
State = Float[Array, "B L R G K+V+1"]


def empty(inputs: Inputs, parameters: Parameters, options: Options) -> State:
    """The state before any token."""
    return shared.empty(_levels(parameters, options), inputs)


def recurrent(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options: Options):
    """The definition, token by token."""
    (pool, bias), children, window = parameters, options.children, options.window
    number = _levels(parameters, options).slots
    (batch, _, groups, width), heads = inputs.k.shape, inputs.q.shape[2]
    level, slot = np.arange(bias.shape[1] + 1)[:, None], np.arange(number)
    size, bias = children**level, jnp.pad(bias, ((0, 0), (1, 0)))

    def step(s, q, k, v, position):
        position = position[:, None, None]
        newest = position // size
        own = slot == newest % number
        emptied = own & (position % size == 0)
        score = jnp.einsum("bgk,gk->bg", k, pool, precision="highest") / math.sqrt(width)
        mass = jnp.where(level[..., None, None] == 0, 1, jnp.exp(CAP * jnp.tanh(score / CAP))[:, None, None, :, None])
        row = mass * jnp.concatenate([jnp.ones_like(k[..., :1]), k, v], axis=-1)[:, None, None]
        after = jnp.where(emptied[..., None, None], 0, s) + jnp.where(own[..., None, None], row, 0)
        m = newest - (newest - slot) % number
        oldest = jnp.maximum((position - window + 1) // children * children, 0)  # o
        whole = oldest // size  # nodes that end before it
        visible = (m >= 0) & jnp.where(level == 0, m >= oldest, (m < whole) & (m >= whole - window))
        mean = after[..., 1:] / jnp.where(after[..., :1] > 0, after[..., :1], 1)
        queries = q.reshape(batch, groups, heads // groups, width)
        logits = jnp.einsum("bgrk,blmgk->bgrlm", queries, mean[..., :width], precision="highest") / math.sqrt(width)
        logits += bias.reshape(*queries.shape[1:3], *level.shape)
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, -jnp.inf), axis=(-2, -1))
        y = jnp.einsum("bgrlm,blmgv->bgrv", weights, mean[..., width:], precision="highest").reshape(batch, heads, -1)
        return y, after

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options: Options):
    """The same, W tokens at a time."""
    levels = _levels(parameters, options)
    bias = jnp.pad(parameters.bias.astype(jnp.float32), ((0, 0), (1, 0)))
    y, state = shared.chunked(levels, inputs.q, _tokens(inputs, parameters), bias, state, segments)
    return y.astype(inputs.v.dtype), state


def transition(inputs: Inputs, parameters: Parameters, segments: Segments, options: Options) -> Transition:
    """What the span does to any state."""
    levels = _levels(parameters, options)
    return shared.transition(levels, _tokens(inputs, parameters), shared.empty(levels, inputs), segments)


def _tokens(inputs: Inputs, parameters: Parameters) -> shared.Tokens:
    """What there is to write, with weights exp(g)."""
    k, pool = inputs.k, parameters.pool
    score = einsum("btgk,gk->btg", k.astype(jnp.float32), pool.astype(jnp.float32)) * k.shape[-1] ** -0.5
    return shared.Tokens.of(k, inputs.v, jnp.exp(CAP * jnp.tanh(score / CAP)))


def slots(children: int, window: int) -> int:
    """R, nodes of each level in a state."""
    # Visible are W + c - 1 tokens, and nodes from (t - W + 1) // c^l - W on, while that of t is (t // c^l) itself.
    return window + max(children - 1, 1 - (1 - window) // children)


def _levels(parameters: Parameters, options: Options) -> shared.Levels:
    children, window = options.children, options.window
    if children < 2 or window < 1:
        raise ValueError(f"children is {children} and window is {window}; give at least 2 children and a window of 1.")
    count = parameters.bias.shape[1] + 1
    visible = functools.partial(_visible, children, window, count)
    return shared.Levels(children, count, slots(children, window), window, visible)


def _visible(children: int, window: int, levels: int, positions: Int[Array, "..."]):
    """First and last + 1 of the nodes that are visible to a query, [..., L]."""
    last, level = positions[..., None], np.arange(levels)
    whole = (last - window + 1) // children ** np.maximum(level, 1).astype(np.int32)
    return jnp.where(level == 0, children * whole, whole - window), jnp.where(level == 0, last + 1, whole)


PYRAMID = Recurrence(
    "pyramid",
    Inputs,
    empty,
    recurrent,
    chunked,
    transition,
    compose,
    apply,
    parameters=Parameters,
    options=Options,
    counts=True,
    refusal=shared.refusal,
)
