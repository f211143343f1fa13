"""The recurrent cell of the Block-Recurrent Transformer: a few state vectors, updated once per block of tokens.

A document is cut into blocks of W tokens, counted from its start. S is a matrix of R state vectors of D channels before
a block, I their learned identities, n = scale * norm(S) + I with norm(S) the rows over their root mean square, and per
head, with |.| the division by the 2-norm,

    K_S = |n W_K|,    V_S = n W_V,    Q_S = |n W_Q|,    Q_E = |n W_E|

Tokens read the vectors that stand before their block, and after its last token the vectors read each other and, by the
keys K and values V of the tokens, that block and the one before it:

    y_t = softmax(q_t K_S^T) V_S
    A = [softmax(a Q_S K_S^T) V_S, softmax(b Q_E K^T) V],    Z = A W_Z

with a, b >= 0 learned per head. A gate says how much is replaced. It does not depend on what is read ("fixed"), or
forgets and writes by what is read ("lstm"):

    fixed: S <- g * S + (1 - g) * Z,    g = sigmoid(c)
    lstm:  S <- f * S + i * Z,          f = sigmoid(A W_f + c_f + 1),  i = sigmoid(A W_i + c_i - 1)

S begins each document as learned vectors S_0. The state is S - S_0, and keys and values of the last block and of the
one in progress, in a ring of 2 W slots.

Chunk form. Among W consecutive tokens of a row at most one block ends: two ends in a document are W tokens apart, and a
document that starts has W tokens up to its first. So the row is cut into pieces of that length, and in each the vectors
are updated once: tokens up to the end read the old ones, tokens after it the new ones, and those of documents that
started since read S_0.

There is no transition: the update is not linear in S. Devices take turns.

Reference: Hutchins et al., "Block-Recurrent Transformers", 2022, section 3 (the "skip" configuration: one gate), and
the authors' program, by which vectors read two blocks, and keys and queries have norm 1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops import chunks
from longctx.ops.chunks import along
from longctx.ops.family import Recurrence, by_token
from longctx.ops.products import einsum
from longctx.typing import Segments


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: the tokens' queries to the state vectors, scaled as the softmax is to have them.
      k, v: the tokens' keys and values for the state vectors.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H K"]


class Cell(NamedTuple):
    """Parameters, all float32."""

    initial: Float[Array, "R D"]  # S_0
    identity: Float[Array, "R D"]  # I
    scale: Float[Array, " D"]
    key: Float[Array, "D H K"]
    value: Float[Array, "D H K"]
    query_states: Float[Array, "D H K"]  # W_Q
    query_tokens: Float[Array, "D H K"]  # W_E
    sharpness: Float[Array, "2 H"]  # a, b
    out: Float[Array, "2 H K D"]  # W_Z
    gate: Float[Array, "G D"]  # c, or c_f and c_i
    gate_out: Float[Array, "2 2 H K D"] | None  # W_f and W_i; None for the fixed gate


@dataclasses.dataclass(frozen=True)
class Options:
    """W, tokens a block."""

    block: int


class State(NamedTuple):
    """What a span leaves to the next, float32; all zeros before any token."""

    vectors: Float[Array, "B R D"]  # S - S_0
    keys: Float[Array, "B 2W H K"]  # of a token at its position modulo 2 W
    values: Float[Array, "B 2W H K"]


def empty(inputs: Inputs, cell: Cell, options: Options) -> State:
    """The state before any token."""
    batch, _, heads, width = inputs.k.shape
    held = jnp.zeros((batch, 2 * options.block, heads, width))
    return State(jnp.zeros((batch, *cell.initial.shape)), held, held)


def recurrent(inputs: Inputs, cell: Cell, state: State, segments: Segments, options: Options):
    """The definition, token by token."""
    block = options.block
    dot = functools.partial(jnp.einsum, precision="highest")
    sharp_states, sharp_tokens = cell.sharpness[:, None, :, None, None]

    def direct(x):
        return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)

    def step(state, q, k, v, position):
        s = cell.initial + state.vectors
        n = cell.scale * s / jnp.sqrt(jnp.mean(s**2, axis=-1, keepdims=True) + 1e-6) + cell.identity
        keys, values, ask_states, ask_tokens = (dot("brd,dhk->brhk", n, w) for w in cell[3:7])
        keys, ask_states, ask_tokens = direct(keys), direct(ask_states), direct(ask_tokens)
        y = dot("bhr,brhk->bhk", jax.nn.softmax(dot("bhk,brhk->bhr", q, keys), axis=-1), values)

        here = (jnp.arange(2 * block) == position[:, None] % (2 * block))[..., None, None]
        held = jnp.where(here, k[:, None], state.keys), jnp.where(here, v[:, None], state.values)
        logits = sharp_states * dot("brhk,bnhk->bhrn", ask_states, keys)
        among = dot("bhrn,bnhk->brhk", jax.nn.softmax(logits, axis=-1), values)
        logits = sharp_tokens * dot("brhk,bwhk->bhrw", ask_tokens, held[0])
        logits = jnp.where((jnp.arange(2 * block) <= position[:, None])[:, None, None], logits, -jnp.inf)
        read = jnp.stack([among, dot("bhrw,bwhk->brhk", jax.nn.softmax(logits, axis=-1), held[1])])
        z = dot("pbrhk,phkd->brd", read, cell.out)
        if cell.gate_out is None:
            g = jax.nn.sigmoid(cell.gate[0])
            s = g * s + (1 - g) * z
        else:
            forget, write = dot("pbrhk,gphkd->gbrd", read, cell.gate_out) + cell.gate[:, None, None]
            s = jax.nn.sigmoid(forget + 1) * s + jax.nn.sigmoid(write - 1) * z
        ends = along(position % block == block - 1, s)
        return y, State(jnp.where(ends, s - cell.initial, state.vectors), *held)

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.v.dtype)


def chunked(inputs: Inputs, cell: Cell, state: State, segments: Segments, options: Options):
    """The same, W tokens at a time."""
    piece = functools.partial(_piece, cell, options.block)
    y, state = chunks.scan(piece, state, (*inputs, segments), options.block)
    return y.astype(inputs.v.dtype), state


def _piece(cell: Cell, block: int, state: State, tokens):
    """The state after at most `block` tokens, and y: the vectors before and after the one block that may end."""
    q, k, v, segments = tokens
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    run = segments.runs
    ends = segments.valid & (segments.positions % block == block - 1)
    ended = jnp.cumsum(ends, axis=1) - ends  # 1 after the end; the end itself counts among the tokens before it
    run_of_end = jnp.where(ends.any(1), jnp.sum(jnp.where(ends, run, 0), axis=1), -1)[:, None]

    def held(which, continued):
        """The ring with the tokens `which` in their slots, over what it held of a document that is `continued`."""
        slot = jnp.where(which, segments.positions % (2 * block), -1)[:, None] == jnp.arange(2 * block)[:, None]
        before = (jnp.where(continued[..., None, None], x, 0) for x in (state.keys, state.values))
        filled = slot.any(-1)[..., None, None]
        return [
            jnp.where(filled, einsum("bwt,bthk->bwhk", slot.astype(jnp.float32), new), old)
            for new, old in zip((k, v), before, strict=True)
        ]

    first = jnp.broadcast_to(cell.initial, state.vectors.shape)
    old = jnp.where((run_of_end > 0)[..., None], first, cell.initial + state.vectors)
    last_position = jnp.sum(jnp.where(ends, segments.positions, 0), axis=1, keepdims=True)
    of_end = segments.valid & (run == run_of_end) & (ended == 0)
    new = _update(cell, old, *held(of_end, run_of_end == 0), jnp.arange(2 * block) <= last_position)

    after = (run == run_of_end) & (ended == 1)
    choice = jnp.where(after, 2, jnp.where(run == 0, 1, 0))  # of S_0, the vectors that enter, the updated ones
    reads = jnp.stack([_read(cell, s, q) for s in (first, cell.initial + state.vectors, new)])
    y = jnp.sum(jnp.where(choice[..., None, None] == jnp.arange(3)[:, None, None, None, None], reads, 0), axis=0)

    last = run[:, -1:]
    updated, carried = (last == run_of_end)[..., None], (last == 0)[..., None]
    vectors = jnp.where(updated, new - cell.initial, jnp.where(carried, state.vectors, 0))
    after = State(vectors, *held(segments.valid & (run == last), last == 0))
    return after, jnp.where(segments.valid[..., None, None], y, 0)


def _identified(cell: Cell, s):
    """n of the vectors S."""
    return cell.scale * s * jax.lax.rsqrt(jnp.mean(jnp.square(s), axis=-1, keepdims=True) + 1e-6) + cell.identity


def _direct(x):
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _attend(q, k, v, visible=None):
    """Softmax attention [B, T, H, K] to all of [B, S, H, K], or to those that are `visible[B, S]`."""
    logits = einsum("bthk,bshk->bhts", q, k)
    logits = logits if visible is None else jnp.where(visible[:, None, None], logits, -jnp.inf)
    return einsum("bhts,bshk->bthk", jax.nn.softmax(logits, axis=-1), v)


def _read(cell: Cell, s, q):
    n = _identified(cell, s)
    return _attend(q, _direct(einsum("brd,dhk->brhk", n, cell.key)), einsum("brd,dhk->brhk", n, cell.value))


def _update(cell: Cell, s, k, v, visible):
    n = _identified(cell, s)
    queries = (einsum("brd,dhk->brhk", n, w) for w in (cell.query_states, cell.query_tokens))
    ask_states, ask_tokens = (_direct(q) * sharp[:, None] for q, sharp in zip(queries, cell.sharpness, strict=True))
    among, outside = _read(cell, s, ask_states), _attend(ask_tokens, k, v, visible)

    def mixed(out):
        return einsum("brhk,hkd->brd", among, out[0]) + einsum("brhk,hkd->brd", outside, out[1])

    z = mixed(cell.out)
    if cell.gate_out is None:
        gate = jax.nn.sigmoid(cell.gate[0])
        return gate * s + (1 - gate) * z
    forget, write = (mixed(out) + bias for out, bias in zip(cell.gate_out, cell.gate, strict=True))
    return jax.nn.sigmoid(forget + 1) * s + jax.nn.sigmoid(write - 1) * z


BLOCK_RECURRENT = Recurrence(
    "block_recurrent", Inputs, empty, recurrent, chunked, transition=None, parameters=Cell, options=Options
)
