r"""Blockwise softmax attention: exact, linear memory, work only where the pattern and the documents leave something.

FlashAttention (Dao et al., arXiv:2205.14135; backward as in arXiv:2307.08691) in plain XLA. Queries and keys are
cut into blocks. For a pair (i, j) of blocks with logits S = Z + d_i - d_j + b, Z = c tanh(scale Q_i K_j^T / c), the
sums d of log decays and the bias b by distance there or not, -inf where masked, the running row statistics of the query
block are updated:

    m' = max(m, rowmax S);   P = exp(S - m');   l' = e^{m - m'} l + rowsum P;   O' = e^{m - m'} O + P V_j

and in the end out = O / l and logsumexp L = m + log l. The backward pass recomputes P = exp(S - L) and, with
D = rowsum(dO * O) - dL, the row's own share of the gradient,

    dV_j += P^T dO_i;   dS = P * (dO_i V_j^T - D);   d d_i += rowsum dS;   d d_j -= colsum dS
    dZ = dS * (1 - Z^2 / c^2) * scale;   dQ_i += dZ K_j;   dK_j += dZ^T Q_i

in one sweep over the pairs, five matrix products each.

Both passes are one loop over a *schedule*: the list of the touched pairs. Its candidates are the pairs that the pattern
touches, or at least is near to by their places in the row; ranges of ids and positions, known at run time, strike out
those in which no row of the batch has a visible pair of tokens, and put first those that are wholly visible, which need
no mask. Where all is known while tracing, the compiled program states how often its loops run.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.numpy import float32 as f32
from jaxtyping import Array, Float, Int

from longctx.ops.biases import Bias
from longctx.ops.patterns import Pattern, Range, touched_pairs
from longctx.ops.sizes import sizes

_ESTIMATED = 1 << 15  # tokens of a row that are looked at to choose blocks


class Tokens(NamedTuple):
    """What tells which keys a query sees, `[rows, tokens]`; numpy arrays where it is known while tracing.

    Attributes:
      ids: document, 0 for padding.
      positions: within the document.
      first, end: of a query, if the keys that it sees stand next to each other: the place of the first among the keys,
        and that after the last. They say what ids and positions say, and far less is to be computed from them.
    """

    ids: Int[Array, "rows tokens"]
    positions: Int[Array, "rows tokens"]
    first: Int[Array, "rows tokens"] | None = None
    end: Int[Array, "rows tokens"] | None = None


class Schedule(NamedTuple):
    """The pairs of blocks to work on: the first `touched`, of which the first `whole` are wholly visible."""

    queries: Int[Array, " pairs"]
    keys: Int[Array, " pairs"]
    whole: int | Int[Array, ""]
    touched: int | Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the loops must know while tracing; blocks of None are chosen, none is longer than the row."""

    pattern: Pattern
    scale: float
    soft_cap: float | None
    q_block: int | None = None
    k_block: int | None = None

    def sized(self, rows: int, queries: int, keys: int, places: tuple[Range, Range] | None) -> Plan:
        """With blocks for so many rows of all heads, and tokens in each: those with the least to do.

        Fine blocks leave out more, coarse ones are quicker for their size: measured on a CPU, a step's time grows with
        its logits to the power 3/4. Steps are counted as if the row were one document.
        """
        budget = sizes().logits
        sides = places or tuple(Range(np.arange(tokens), np.arange(tokens)) for tokens in (queries, keys))
        sides = jax.tree.map(lambda x: x[:_ESTIMATED], sides)
        chosen, least = 64, np.inf
        for block in (512, 256, 128, 64):
            if rows * block**2 > budget:
                continue
            steps = len(touched_pairs(self.pattern.touches, *map(_spans, sides, (block, block)))[0])
            if steps * block**1.5 >= least:
                break
            chosen, least = block, steps * block**1.5
        blocks = (min(given or chosen, tokens) for given, tokens in ((self.q_block, queries), (self.k_block, keys)))
        return dataclasses.replace(self, **dict(zip(("q_block", "k_block"), blocks, strict=True)))


def blockwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    queries: Tokens,
    keys: Tokens,
    places: tuple[Range, Range] | None,
    plan: Plan,
    decay: Float[Array, "B T H"] | None = None,
    key_decay: Float[Array, "B S H"] | None = None,
    bias: Bias | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Attention output and logsumexp of the logits, both float32; 0 and -inf for a query that sees nothing.

    Args:
      q, k, v: as in `attention`.
      queries: the queries' tokens, `[B, T]`, or `[1, T]` if all rows are alike.
      keys: the keys' tokens, `[B, S]`, or `[1, S]`.
      places: between which places in one row each query, `[T]`, and each key, `[S]`, lies; None where nothing is
        known of that. Used where positions are known at run time only.
      plan: pattern, scale, soft cap and block sizes.
      decay, key_decay: sums of log decays at queries and keys; neither or both.
      bias: of the logits by distance.

    First derivatives only: the backward pass is not itself differentiable.
    """
    batch, length, heads, _ = q.shape
    groups = k.shape[2]
    plan = plan.sized(batch * heads, length, k.shape[1], places)
    q_tokens = token_blocks(queries, plan.q_block)
    k_tokens = token_blocks(keys, plan.k_block)
    schedule = make_schedule(plan, q_tokens, k_tokens, places)
    q = (q * plan.scale).astype(q.dtype)
    q_blocks = _split(q.reshape(batch, length, groups, heads // groups, -1), plan.q_block)
    k_blocks = _split(k[:, :, :, None], plan.k_block)
    v_blocks = _split(v[:, :, :, None], plan.k_block)
    decays = None
    if decay is not None:
        decays = _split_decay(decay, groups, plan.q_block), _split_decay(key_decay, groups, plan.k_block)
    out, logsumexp = _attend(plan, q_blocks, k_blocks, v_blocks, (decays, bias), (q_tokens, k_tokens, schedule))
    out = _join(out, heads // groups, plan.q_block)[:, :length]
    logsumexp = _join(logsumexp[..., None], heads // groups, plan.q_block)[:, :length]
    return out.reshape(batch, length, heads, -1), logsumexp.reshape(batch, length, heads)


def _split(x: Float[Array, "B T G R W"], block: int) -> Float[Array, "blocks B G RC W"]:
    """Blocks first, and the heads of a group among the rows: a group's keys serve them without being repeated."""
    batch, length, groups, repeats, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, block, groups, repeats, width).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(x.shape[0], batch, groups, repeats * block, width)


def _split_decay(x: Float[Array, "B T H"], groups: int, block: int) -> Float[Array, "blocks B G R C"]:
    """Sums of log decays by block, the heads of a group apart."""
    return _split(x.astype(f32).reshape(*x.shape[:2], groups, 1, -1), block).mT


def _join(x: Float[Array, "blocks B G RC W"], repeats: int, block: int) -> Float[Array, "B T G R W"]:
    """The inverse of `_split`, the padding still at the end."""
    blocks, batch, groups, _, width = x.shape
    x = x.reshape(blocks, batch, groups, repeats, block, width).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, blocks * block, groups, repeats, width)


def token_blocks(tokens: Tokens, block: int) -> Tokens:
    """Tokens as `[blocks, rows, tokens]`, filled up with padding; still numpy if they were."""

    def split(x):
        xp = np if isinstance(x, np.ndarray) else jnp
        x = xp.pad(x, ((0, 0), (0, -x.shape[1] % block)))
        return x.reshape(x.shape[0], -1, block).swapaxes(0, 1)

    return jax.tree.map(split, tokens)


def make_schedule(plan: Plan, q: Tokens, k: Tokens, places: tuple[Range, Range] | None) -> Schedule:
    """The touched pairs of blocks; arguments as `blockwise`, the tokens by block."""
    known = isinstance(q.ids, np.ndarray) and isinstance(k.ids, np.ndarray)
    xp = np if known else jnp
    (q_ids, q_positions), (k_ids, k_positions) = _ranges(q), _ranges(k)
    if known:  # rows apart below
        sides = (Range(side.first.min(-1), side.last.max(-1)) for side in (q_positions, k_positions))
        i, j = touched_pairs(plan.pattern.touches, *sides)
    elif places is not None:
        i, j = touched_pairs(plan.pattern.near, *map(_spans, places, (plan.q_block, plan.k_block)))
    else:
        i, j = (side.reshape(-1) for side in np.indices((len(q.ids), len(k.ids))))
    q_ids, q_positions = jax.tree.map(lambda x: x[i], (q_ids, q_positions))
    k_ids, k_positions = jax.tree.map(lambda x: x[j], (k_ids, k_positions))
    touched = (q_ids.first <= k_ids.last) & (k_ids.first <= q_ids.last)
    touched &= plan.pattern.touches(q_positions, k_positions)
    whole = (q_ids.first == q_ids.last) & (k_ids.first == k_ids.last) & (q_ids.first == k_ids.first)
    whole &= (q.ids > 0).all(-1)[i] & (k.ids > 0).all(-1)[j] & plan.pattern.covers(q_positions, k_positions)
    touched, whole = touched.any(-1), whole.all(-1)
    order = xp.argsort(xp.where(touched, ~whole, 2), stable=True)
    whole, touched = (touched & whole).sum(), touched.sum()
    if known:
        order, whole, touched = order[:touched], int(whole), int(touched)
    return Schedule(*(xp.asarray(side, np.int32)[order] for side in (i, j)), whole, touched)


def _ranges(tokens: Tokens) -> tuple[Range, Range]:
    """Of the ids and of the positions of each block's valid tokens, `[blocks, rows]`; inverted where it has none."""
    xp = np if isinstance(tokens.ids, np.ndarray) else jnp
    limit = np.iinfo(np.int32)

    def side(x):
        first = xp.where(tokens.ids > 0, x, limit.max // 2).min(-1)
        return Range(first, xp.where(tokens.ids > 0, x, limit.min // 2).max(-1))

    return side(tokens.ids), side(tokens.positions)


def _spans(places: Range, block: int) -> Range:
    """From the first to the last place of each block."""

    def split(x):
        return np.pad(x, (0, -len(x) % block), mode="edge").reshape(-1, block)

    return Range(split(places.first).min(-1), split(places.last).max(-1))


def _logits(plan: Plan, q, k):
    """Capped logits of a pair of blocks, float32 `[B, G, RC, keys]`."""
    logits = jnp.einsum("bgik,bgjk->bgij", q, k, preferred_element_type=f32)
    if plan.soft_cap is not None:
        logits = plan.soft_cap * jnp.tanh(logits / plan.soft_cap)
    return logits


def _added(logits, extras, tokens, i, j):
    """Logits with what has decayed from key to query, and the bias of their distance, added."""
    decays, bias = extras
    if decays is not None:
        now, since = decays[0][i], decays[1][j]
        heads = logits.reshape(*now.shape, -1) + (now[..., :, None] - since[..., None, :])
        logits = heads.reshape(logits.shape)
    if bias is not None:
        logits = logits + _by_group(bias(_distance(tokens, i, j)), logits)
    return logits


def _distance(tokens, i, j):
    """Tokens from each key to each query, int32 `[rows, queries, keys]`."""
    q, k = tokens
    return q.positions[i][:, :, None] - k.positions[j][:, None, :]


def _by_group(x, logits):
    """`x[rows, H, queries, keys]` as logits are: rows of the batch or 1, the heads of a group among the queries."""
    return x.reshape(x.shape[0], logits.shape[1], -1, x.shape[-1])


def _masked(plan: Plan, logits, tokens, i, j):
    """Logits with -inf where the query may not see the key."""
    q, k = (jax.tree.map(lambda x, n=n: x[n], side) for side, n in zip(tokens, (i, j), strict=True))
    if q.first is not None:
        place = j * plan.k_block + jnp.arange(plan.k_block)
        mask = (q.first[:, :, None] <= place) & (place < q.end[:, :, None])
    else:
        mask = (q.ids[:, :, None] == k.ids[:, None, :]) & (q.ids[:, :, None] > 0)
        mask &= plan.pattern.mask(q.positions[:, :, None], k.positions[:, None, :])
    heads = logits.reshape(*logits.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], heads, -jnp.inf).reshape(logits.shape)


def _sweep(schedule: Schedule, step, carry):
    """Runs `step(carry, i, j, masked)` over the touched pairs, masking where there is need."""
    queries, keys = jnp.asarray(schedule.queries), jnp.asarray(schedule.keys)

    def loop(first, last, most, carry, masked):
        # The scope is for whoever counts operations: where both loops end at run time, the last tells of their steps.
        with jax.named_scope(f"at_most_{most}_steps"):
            return jax.lax.fori_loop(first, last, lambda n, carry: step(carry, queries[n], keys[n], masked), carry)

    return loop(schedule.whole, schedule.touched, len(queries), loop(0, schedule.whole, 0, carry, False), True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, extras, tables):
    return _forward(plan, q, k, v, extras, tables)[0]


def _forward(plan: Plan, q, k, v, extras, tables):
    *tokens, schedule = tables
    tokens = jax.tree.map(jnp.asarray, tokens)

    def step(carry, i, j, masked):
        peaks, totals, outs = carry
        logits = _added(_logits(plan, q[i], k[j]), extras, tokens, i, j)
        if masked:
            logits = _masked(plan, logits, tokens, i, j)
        peak = peaks[i]
        higher = jnp.maximum(peak, logits.max(-1))
        shift = jnp.where(jnp.isneginf(higher), 0.0, higher)  # a row that has seen nothing stays at exp(-inf) = 0
        weights = jnp.exp(logits - shift[..., None])
        decay = jnp.exp(peak - shift)
        total = totals[i] * decay + weights.sum(-1)
        update = jnp.einsum("bgij,bgjv->bgiv", weights.astype(v.dtype), v[j], preferred_element_type=f32)
        out = outs[i] * decay[..., None] + update
        return peaks.at[i].set(higher), totals.at[i].set(total), outs.at[i].set(out)

    shape = q.shape[:-1]
    start = jnp.full(shape, -jnp.inf, f32), jnp.zeros(shape, f32), jnp.zeros((*shape, v.shape[-1]), f32)
    peak, total, out = _sweep(schedule, step, start)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out, logsumexp = out / total[..., None], jnp.where(seen, peak + jnp.log(total), -jnp.inf)
    return (out, logsumexp), (q, k, v, extras, out, logsumexp, tables)


def _backward(plan: Plan, residuals, cotangents):
    q, k, v, (decays, bias), out, logsumexp, tables = residuals
    *tokens, schedule = tables
    tokens = jax.tree.map(jnp.asarray, tokens)
    d_out, d_logsumexp = cotangents
    shift = jnp.where(jnp.isneginf(logsumexp), 0.0, logsumexp)
    share = (d_out * out).sum(-1) - d_logsumexp
    d_out = d_out.astype(v.dtype)

    def step(carry, i, j, masked):
        dq, dnow, dk, dv, dsince, d_bias = carry
        capped = _logits(plan, q[i], k[j])
        logits = _added(capped, (decays, bias), tokens, i, j)
        if masked:
            logits = _masked(plan, logits, tokens, i, j)
        weights = jnp.exp(logits - shift[i][..., None])
        d_weights = jnp.einsum("bgiv,bgjv->bgij", d_out[i], v[j], preferred_element_type=f32)
        d_logits = weights * (d_weights - share[i][..., None])
        if decays is not None:
            heads = d_logits.reshape(*dnow.shape[1:], -1)
            dnow, dsince = dnow.at[i].add(heads.sum(-1)), dsince.at[j].add(-heads.sum(-2))
        if bias is not None:
            _, pull = jax.vjp(lambda bias: _by_group(bias(_distance(tokens, i, j)), logits), bias)
            of_rows = d_logits if d_logits.shape[0] == tokens[0].ids.shape[1] else d_logits.sum(0, keepdims=True)
            d_bias = jax.tree.map(jnp.add, d_bias, pull(of_rows)[0])
        if plan.soft_cap is not None:
            d_logits *= 1 - (capped / plan.soft_cap) ** 2
        weights, d_logits = weights.astype(v.dtype), d_logits.astype(q.dtype)
        return (
            dq.at[i].add(jnp.einsum("bgij,bgjk->bgik", d_logits, k[j], preferred_element_type=f32)),
            dnow,
            dk.at[j].add(jnp.einsum("bgik,bgij->bgkj", q[i], d_logits, preferred_element_type=f32)),
            dv.at[j].add(jnp.einsum("bgiv,bgij->bgvj", d_out[i], weights, preferred_element_type=f32)),
            dsince,
            d_bias,
        )

    # The gradients of keys and values are summed transposed: transposing `weights` in each step is what is slow.
    dnow, dsince = (None, None) if decays is None else jax.tree.map(jnp.zeros_like, decays)
    dk, dv = jnp.zeros(k.mT.shape, f32), jnp.zeros(v.mT.shape, f32)
    start = jnp.zeros(q.shape, f32), dnow, dk, dv, dsince, jax.tree.map(jnp.zeros_like, bias)
    dq, dnow, dk, dv, dsince, d_bias = _sweep(schedule, step, start)
    d_decays = None if decays is None else (dnow, dsince)
    return dq.astype(q.dtype), dk.mT.astype(k.dtype), dv.mT.astype(v.dtype), (d_decays, d_bias), None


_attend.defvjp(_forward, _backward)
