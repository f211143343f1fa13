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

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops import minibatch as grid
from longctx.ops.gated_linear import einsum
from longctx.typing import Segments, checked

transition = None  # states do not compose: devices take turns

_STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # a, b, c
_EPSILON = 1e-10  # added to squared norms


class Weights(NamedTuple):
    """The three matrices of each head, with or without a batch in front: W0, W1, W2."""

    gate: Float[Array, "... H M K"]
    down: Float[Array, "... H K M"]
    up: Float[Array, "... H M K"]


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


@checked
def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    rates: Float[Array, "B T H 3"],
    momentum: Float[Array, "B T H"] | None,
    initial: Weights,
    state: State | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    minibatch: int,
    orthogonal: bool = False,
) -> tuple[Float[Array, "B T H K"], State]:
    """The definition, token by token.

    Args:
      q: what is put to the MLP.
      k, v: what it is trained to map.
      rates: r of W0, W1, W2.
      momentum: 0 to 1; None for none.
      initial: the weights before a document.
      state: before the span, None for zeros.
      segment_ids: documents of a packed row. A document's start forgets everything before it; padding leaves the
        state unchanged and gives 0.
      minibatch: C. Token p of a document is in its mini-batch p // C.
      orthogonal: whether O orthogonalises.

    Returns:
      y in the dtype of v, and the state after the span, float32.
    """
    segments = Segments.of(segment_ids, *k.shape[:2])

    def mlp(x, w):
        hidden = jax.nn.silu(jnp.sum(w.gate * x[..., None, :], axis=-1)) * jnp.sum(w.up * x[..., None, :], axis=-1)
        return jnp.sum(w.down * hidden[..., None, :], axis=-1)

    def change(w, step, first):
        if orthogonal:
            step = step / jnp.sqrt(jnp.sum(jnp.square(step), axis=(-2, -1), keepdims=True) + _EPSILON)
            for a, b, c in _STEPS:
                square = jnp.matmul(jnp.swapaxes(step, -1, -2), step, precision="highest")
                powers = a * jnp.eye(square.shape[-1]) + b * square
                powers += c * jnp.matmul(square, square, precision="highest")
                step = jnp.matmul(step, powers, precision="highest")
        new = w + step
        norm, wanted = (jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPSILON) for x in (new, first))
        return new * wanted / norm - first

    def step(state, token):
        q, k, v, rates, momentum, start, valid, place = token
        held = jax.tree.map(lambda x: jnp.where(grid.along(start, x), 0, x), state)
        w = jax.tree.map(jnp.add, initial, held.change)
        gradient = jax.grad(lambda w: jnp.sum(mlp(k, w) * v))(w)
        rates = Weights(*jnp.moveaxis(rates, -1, 0))
        pending = jax.tree.map(lambda sum, g, r: sum + r[..., None, None] * g, held.pending, gradient, rates)
        y, before, share, direction = mlp(q, w), None, None, pending
        done = place == minibatch - 1
        if momentum is not None:
            share = held.share + momentum / minibatch
            direction = jax.tree.map(lambda g, d: g + share[..., None, None] * d, pending, held.before)
            share = jnp.where(grid.along(done, share), 0, share)
            before = direction
        after = State(jax.tree.map(change, w, direction, initial), jax.tree.map(jnp.zeros_like, pending), before, share)
        going = State(held.change, pending, held.before, share)
        state = jax.tree.map(
            lambda new, same, old: jnp.where(
                grid.along(valid, new), jnp.where(grid.along(done, new), new, same), old
            ),
            after, going, state,
        )  # fmt: skip
        return state, jnp.where(valid[:, None, None], y, 0)

    tokens = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (q, k, v, rates, momentum))
    tokens += (segments.starts, segments.valid, segments.positions % minibatch)
    state = _zeros(k, initial, momentum) if state is None else state
    state, y = jax.lax.scan(step, state, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state


@checked
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    rates: Float[Array, "B T H 3"],
    momentum: Float[Array, "B T H"] | None,
    initial: Weights,
    state: State | None = None,
    segment_ids: Int[Array, "B T"] | Segments | None = None,
    *,
    minibatch: int,
    orthogonal: bool = False,
) -> tuple[Float[Array, "B T H K"], State]:
    """The same as `recurrent`, mini-batch by mini-batch in matrix products."""

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
            share = state.share + jnp.sum(momentum * phase.counted[..., None], axis=1) / minibatch
            direction = jax.tree.map(lambda g, d: g + share[..., None, None] * d, pending, state.before)
        step = jax.tree.map(_orthogonal, direction) if orthogonal else direction
        change = jax.tree.map(lambda w, d, first: _scaled(w + d, first) - first, weights, step, initial)
        nothing = jax.tree.map(jnp.zeros_like, (pending, share))
        after = State(change, nothing[0], None if share is None else direction, nothing[1])
        going = State(state.change, pending, state.before, share)
        return y, jax.tree.map(lambda a, b: jnp.where(grid.along(phase.complete, a), a, b), after, going)

    state = _zeros(k, initial, momentum) if state is None else state
    y, state = grid.scan(block, state, (q, k, v, rates, momentum), segment_ids, minibatch)
    return y.astype(v.dtype), state


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


def _zeros(k, initial, momentum):
    batch = k.shape[0]
    zeros = jax.tree.map(lambda w: jnp.zeros((batch, *w.shape)), initial)
    share = None if momentum is None else jnp.zeros((batch, k.shape[2]))
    return State(zeros, zeros, None if momentum is None else zeros, share)
