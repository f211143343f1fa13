r"""Native sparse attention: a coarse view of the document, the blocks that it singles out, and the last tokens.

Yuan et al., arXiv:2502.11089, section 3. Three attentions, each with keys and values of its own, are mixed by
gates; a query that sees nothing in one of them gets 0 from it:

    out_t = Σ_c g_tc softmax(scale q_t . K^c) V^c        c: compressed, selected, window

Compressed: keys φ(k_{di}, ..., k_{di + l - 1}) and the same of values, of blocks of l tokens every d, from their last
token on. In the paper φ is an MLP of the block's keys and their positions in it; here it is linear in the keys, a
weighted sum with a weight for each position and channel.

Selected: the tokens s <= t of n blocks of m tokens: the query's own (b = t // m), the one before it and the document's
first, and of the others before it those that matter most to the group of heads, the first of equal ones. With p_ti the
probabilities of the compressed attention, block j matters by

    Σ_{heads of the group} Σ_i p_ti |{di, ..., di + l - 1} ∩ {mj, ..., mj + m - 1}| / d

where a compressed block counts by the strides of d tokens that it shares with block j; d divides l and m. The paper's
equations 9 and 10 say this if both kinds of blocks are numbered from 1. Numbered from 0, as here, the indices that
equation 9 prints would be those of blocks that end before block j does. The choice has no gradient.

Window: the last w tokens. The paper has l = 32, d = 16, m = 64, n = 16 and w = 512.

The fast form computes probabilities again for some queries at a time, and attends to the selected blocks by
`ops/routed.py`: T² / d logits of the compressed attention, and T (n m + w) of the others. Of a row that several devices
share, each needs all compressed keys and values, the blocks that it selects, and the w - 1 tokens before its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops import routed
from longctx.ops.attention import attention_partial
from longctx.ops.family import Keyed, Result
from longctx.ops.key_blocks import KeyBlocks, choose
from longctx.ops.partial import Partial, merge, softmax
from longctx.ops.patterns import Causal, Chunked, Pattern, Window
from longctx.ops.row import WHOLE, Row
from longctx.typing import Segments


class Queries(NamedTuple):
    """Head h reads the keys and values of group h // (H // G); gates g are those of the three attentions."""

    q: Float[Array, "B T H K"]
    gates: Float[Array, "B T H 3"]


class Keys(NamedTuple):
    """Compressed, selected, and of the window, of a row in which documents are contiguous."""

    k: Float[Array, "B S G 3 K"]
    v: Float[Array, "B S G 3 V"]


class Parameters(NamedTuple):
    """Weights of φ; C is l, the tokens of a compressed block."""

    key_pool: Float[Array, "C G K"]
    value_pool: Float[Array, "C G V"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What native sparse attention has beside arrays.

    Attributes:
      stride: d, from one compressed block to the next; divides l and m.
      selected: m, tokens of a block that is selected.
      count: n, blocks selected, at least 3: the own, the one before it and the first are among them.
      window: w, the last tokens, the own included.
      scale: of the logits; None for 1 / sqrt(K).
    """

    stride: int
    selected: int
    count: int
    window: int
    scale: float | None = None


def chunked(
    queries: Queries,
    keys: Keys,
    parameters: Parameters,
    segments: Segments,
    key_segments: Segments,
    options: Options,
    row: Row = WHOLE,
) -> Result:
    """The fast form, on a part of a `row`."""
    (q, gates), (k, v), (stride, selected) = queries, keys, (options.stride, options.selected)
    batch, length, heads, width = q.shape
    groups, tokens, size = k.shape[2], k.shape[1], len(parameters.key_pool)
    scale = width**-0.5 if options.scale is None else options.scale
    by_group = q.reshape(batch, length, groups, -1, width)

    def branch(number: int, reach: int):
        return row.near((k[:, :, :, number], v[:, :, :, number], key_segments), reach)

    def attend(near, pattern: Pattern) -> Partial:
        *near, around = near
        return attention_partial(q, *near, pattern, segments, None if around is segments else around, scale=scale)

    *near, around = branch(0, size - 1)
    coarse, near = KeyBlocks.cut(near, around, size, row, tokens, stride)
    pooled = (_pool(x, weights) for x, weights in zip(near, parameters, strict=True))
    coarse, pooled = row.gather((coarse, tuple(pooled)))
    ends = Segments(coarse.ids, coarse.index * stride + size - 1, jnp.zeros(coarse.ids.shape, bool))
    compressed = attention_partial(q, *pooled, Causal(), segments, ends, scale=scale)

    near = branch(1, selected - 1)
    own = attend(near, Causal() & Chunked(selected))
    blocks, (keys, values) = KeyBlocks.cut(near[:2], near[2], selected, row, tokens)
    blocks = row.gather(blocks)
    shared = list(_shared(coarse, blocks, size, stride, selected))

    def score(q, total, ids, positions):
        same = (ends.ids[:, None] == ids[:, :, None]) & (ids > 0)[:, :, None]
        visible = same & (ends.positions[:, None] <= positions[:, :, None])
        logits = jnp.einsum("btgrk,bmgk->btgrm", q, pooled[0], preferred_element_type=jnp.float32) * scale
        weights = jnp.where(visible[:, :, None, None], jnp.exp(logits - total[..., None]), 0.0).sum(3)
        matters = sum(jax.vmap(lambda x, slot: x[..., slot])(weights, slot) * n[:, None, None] for slot, n in shared)
        latest = positions[:, :, None] // selected - 1
        index = blocks.index[:, None]
        always = (index == 0) | (index == latest)
        may = (blocks.ids[:, None] == ids[:, :, None]) & (ids > 0)[:, :, None] & (index <= latest)
        matters = jnp.where(always[:, :, None], jnp.inf, matters)
        return jnp.where(may[:, :, None], matters, -jnp.inf)[:, :, :, None]

    total = compressed.logsumexp.reshape(by_group.shape[:-1])
    chosen = choose(score, (by_group, total, segments.ids, segments.positions), options.count - 1)[:, :, :, 0]
    keys, values = row.fetch((keys, values), chosen)
    far = routed.attend(by_group, keys, values, chosen, scale)
    far = Partial(far.output.reshape(batch, length, heads, -1), far.logsumexp.reshape(batch, length, heads))

    last = attend(branch(2, options.window - 1), Causal() & Window(options.window))
    parts = (compressed.output, merge(own, far).output, last.output)
    return Result(sum(gates[..., number, None] * part for number, part in enumerate(parts)).astype(v.dtype))


def _pool(x: Float[Array, "B N C G K"], weights: Float[Array, "C G K"]) -> Float[Array, "B N G K"]:
    """φ of each block."""
    return jnp.sum(x.astype(jnp.float32) * weights.astype(jnp.float32), axis=2).astype(x.dtype)


def _shared(
    coarse: KeyBlocks, blocks: KeyBlocks, size: int, stride: int, selected: int
) -> Iterator[tuple[Int[Array, "B N"], Int[Array, "B N"]]]:
    """For each block the compressed ones that overlap it, one after another: their indices, and by how many strides."""
    overlaps = (size + selected) // stride - 1
    for number in range(overlaps):
        last = blocks.last - selected + (number + 1) * stride
        slot = jax.vmap(jnp.searchsorted)(coarse.last, last).clip(0, coarse.last.shape[1] - 1)
        ids, found = (jnp.take_along_axis(x, slot, axis=1) for x in (coarse.ids, coarse.last))
        strides = min(number + 1, overlaps - number, size // stride, selected // stride)
        yield slot, jnp.where((found == last) & (ids == blocks.ids), strides, 0)


def definition(
    queries: Queries, keys: Keys, parameters: Parameters, segments: Segments, held: Segments, options: Options
) -> Result:
    """The definition, with all logits held at once."""
    (q, gates), (k, v), (stride, selected) = queries, keys, (options.stride, options.selected)
    size, groups, repeats = len(parameters.key_pool), k.shape[2], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if options.scale is None else options.scale
    same = (segments.ids[:, :, None] == held.ids[:, None, :]) & segments.valid[:, :, None]  # [B, T, S]
    now, then = segments.positions[:, :, None], held.positions[:, None, :]
    past = same & (then <= now)
    positions = jnp.arange(k.shape[1])

    def attend(keys, values, visible, gate):
        """The weights of a gated attention [B, H, T, S], and what it gives."""
        logits = jnp.einsum("bthk,bshk->bhts", q, keys.repeat(repeats, axis=2), preferred_element_type=jnp.float32)
        weights = softmax(logits * scale, visible)
        y = jnp.einsum("bhts,bshv->bthv", weights, values.repeat(repeats, axis=2).astype(jnp.float32))
        return weights, gate[..., None] * y

    # Blocks are named by one of their tokens: compressed ones by their last, selected ones by their first.
    inside = jnp.maximum(positions[:, None] + jnp.arange(1 - size, 1), 0)
    pooled = ((x[:, :, :, 0][:, inside] * w).sum(2) for x, w in zip(keys, parameters, strict=True))
    ends = (then + 1 >= size) & ((then + 1 - size) % stride == 0)
    weights, compressed = attend(*pooled, (past & ends)[:, None], gates[..., 0])

    start, stop = held.positions[:, :, None] - size + 1, held.positions[:, :, None]
    shared = jnp.minimum(stop, then + selected - 1) - jnp.maximum(start, then) + 1
    shared = jnp.where(held.ids[:, :, None] == held.ids[:, None, :], jnp.maximum(shared, 0) / stride, 0)
    matters = jnp.einsum("bhts,bsu->bhtu", weights, shared).reshape(len(q), groups, repeats, *past.shape[1:]).sum(2)
    own, theirs = now // selected, then // selected
    earlier = same & (theirs < own)
    matters = jnp.where(((theirs == 0) | (theirs == own - 1))[:, None], jnp.inf, matters)
    matters = jnp.where((earlier & (then % selected == 0))[:, None], matters, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-matters, axis=-1, stable=True), axis=-1)
    first = jnp.maximum(positions - held.positions % selected, 0)[:, None, None]
    chosen = earlier[:, None] & (jnp.take_along_axis(rank, first, axis=-1) < options.count - 1)
    chosen |= (past & (theirs == own))[:, None]
    _, fine = attend(k[:, :, :, 1], v[:, :, :, 1], chosen.repeat(repeats, axis=1), gates[..., 1])

    _, last = attend(k[:, :, :, 2], v[:, :, :, 2], (past & (now - then < options.window))[:, None], gates[..., 2])
    return Result((compressed + fine + last).astype(v.dtype))


NSA = Keyed(
    "nsa",
    Queries,
    Keys,
    definition,
    chunked,
    partial=None,
    sharded=chunked,
    parameters=Parameters,
    options=Options,
)
