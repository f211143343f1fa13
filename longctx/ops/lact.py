"""Large-chunk test-time training: a gated MLP per head, trained on the document by one step per mini-batch of C tokens.

Per head, f(x) = W1 (silu(W0 x) * W2 x). For the tokens s of a mini-batch, with rates r_s of each of the three matrices,

    G = sum_s r_s * gradient of f(k_s) . v_s,    y_s = f(q_s),    both with the weights the mini-batch starts from,
    D = G + m D_before,    W <- rows of W + O(D), scaled to the norms of the initial weights' rows,

with m the mean over the mini-batch of the momentum of its tokens, D_before what D was at the update before, and O the
identity, or an orthogonalisation ("Muon"): five steps X <- a X + b (X X^T) X + c (X X^T)^2 X from X = D / |D|.
A mini-batch is read before it is learned, and one that its document's end cuts short is never learned.

An update is not linear in the weights: spans have no transition.

Reference: Zhang et al., "Test-Time Training Done Right", 2025 (arXiv:2505.23884), section 3; coefficients of O and the
order of momentum, orthogonalisation and normalisation from the authors' program.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops import minibatch as grid
from longctx.ops.chunks import along
from longctx.ops.family import Recurrence, by_token
from longctx.ops.products import einsum
from longctx.typing import Segments

_STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # a, b, c
_EPSILON = 1e-10  # added to squared norms


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: what is put to the MLP.
      k, v: what it is trained to map.
      rates: r of W0, W1, W2.
      momentum: 0 to 1; None for none.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H K"]
    rates: Float[Array, "B T H 3"]
    momentum: Float[Array, "B T H"] | None


class Weights(NamedTuple):
    """The three matrices of each head, with or without a batch in front: W0, W1, W2."""

    gate: Float[Array, "... H M K"]
    down: Float[Array, "... H K M"]
    up: Float[Array, "... H M K"]


@dataclasses.dataclass(frozen=True)
class Options:
    """C, tokens a mini-batch (token p of a document is in its mini-batch p // C), and whether O orthogonalises."""

    minibatch: int
    orthogonal: bool = False


class State(NamedTuple):
    """Differences from the initial weights, and the mini-batch in progress; float32.

    Attributes:
      change: of the weights.
      pending: G so far.
      before: D at the last update; None without momentum.
      share: sum of momenta so far, over C; None without momentum.
    """

    change: Weights
    pending: Weights
    before: Weights | None
    share: Float[Array, "B H"] | None


def empty(inputs: Inputs, initial: Weights, options: Options) -> State:
    """The state before any token."""
    batch, heads = inputs.k.shape[0], inputs.k.shape[2]
    zeros = jax.tree.map(lambda w: jnp.zeros((batch, *w.shape)), initial)
    if inputs.momentum is None:
        return State(zeros, zeros, None, None)
    return State(zeros, zeros, zeros, jnp.zeros((batch, heads)))


def recurrent(inputs: Inputs, initial: Weights, state: State, segments: Segments, options: Options):
    """The definition, token by token; `initial` are the weights before a document."""

    def mlp(x, w):
        hidden = jax.nn.silu(jnp.sum(w.gate * x[..., None, :], axis=-1)) * jnp.sum(w.up * x[..., None, :], axis=-1)
        return jnp.sum(w.down * hidden[..., None, :], axis=-1)

    def change(w, step, first):
        if options.orthogonal:
            step = step / jnp.sqrt(jnp.sum(jnp.square(step), axis=(-2, -1), keepdims=True) + _EPSILON)
            for a, b, c in _STEPS:
                square = jnp.matmul(jnp.swapaxes(step, -1, -2), step, precision="highest")
                powers = a * jnp.eye(square.shape[-1]) + b * square
                powers += c * jnp.matmul(square, square, precision="highest")
                step = jnp.matmul(step, powers, precision="highest")
        new = w + step
        norm, wanted = (jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPSILON) for x in (new, first))
        return new * wanted / norm - first

    def step(state, q, k, v, rates, momentum, position):
        w = jax.tree.map(jnp.add, initial, state.change)
        gradient = jax.grad(lambda w: jnp.sum(mlp(k, w) * v))(w)
        rates = Weights(*jnp.moveaxis(rates, -1, 0))
        pending = jax.tree.map(lambda sum, g, r: sum + r[..., None, None] * g, state.pending, gradient, rates)
        before, share, direction = None, None, pending
        done = position % options.minibatch == options.minibatch - 1
        if momentum is not None:
            share = state.share + momentum / options.minibatch
            direction = jax.tree.map(lambda g, d: g + share[..., None, None] * d, pending, state.before)
            share = jnp.where(along(done, share), 0, share)
            before = direction
        after = State(jax.tree.map(change, w, direction, initial), jax.tree.map(jnp.zeros_like, pending), before, share)
        going = State(state.change, pending, state.before, share)
        return mlp(q, w), jax.tree.map(lambda new, same: jnp.where(along(done, new), new, same), after, going)

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.v.dtype)


def chunked(inputs: Inputs, initial: Weights, state: State, segments: Segments, options: Options):
    """The same, mini-batch by mini-batch in matrix products."""

    def block(state: State, inputs, phase: grid.Phase):
        q, k, v, rates, momentum = inputs
        weights = jax.tree.map(jnp.add, initial, state.change)
        gate, up = (einsum("bthk,bhmk->bthm", q, w) for w in (weights.gate, weights.up))
        y = einsum("bthm,bhkm->bthk", jax.nn.silu(gate) * up, weights.down)

        gate, up = (einsum("bthk,bhmk->bthm", k, w) for w in (weights.gate, weights.up))
        open_ = jax.nn.sigmoid(gate)
        back = einsum("bthk,bhkm->bthm", v, weights.down)
        to_gate = back * up * open_ * (1 + gate * (1 - open_))
        parts = zip(
            jnp.moveaxis(rates * phase.counted[..., None, None], -1, 0)[..., None],
            (to_gate, v, back * gate * open_),
            (k, gate * open_ * up, k),
            strict=True,
        )
        sums = Weights(*(einsum("bthm,bthk->bhmk", rate * left, right) for rate, left, right in parts))
        pending = jax.tree.map(jnp.add, state.pending, sums)

        direction, share = pending, None
        if momentum is not None:
            share = state.share + jnp.sum(momentum * phase.counted[..., None], axis=1) / options.minibatch
            direction = jax.tree.map(lambda g, d: g + share[..., None, None] * d, pending, state.before)
        step = jax.tree.map(_orthogonal, direction) if options.orthogonal else direction
        change = jax.tree.map(lambda w, d, first: _scaled(w + d, first) - first, weights, step, initial)
        nothing = jax.tree.map(jnp.zeros_like, (pending, share))
        after = State(change, nothing[0], None if share is None else direction, nothing[1])
        going = State(state.change, pending, state.before, share)
        return y, jax.tree.map(lambda a, b: jnp.where(along(phase.complete, a), a, b), after, going)

    y, state = grid.scan(block, state, inputs, segments, options.minibatch)
    return y.astype(inputs.v.dtype), state


def _orthogonal(x):
    """x with all its singular values moved near 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x *= jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True) + _EPSILON)
    for a, b, c in _STEPS:
        square = einsum("...ij,...kj->...ik", x, x)
        x = a * x + einsum("...ij,...jk->...ik", b * square + c * einsum("...ij,...jk->...ik", square, square), x)
    return jnp.swapaxes(x, -1, -2) if tall else x


def _scaled(x, like):
    """x, its rows scaled to the norms of those of `like`."""
    square, wanted = (jnp.sum(jnp.square(part), axis=-1, keepdims=True) + _EPSILON for part in (x, like))
    return x * jnp.sqrt(wanted / square)


LACT = Recurrence("lact", Inputs, empty, recurrent, chunked, transition=None, parameters=Weights, options=Options)
