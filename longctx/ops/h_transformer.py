r"""H-Transformer-1D, causal: near tokens are visible one by one, far ones as means of 2, 4, 8, ... tokens.

Level-l token m of a document is its tokens m 2^l to (m + 1) 2^l - 1, with the mean of their keys and of their values.
With blocks of N (even), visible to a query at position t are at level 0 the tokens s <= t of its own block and the one
before, and at level l >= 1, with u = t // 2^l, the level-l tokens m of the same two blocks of N level-l tokens,

    u // N - m // N <= 1,    of which level l - 1 does not show the parts:    u // (N/2) - m // (N/2) > 1.

So each token is visible once, at one level, up to N 2^(L-1) tokens back and more; all tokens of a document of N 2^L or
fewer. A level-l token counts for its 2^l tokens, and all levels share one softmax, with a bias b for each level:

    y_t = sum_{l, m} softmax(q_t . k_m^l / sqrt(K) + log 2^l + b_l) v_m^l.

In the paper queries far from their keys are means, too. A mean of queries knows the tokens after the first of them, so
here they stay what they are. (Its values are sums, not means: what log 2^l does here. It has no b.)

What is visible at level l >= 1 ends at least N/2 2^l >= N tokens before it. State, transition and the chunk form,
with chunks of N, follow: `ops/levels.py`, with weights of 1 and 2 N slots, which are two blocks.

Reference: Zhu and Soricut, "H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences", ACL 2021,
arXiv:2107.11906.
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
from longctx.ops.pyramid import Inputs
from longctx.typing import Segments


class Parameters(NamedTuple):
    """b, added to the logits of levels 1 to L - 1; that of level 0 is 0."""

    bias: Float[Array, "H L-1"]


@dataclasses.dataclass(frozen=True)
class Options:
    """N, tokens a block; even."""

    block: int


# Of each level sums of 1, k and v over the tokens of the last 2 N level-l tokens, of which the last may be in progress.
State = Float[Array, "B L R G K+V+1"]


def empty(inputs: Inputs, parameters: Parameters, options: Options) -> State:
    """The state before any token."""
    return shared.empty(_levels(parameters, options), inputs)


def recurrent(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options: Options):
    """The definition, token by token."""
    (bias,), block = parameters, options.block
    (batch, _, groups, width), heads = inputs.k.shape, inputs.q.shape[2]
    level, slots = np.arange(bias.shape[1] + 1)[:, None], np.arange(2 * block)
    size = 2**level
    bias = level[:, 0] * math.log(2) + jnp.pad(bias, ((0, 0), (1, 0)))

    def step(s, q, k, v, position):
        u = position[:, None, None] // size
        own = slots == u % (2 * block)
        emptied = own & (position[:, None, None] % size == 0)
        row = jnp.concatenate([jnp.ones_like(k[..., :1]), k, v], axis=-1)[:, None, None]
        after = jnp.where(emptied[..., None, None], 0, s) + jnp.where(own[..., None, None], row, 0)
        m = u - (u - slots) % (2 * block)
        visible = (m >= 0) & (u // block - m // block <= 1)
        visible &= (level == 0) | (u // (block // 2) - m // (block // 2) > 1)
        mean = after[..., 1:] / jnp.where(after[..., :1] > 0, after[..., :1], 1)
        queries = q.reshape(batch, groups, heads // groups, width)
        logits = jnp.einsum("bgrk,blmgk->bgrlm", queries, mean[..., :width], precision="highest") / math.sqrt(width)
        logits += bias.reshape(*queries.shape[1:3], *level.shape)
        logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=(-2, -1))
        y = jnp.einsum("bgrlm,blmgv->bgrv", weights, mean[..., width:], precision="highest").reshape(batch, heads, -1)
        return y, after

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options: Options):
    """The same, N tokens at a time."""
    levels = _levels(parameters, options)
    bias = jnp.pad(parameters.bias.astype(jnp.float32), ((0, 0), (1, 0))) + np.log(levels.sizes)
    y, state = shared.chunked(levels, inputs.q, shared.Tokens.of(inputs.k, inputs.v), bias, state, segments)
    return y.astype(inputs.v.dtype), state


def transition(inputs: Inputs, parameters: Parameters, segments: Segments, options: Options) -> Transition:
    """What the span does to any state."""
    levels = _levels(parameters, options)
    return shared.transition(levels, shared.Tokens.of(inputs.k, inputs.v), shared.empty(levels, inputs), segments)


def _levels(parameters: Parameters, options: Options) -> shared.Levels:
    block = options.block
    if block < 2 or block % 2:
        raise ValueError(f"block is {block}; give an even number of tokens: a level shows the halves of two blocks.")
    count = parameters.bias.shape[1] + 1
    return shared.Levels(2, count, 2 * block, block, functools.partial(_visible, block, count))


def _visible(block: int, levels: int, positions: Int[Array, "..."]):
    """First and last + 1 of the level-l tokens that are visible to a query, [..., L]."""
    u = positions[..., None] // 2 ** np.arange(levels, dtype=np.int32)
    half = block // 2
    return (u // block - 1) * block, jnp.where(np.arange(levels) == 0, u + 1, (u // half - 1) * half)


H_TRANSFORMER = Recurrence(
    "h_transformer",
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
