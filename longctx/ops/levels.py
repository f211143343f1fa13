r"""A document at L levels of coarseness: what `h_transformer` and `pyramid` share, which is all but what is visible.

Node m of level l stands for the tokens m c^l to (m + 1) c^l - 1 of a document, counted from its start. Tokens s have
weights w_s > 0, and the key and value of a node are its tokens' weighted means,

    k_m^l = sum_s w_s k_s / sum_s w_s,    v_m^l = sum_s w_s v_s / sum_s w_s.

Visible to a token's query are some tokens and, of each level above, the nodes `first` to `end` - 1, in one softmax:

    y_t = sum_{l, m} softmax(q_t . k_m^l / sqrt(K) + b_l) v_m^l.

State: at each level R slots of sums over a node's tokens, [sum w, sum w k, sum w v]; at level 0, where a mean is the
token itself, w = 1. Slot r holds the last node m with m mod R = r that has begun, be it whole or in progress: a token
at position p is added to slot (p // c^l) mod R of every level l, which is emptied first if p mod c^l = 0.

Transition of a span: (a, B), S -> a * S + B, with a = 0 for the slots that the span empties, all of them if a document
starts in it, and 1 for the others; (a_2, B_2) after (a_1, B_1) is (a_2 a_1, a_2 B_1 + B_2).

Chunk form. In both ops a node is visible only if it ends `chunk` tokens before the query or more. So what is visible to
the tokens of a chunk above level 0 is whole when the chunk begins: they read the state before it, and themselves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longctx.ops.chunks import cut, join, scan
from longctx.ops.products import einsum
from longctx.typing import Segments

_LATE = np.iinfo(np.int32).max // 2


@dataclasses.dataclass(frozen=True)
class Levels:
    """What is known while tracing.

    Attributes:
      base: c.
      count: L.
      slots: R; no node is visible that R or more others have followed before the query's own token.
      chunk: tokens a chunk, at most R.
      visible: of positions, `first` and `end` of the nodes visible at each level, with one axis more, L. At level 0
        `end` is the position after the query's own.
    """

    base: int
    count: int
    slots: int
    chunk: int
    visible: Callable[[Int[Array, "..."]], tuple[Int[Array, "... L"], Int[Array, "... L"]]]

    def __post_init__(self):
        if self.count < 1 or self.base ** (self.count - 1) > _LATE:
            raise ValueError(
                f"{self.count} levels of which each is {self.base} times as coarse as the one below; give at least 1, "
                f"and so few that nodes of the last have at most {_LATE} tokens."
            )

    @property
    def sizes(self) -> Int[np.ndarray, " L"]:
        """Tokens a node of each level."""
        return np.array([self.base**level for level in range(self.count)], np.int32)

    def held(self, positions: Int[Array, "..."]) -> Int[Array, "... L R"]:
        """The node in each slot once the token at a position is there; negative for none."""
        last = (positions[..., None] // self.sizes)[..., None]
        return last - (last - np.arange(self.slots, dtype=np.int32)) % self.slots


class Transition(NamedTuple):
    """What a span does to any state: S -> keep * S + state."""

    keep: Float[Array, "B L R"]
    state: Float[Array, "B L R G K+V+1"]

    column_wise = False

    def transposed(self) -> Transition:
        """Its linear part is diagonal, and so its own transpose."""
        return self


def compose(first: Transition, then: Transition) -> Transition:
    """`then` after `first`; associative. Zeros as `first` stand for the empty state."""
    return Transition(then.keep * first.keep, apply(then, first.state))


def apply(transition: Transition, state: Float[Array, "B L R G K+V+1"]) -> Float[Array, "B L R G K+V+1"]:
    """The state after the span, from the state before it."""
    return transition.keep[..., None, None] * state + transition.state


def refusal(inputs, parameters, options) -> str | None:
    """Heads that do not share keys evenly."""
    heads, groups = inputs.q.shape[2], inputs.k.shape[2]
    return f"q has {heads} heads and k has {groups}; give q a multiple of k's heads." if heads % groups else None


def empty(levels: Levels, inputs) -> Float[Array, "B L R G K+V+1"]:
    """The state before any token, of inputs that have keys k and values v."""
    batch, _, groups, width = inputs.k.shape
    return jnp.zeros((batch, levels.count, levels.slots, groups, width + inputs.v.shape[3] + 1))


class Tokens(NamedTuple):
    """What there is to write: [1, k, v] of each token, float32, and its weight at levels above 0, None for 1."""

    row: Float[Array, "B T G K+V+1"]
    weight: Float[Array, "B T G 1"] | None

    @classmethod
    def of(cls, k: Float[Array, "B T G K"], v: Float[Array, "B T G V"], weight: Float[Array, "B T G"] | None = None):
        """Of keys and values."""
        parts = jnp.ones((*k.shape[:3], 1)), k.astype(jnp.float32), v.astype(jnp.float32)
        return cls(jnp.concatenate(parts, axis=-1), None if weight is None else weight[..., None])


def chunked(
    levels: Levels,
    q: Float[Array, "B T H K"] | None,
    tokens: Tokens,
    bias: Float[Array, "H L"] | None,
    state: Float[Array, "B L R G K+V+1"],
    segments: Segments,
) -> tuple[Float[Array, "B T H V"] | None, Float[Array, "B L R G K+V+1"]]:
    """Outputs, float32, and the state after the span; outputs are None without queries.

    The row is read 2 L chunks at a time, all at once, and so the states that are kept for the backward pass are no more
    numbers than the rows.
    """
    size = levels.chunk * min(2 * levels.count, -(-segments.ids.shape[1] // levels.chunk))
    return scan(functools.partial(_span, levels, bias), state, (q, tokens, segments), size)


def transition(levels: Levels, tokens: Tokens, state: Float[Array, "B L R G K+V+1"], segments: Segments) -> Transition:
    """What the span does to any state; `state` is the empty one."""
    _, state = chunked(levels, None, tokens, None, state, segments)
    return Transition(_keep(levels, segments.positions, segments.valid, segments.runs)[0], state)


def _keep(levels: Levels, positions, valid, runs):
    """`keep` of a span, `[..., L, R]`, and the nodes that the state before it holds; of arrays [..., T]."""
    continued = valid & (runs == 0)
    before = jnp.min(jnp.where(continued, positions, _LATE), axis=-1) - 1
    end = jnp.maximum(jnp.max(jnp.where(continued, positions, -1), axis=-1), before)
    held = levels.held(before)
    keep = (levels.held(end) == held) & (runs[..., -1:, None] == 0)
    return keep.astype(jnp.float32), held


def _span(levels: Levels, bias, state, inputs):
    """A few chunks: the state after them, and y."""
    q, tokens, segments = inputs
    (row, weight), positions, valid, starts = cut(
        (tokens, segments.positions, segments.valid, segments.starts), levels.chunk
    )
    runs = jnp.cumsum(starts, axis=-1, dtype=jnp.int32)
    slot = positions[..., None] // levels.sizes % levels.slots
    last = valid & (runs == runs[..., -1:])
    here = ((slot[..., None] == np.arange(levels.slots)) & last[..., None, None]).astype(jnp.float32)
    weighted = row if weight is None else weight * row
    sums = [(here[:, :, :, :1], row), (here[:, :, :, 1:], weighted)]
    writes = jnp.concatenate([einsum("nbclr,nbcgw->nblrgw", *sum) for sum in sums], axis=2)
    keep, held = _keep(levels, positions, valid, runs)
    state, before = jax.lax.scan(lambda s, chunk: (apply(chunk, s), s), state, Transition(keep, writes))
    if q is None:
        return state, None

    first, end = levels.visible(positions)
    held = held[:, :, None]
    far = (held >= jnp.maximum(first, 0)[..., None]) & (held < end[..., None]) & (valid & (runs == 0))[..., None, None]
    near = (runs[..., :, None] == runs[..., None, :]) & valid[..., :, None] & valid[..., None, :]
    near = jnp.tril(near & (positions[..., None, :] >= first[..., :1]))
    visible = jnp.concatenate([far.reshape(*far.shape[:3], -1), near], axis=-1)[:, :, None, None]

    keys = jnp.concatenate([before.reshape(*before.shape[:2], -1, *before.shape[4:]), row], axis=2)
    total = keys[..., :1]
    keys = keys[..., 1:] / jnp.where(total > 0, total, 1)
    width = q.shape[-1]
    queries = cut(q.astype(jnp.float32) * width**-0.5, levels.chunk)
    queries = queries.reshape(*queries.shape[:3], row.shape[3], -1, width)
    logits = einsum("nbcghk,nbsgk->nbghcs", queries, keys[..., :width])
    level = [*np.repeat(np.arange(levels.count), levels.slots), *[0] * levels.chunk]
    bias = bias.astype(jnp.float32)[:, np.array(level)].reshape(*queries.shape[3:5], 1, -1)
    # Nothing is visible to a row of padding: its softmax runs over zeros and is then masked away.
    logits = jnp.where(visible, logits + bias, jnp.where(visible.any(-1, keepdims=True), -jnp.inf, 0))
    y = einsum("nbghcs,nbsgv->nbcghv", jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0), keys[..., width:])
    return state, join(y, q.shape[1]).reshape(*q.shape[:3], -1)
