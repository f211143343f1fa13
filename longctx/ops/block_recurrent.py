"""The recurrent cell of the Block-Recurrent Transformer: a few state vectors, updated once per block of tokens.

A document is cut into blocks of `block` tokens, counted from its start. S is a matrix of R state vectors of D channels
before a block, norm(S) its rows over their root mean square, and per head

    K_S = norm(S) W_K,    V_S = norm(S) W_V,    Q_S = norm(S) W_Q,    Q_E = norm(S) W_E

Tokens read the vectors that stand before their block, and after its last token the vectors read each other and, by its
keys K and values V, the block; a gate that does not depend on what is read ("fixed") says how much is replaced:

    y_t = softmax(q_t K_S^T / sqrt(K)) V_S
    Z = [softmax(Q_S K_S^T / sqrt(K)) V_S, softmax(Q_E K^T / sqrt(K)) V] W_Z + b,    S <- g * S + (1 - g) * Z

S begins each document as learned vectors S_0. The state is S - S_0, and keys and values of the block in progress.

Chunk form. Among `block` consecutive tokens of a row at most one block ends: two ends in a document are `block` tokens
apart, and a document that starts has `block` tokens up to its first. So the row is cut into pieces of that length, and
in each the vectors are updated once: tokens up to the end read the old ones, tokens after it the new ones, and those of
documents that started since read S_0.

There is no transition: the update is not linear in S. Devices take turns.

Reference: Hutchins et al., "Block-Recurrent Transformers", 2022, section 3 (one gate, "skip" configuration).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.gated_linear import einsum
from longctx.typing import Segments, checked

transition = None  # states do not compose: devices take turns


class Cell(NamedTuple):
    """Parameters, all float32."""

    initial: Float[Array, "R D"]  # S_0
    key: Float[Array, "D H K"]
    value: Float[Array, "D H K"]
    query_states: Float[Array, "D H K"]  # W_Q
    query_tokens: Float[Array, "D H K"]  # W_E
    out: Float[Array, "2 H K D"]  # W_Z
    bias: Float[Array, " D"]
    gate: Float[Array, " D"]  # g is its sigmoid


class State(NamedTuple):
    """What a span leaves to the next, float32; all zeros before any token."""

    vectors: Float[Array, "B R D"]  # S - S_0
    keys: Float[Array, "B W H K"]  # of the block in progress; zeros for what it has not
    values: Float[Array, "B W H K"]


@checked
def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    cell: Cell,
    state: State | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    block: int,
) -> tuple[Float[Array, "B T H K"], State]:
    """The definition, token by token.

    Args:
      q: the tokens' queries to the state vectors.
      k, v: the tokens' keys and values for the state vectors.
      cell: parameters.
      state: before the span, None for zeros.
      segment_ids: documents of a packed row; their positions tell the blocks. A document's start forgets everything
        before it; padding leaves the state unchanged and gives 0.
      block: tokens a block.

    Returns:
      y in the dtype of v, and the state after the span, float32.
    """
    segments = Segments.of(segment_ids, *k.shape[:2])
    dot = functools.partial(jnp.einsum, precision="highest")
    scale = k.shape[-1] ** -0.5

    def step(state, token):
        q, k, v, position, start, valid = token

        def where(flag, new, old):
            return jax.tree.map(lambda a, b: jnp.where(flag.reshape(-1, *(1,) * (b.ndim - 1)), a, b), new, old)

        fresh = where(start, jax.tree.map(jnp.zeros_like, state), state)
        s = cell.initial + fresh.vectors
        n = s / jnp.sqrt(jnp.mean(s**2, axis=-1, keepdims=True) + 1e-6)
        keys, values, ask_states, ask_tokens = (dot("brd,dhk->brhk", n, w) for w in cell[1:5])
        y = dot("bhr,brhk->bhk", jax.nn.softmax(scale * dot("bhk,brhk->bhr", q, keys), axis=-1), values)
        here = (jnp.arange(block) == position[:, None] % block)[..., None, None]
        held = jnp.where(here, k[:, None], fresh.keys), jnp.where(here, v[:, None], fresh.values)
        among = dot(
            "bhrn,bnhk->brhk", jax.nn.softmax(scale * dot("brhk,bnhk->bhrn", ask_states, keys), axis=-1), values
        )
        weights = jax.nn.softmax(scale * dot("brhk,bwhk->bhrw", ask_tokens, held[0]), axis=-1)
        told = dot("bhrw,bwhk->brhk", weights, held[1])
        z = dot("pbrhk,phkd->brd", jnp.stack([among, told]), cell.out) + cell.bias
        g = jax.nn.sigmoid(cell.gate)
        updated = State(g * s + (1 - g) * z - cell.initial, *map(jnp.zeros_like, held))
        after = where(position % block == block - 1, updated, State(fresh.vectors, *held))
        return where(valid, after, state), jnp.where(valid[:, None, None], y, 0)

    tokens = (*(x.astype(jnp.float32) for x in (q, k, v)), segments.positions, segments.starts, segments.valid)
    state = _zeros(k, cell, block) if state is None else state
    state, y = jax.lax.scan(step, state, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state


@checked
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    cell: Cell,
    state: State | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    block: int,
) -> tuple[Float[Array, "B T H K"], State]:
    """The same as `recurrent`, `block` tokens at a time. Backwards each piece is computed again from its state."""
    batch, length = k.shape[:2]
    segments = Segments.of(segment_ids, batch, length)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -length % block)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    piece = jax.checkpoint(functools.partial(_piece, cell, block), prevent_cse=False)
    state = _zeros(k, cell, block) if state is None else state
    state, y = jax.lax.scan(piece, state, jax.tree.map(cut, (q, k, v, segments)))
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, *v.shape[2:])[:, :length].astype(v.dtype), state


def _piece(cell: Cell, block: int, state: State, tokens):
    """The state after at most `block` tokens, and y: the vectors before and after the one block that may end."""
    q, k, v, segments = tokens
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    run = segments.runs
    ends = segments.valid & (segments.positions % block == block - 1)
    ended = jnp.cumsum(ends, axis=1) - ends  # 1 after the end
    some = ends.any(1)
    run_of_end = jnp.where(some, jnp.sum(jnp.where(ends, run, 0), axis=1), -1)[:, None]
    of_end = segments.valid & (run == run_of_end) & (ended == 0)

    def held(which, before):
        """What `before` holds of a block, and the tokens `which` in their places."""
        place = jnp.where(which, segments.positions % block, block)[:, None] == jnp.arange(block)[:, None]
        filled = place.any(-1)[..., None, None]
        return [
            jnp.where(filled, einsum("bwt,bthk->bwhk", place.astype(jnp.float32), new), old)
            for new, old in zip((k, v), before, strict=True)
        ]

    first = jnp.broadcast_to(cell.initial, state.vectors.shape)
    old = jnp.where((run_of_end > 0)[..., None], first, cell.initial + state.vectors)
    new = _update(cell, old, *held(of_end, (state.keys, state.values)))

    after = (run == run_of_end) & (ended == 1)
    choice = jnp.where(after, 2, jnp.where(run == 0, 1, 0))  # of S_0, the vectors that enter, the updated ones
    reads = jnp.stack([_read(cell, s, q) for s in (first, cell.initial + state.vectors, new)])
    y = jnp.sum(jnp.where(choice[..., None, None] == jnp.arange(3)[:, None, None, None, None], reads, 0), axis=0)

    last = run[:, -1:]
    updated, carried = (last == run_of_end)[..., None], (last == 0)[..., None]
    vectors = jnp.where(updated, new - cell.initial, jnp.where(carried, state.vectors, 0))
    kept = (carried & ~updated)[..., None]
    rest = segments.valid & (run == last) & ((run != run_of_end) | (ended == 1))
    before = [jnp.where(kept, x, 0) for x in (state.keys, state.values)]
    # The end itself counts among the tokens before it: `ended` is 0 there.
    return State(vectors, *held(rest, before)), jnp.where(segments.valid[..., None, None], y, 0)


def _normalise(s):
    return s * jax.lax.rsqrt(jnp.mean(jnp.square(s), axis=-1, keepdims=True) + 1e-6)


def _attend(q, k, v):
    """Softmax attention [B, T, H, K] to all of [B, S, H, K]."""
    weights = jax.nn.softmax(einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5, axis=-1)
    return einsum("bhts,bshk->bthk", weights, v)


def _read(cell: Cell, s, q):
    s = _normalise(s)
    return _attend(q, einsum("brd,dhk->brhk", s, cell.key), einsum("brd,dhk->brhk", s, cell.value))


def _update(cell: Cell, s, k, v):
    among = _read(cell, s, einsum("brd,dhk->brhk", _normalise(s), cell.query_states))
    told = _attend(einsum("brd,dhk->brhk", _normalise(s), cell.query_tokens), k, v)
    z = einsum("brhk,hkd->brd", among, cell.out[0]) + einsum("brhk,hkd->brd", told, cell.out[1]) + cell.bias
    gate = jax.nn.sigmoid(cell.gate)
    return gate * s + (1 - gate) * z


def _zeros(k, cell: Cell, block: int) -> State:
    batch, _, heads, width = k.shape
    empty = jnp.zeros((batch, block, heads, width))
    return State(jnp.zeros((batch, *cell.initial.shape)), empty, empty)
