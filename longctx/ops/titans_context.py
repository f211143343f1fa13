"""Titans' memory as context: attention in a segment, to itself and to what the memory of earlier segments recalls.

A document is cut into segments of C tokens, counted from its start. M is the memory of `ops/titans.py`, an MLP per
head; what it recalls to x, with |.| the division by the 2-norm, and norm that by the root mean square, of a head, is

    M*(x) = norm(M(|silu(x W_Q)|)) W_O.

For token t of segment i, M_(i-1) the memory as the last segment left it, and learned tokens p_1 ... p_N,

    h_t = M*_(i-1)(x_t)
    y_t = softmax attention of q_t to the keys and values of [p_1 ... p_N, h_s, S_s], s of the segment and s <= t
    M_t = M_(t-1) after learning from n_t = norm(y_t): keys |silu(n_t W_K)|, values silu(n_t W_V), gates of n_t
    o_t = n_t * sigmoid(norm(M*_t(n_t)))

where keys and values of p and h are their projections, and those of S_s are given with the tokens. Learning is that of
`ops/titans.py` with the segment as mini-batch: gradients at M_(i-1), momentum and forgetting token by token. What the
tokens of a segment read is alike, and so are their keys: steps that are each small enough may diverge together. So
theta_t = rate (1 - eta_t) sigmoid(n_t w + b) / C, of which a segment's sum, momentum included, is at most `rate`.

Causality. M_(i-1) has learned from y of earlier segments only, so that h_s depends on them and on x_s, and on nothing
after s. But h_s does depend on x_s, and shows it to whoever reads h_s. The causal mask is therefore s <= t for h as for
S, where the paper has all of h before S in one sequence; and the output is gated by the weights that have learned n_t,
not by those at the segment's end, which have learned the tokens after t.

State: that of the memory, and the keys and values of h and S in the segment in progress. M learns from y, which depends
on M: spans have no transition, and segments follow one another. Devices take turns.

Reference: Behrouz et al., "Titans: Learning to Memorize at Test Time", 2025 (arXiv:2501.00663), section 4.1, equations
21 to 25.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops import minibatch as grid
from longctx.ops import titans
from longctx.ops.chunks import along
from longctx.ops.family import Recurrence, by_token
from longctx.ops.products import einsum
from longctx.typing import Segments


class Inputs(NamedTuple):
    """o has the dtype of x.

    Attributes:
      x: the tokens, for which the memory is read.
      q, k, v: the tokens' queries, keys and values in the attention.
    """

    x: Float[Array, "B T D"]
    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H K"]


class Cell(NamedTuple):
    """Parameters, all float32."""

    initial: titans.Weights  # M before a document
    query: Float[Array, "D H K"]  # W_Q
    key: Float[Array, "D H K"]  # W_K
    value: Float[Array, "D H K"]  # W_V
    gates: Float[Array, "3 D H"]  # of n, to what is forgotten, momentum and rate before their sigmoids
    biases: Float[Array, "3 H"]
    scale: Float[Array, " K"]  # of norm(M(...))
    out: Float[Array, "H K D"]  # W_O
    persistent: Float[Array, "N D"]  # p, N may be 0
    near_key: Float[Array, "D H K"]  # of the attention
    near_value: Float[Array, "D H K"]
    near_out: Float[Array, "H K D"]  # from what attention reads to y
    near_scale: Float[Array, " D"]  # of norm(y)
    gate_scale: Float[Array, " D"]  # of norm(M*_t(n))


@dataclasses.dataclass(frozen=True)
class Options:
    """C, tokens a segment, and the largest C theta / (1 - eta)."""

    segment: int
    rate: float


class State(NamedTuple):
    """What a span leaves to the next, float32; all zeros before any token."""

    memory: titans.State
    keys: Float[Array, "B C 2 H K"]  # of h and S in the segment in progress; zeros for what it has not
    values: Float[Array, "B C 2 H K"]


def empty(inputs: Inputs, cell: Cell, options: Options) -> State:
    """The state before any token."""
    batch, _, heads, width = inputs.k.shape
    held = jnp.zeros((batch, options.segment, 2, heads, width))
    return State(titans.nothing(cell.initial, batch), held, held)


def recurrent(inputs: Inputs, cell: Cell, state: State, segments: Segments, options: Options):
    """The definition, token by token."""
    segment, rate = options.segment, options.rate / options.segment
    dot = functools.partial(jnp.einsum, precision="highest")

    def norm(x):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def project(x, w):
        return jax.nn.silu(dot("bd,dhk->bhk", x, w))

    def direct(x):
        return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)

    def memory(x, weights):
        for w in weights[:-1]:
            x = jax.nn.silu(dot("bhi,bhio->bho", x, w))
        return dot("bhi,bhio->bho", x, weights[-1])

    def recall(x, weights):
        return dot("bhk,hkd->bd", norm(memory(direct(project(x, cell.query)), weights)) * cell.scale, cell.out)

    def near(x):
        return dot("...d,dhk->...hk", x, cell.near_key), dot("...d,dhk->...hk", x, cell.near_value)

    def attend(q, keys, values, place):  # to p, and to h and S up to the token
        def with_persistent(p, held):
            p = jnp.broadcast_to(p, (len(q), *p.shape))
            return jnp.concatenate([p, held.reshape(len(q), -1, *q.shape[1:])], axis=1)

        keys, values = map(with_persistent, near(cell.persistent), (keys, values))
        later = jnp.repeat(jnp.arange(segment) > place[:, None], 2, axis=-1)
        later = jnp.pad(later, ((0, 0), (len(cell.persistent), 0)))
        logits = q.shape[-1] ** -0.5 * dot("bhk,bshk->bhs", q, keys)
        weights = jax.nn.softmax(jnp.where(later[:, None], -jnp.inf, logits), axis=-1)
        return dot("bhs,bshk->bhk", weights, values)

    def step(state, x, q, k, v, position):
        place = position % segment

        def where(flag, new, old):
            return jax.tree.map(lambda a, b: jnp.where(flag.reshape(-1, *(1,) * (b.ndim - 1)), a, b), new, old)

        base = jax.tree.map(jnp.add, cell.initial, state.memory.base)
        recalled = near(recall(x, base))
        here = (jnp.arange(segment) == place[:, None])[..., None, None, None]
        new = (jnp.stack(pair, axis=1)[:, None] for pair in zip(recalled, (k, v), strict=True))
        keys, values = (jnp.where(here, *pair) for pair in zip(new, state[1:], strict=True))
        y = dot("bhk,hkd->bd", attend(q, keys, values, place), cell.near_out)

        n = norm(y) * cell.near_scale
        written, wanted = direct(project(n, cell.key)), project(n, cell.value)
        gates = jax.nn.sigmoid(dot("bd,gdh->gbh", n, cell.gates) + cell.biases[:, None])
        forget, momentum, pace = gates[..., None, None]
        gradient = jax.grad(lambda w: jnp.sum(jnp.square(memory(written, w) - wanted)))(base)
        surprise = jax.tree.map(
            lambda s, g: momentum * s - rate * (1 - momentum) * pace * g,
            state.memory.surprise,
            gradient,
        )
        current = jax.tree.map(
            lambda w, d, s: (1 - forget) * (w + d) + s - w, cell.initial, state.memory.current, surprise
        )
        recalled = recall(n, jax.tree.map(jnp.add, cell.initial, current))
        o = n * jax.nn.sigmoid(norm(recalled) * cell.gate_scale)

        ends = place == segment - 1
        base = where(ends, current, state.memory.base)
        keys, values = where(ends, jax.tree.map(jnp.zeros_like, (keys, values)), (keys, values))
        return o, State(titans.State(base, current, surprise), keys, values)

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.x.dtype)


def chunked(inputs: Inputs, cell: Cell, state: State, segments: Segments, options: Options):
    """The same, segment by segment in matrix products."""
    phase = functools.partial(_phase, cell, options.rate)
    o, state = grid.scan(phase, state, inputs, segments, options.segment)
    return o.astype(inputs.x.dtype), state


def _phase(cell: Cell, rate: float, state: State, inputs, phase: grid.Phase):
    """Tokens that share the memory that their segments began with: o, and the state after them."""
    x, q, k, v = inputs
    z, weights = _direct(_project(x, cell.query)), jax.tree.map(jnp.add, cell.initial, state.memory.base)
    for w in weights[:-1]:
        z = jax.nn.silu(einsum("bthi,bhio->btho", z, w))
    recalled = _give(cell, einsum("bthi,bhio->btho", z, weights[-1]))
    keys = jnp.stack([einsum("btd,dhk->bthk", recalled, cell.near_key), k], axis=2)
    values = jnp.stack([einsum("btd,dhk->bthk", recalled, cell.near_value), v], axis=2)
    y = einsum("bthk,hkd->btd", _attend(cell, state, q, keys, values, phase), cell.near_out)

    n = _norm(jnp.where(phase.active[..., None], y, 0)) * cell.near_scale
    forget, momentum, pace = einsum("btd,gdh->gbth", n, cell.gates) + cell.biases[:, None, None]
    learned = _direct(_project(n, cell.query)), _direct(_project(n, cell.key)), _project(n, cell.value)
    theta = rate / state.keys.shape[1] * jax.nn.sigmoid(-momentum) * jax.nn.sigmoid(pace)
    learned += theta, jax.nn.log_sigmoid(-forget), jax.nn.log_sigmoid(momentum)
    z, memory = titans.learn(cell.initial, state.memory, learned, phase)

    place = phase.counted[:, None] & (phase.place[:, None] == jnp.arange(state.keys.shape[1])[:, None])

    def hold(new, old):
        held = einsum("bct,btphk->bcphk", place.astype(new.dtype), new)
        held = jnp.where(along(place.any(-1), old), held, old)
        return jnp.where(along(phase.complete, old), 0, held)

    o = n * jax.nn.sigmoid(_norm(_give(cell, z)) * cell.gate_scale)
    return o, State(memory, hold(keys, state.keys), hold(values, state.values))


def _attend(cell: Cell, state: State, q, keys, values, phase: grid.Phase):
    """What the tokens of a phase read of persistent tokens, of those the state holds, and of each other."""
    batch, length, held = *q.shape[:2], state.keys.shape[1]
    begun = jnp.min(jnp.where(phase.active, phase.place, held), axis=1)  # tokens of the segment that the state holds
    visible = jnp.broadcast_to((jnp.arange(held) < begun[:, None])[:, None], (batch, length, held))
    # Tokens of other phases see themselves: what they give is not read, but must be finite.
    visible = jnp.concatenate([visible, phase.pairs | jnp.eye(length, dtype=bool)], axis=-1)
    before = (0, 0), (0, 0), (len(cell.persistent), 0)
    visible = jnp.pad(jnp.repeat(visible, 2, axis=-1), before, constant_values=True)

    def join(weight, old, new):
        always = einsum("nd,dhk->nhk", cell.persistent, weight)
        always = jnp.broadcast_to(always, (batch, *always.shape))
        return jnp.concatenate([always, *(a.reshape(batch, -1, *a.shape[3:]) for a in (old, new))], axis=1)

    logits = einsum("bthk,bshk->bhts", q, join(cell.near_key, state.keys, keys)) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf), axis=-1)
    return einsum("bhts,bshk->bthk", weights, join(cell.near_value, state.values, values))


def _project(x, weight):
    return jax.nn.silu(einsum("btd,dhk->bthk", x, weight))


def _direct(x):
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _norm(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _give(cell: Cell, z):
    """M* from M."""
    return einsum("bthk,hkd->btd", _norm(z) * cell.scale, cell.out)


TITANS_CONTEXT = Recurrence(
    "titans_context", Inputs, empty, recurrent, chunked, transition=None, parameters=Cell, options=Options
)
