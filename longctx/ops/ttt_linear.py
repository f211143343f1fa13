"""TTT-Linear: a linear model with a norm, trained on the document by gradient descent on mini-batches of C tokens.

Per head, the model is f(x) = x + LN(x W + b), with LN(z) = gamma * (z - mean z) / sqrt(var z + 1e-6) + beta. For token
s of a mini-batch whose first token found the weights (W, b), learning rate r_s, and loss

    l_s(W, b) = |LN(k_s W + b) - (v_s - k_s)|^2 / 2,    g_s = its gradient with respect to k_s W + b,

token t, the t-th of the mini-batch, reads weights that have learned the mini-batch up to itself:

    W_t = W - d_t sum_{s<=t} r_s k_s^T g_s,    b_t = b - d_t sum_{s<=t} r_s g_s,    y_t = q_t + LN(q_t W_t + b_t),

and the next mini-batch starts from the weights (W_C, b_C). The factors d_t >= 0 are learned, about 1/t. All gradients
are taken at the weights the mini-batch starts from, so its tokens can be worked on together.

Chunk form, the paper's dual form: q_t W_t + b_t = q_t W + b - d_t sum_{s<=t} (q_t . k_s + 1) r_s g_s, and in closed
form g = (K h - sum h - x sum(h * x)) / (K std), with x = (z - mean z) / std and h = gamma * (LN(z) - (v - k)).

The gradient passes the norm, so that a mini-batch's effect is not linear in the weights: spans have no transition.

Reference: Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024, sections
2.4 to 2.7.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops import minibatch as grid
from longctx.ops.chunks import along
from longctx.ops.family import Recurrence, by_token
from longctx.ops.products import einsum
from longctx.typing import Segments

_EPSILON = 1e-6


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: what is put to the model.
      k, v: what it is trained to map, as k + LN(...) = v.
      rate: r, at least 0.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H K"]
    rate: Float[Array, "B T H"]


class Parameters(NamedTuple):
    """What is learned in training.

    Attributes:
      initial: W, and b as its last row.
      scale, shift: gamma and beta of the norm.
      discount: d, at least 0; its length is the mini-batch's, C.
    """

    initial: Float[Array, "H K+1 K"]
    scale: Float[Array, "H K"]
    shift: Float[Array, "H K"]
    discount: Float[Array, " C"]


class State(NamedTuple):
    """Differences from the initial weights, and the sums over the mini-batch in progress; float32.

    The last row of each matrix is that of b.
    """

    weights: Float[Array, "B H K+1 K"]
    pending: Float[Array, "B H K+1 K"]


def empty(inputs: Inputs, parameters: Parameters, options) -> State:
    """The state before any token."""
    batch, _, heads, width = inputs.k.shape
    zeros = jnp.zeros((batch, heads, width + 1, width))
    return State(zeros, zeros)


def recurrent(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options):
    """The definition, token by token."""
    initial, scale, shift, discount = parameters
    size = discount.shape[0]

    def norm(z):
        mean = jnp.mean(z, axis=-1, keepdims=True)
        return scale * (z - mean) / jnp.sqrt(jnp.var(z, axis=-1, keepdims=True) + _EPSILON) + shift

    def product(x, w):
        return jnp.sum(x[..., None] * w[..., :-1, :], axis=-2) + w[..., -1, :]

    def step(state, q, k, v, rate, position):
        weights, pending = state
        z = product(k, initial + weights)
        gradient = jax.grad(lambda z: 0.5 * jnp.sum(jnp.square(norm(z) - (v - k))))(z)
        ones = jnp.ones_like(k[..., :1])
        pending += (rate[..., None] * jnp.concatenate([k, ones], axis=-1))[..., None] * gradient[..., None, :]
        now = weights - discount[position % size][:, None, None, None] * pending
        y = q + norm(product(q, initial + now))
        done = (position % size == size - 1)[:, None, None, None]
        return y, State(jnp.where(done, now, weights), jnp.where(done, 0, pending))

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options):
    """The same, mini-batch by mini-batch in matrix products."""
    initial, scale, shift, discount = parameters

    def block(state, inputs, phase: grid.Phase):
        q, k, v, rate = inputs
        q, k = (jnp.pad(x, ((0, 0),) * 3 + ((0, 1),), constant_values=1) for x in (q, k))
        weights = initial + state.weights
        x, deviation = _standardise(einsum("bthk,bhkv->bthv", k, weights))
        h = scale * (scale * x + shift - (v - k[..., :-1]))
        h -= jnp.mean(h, axis=-1, keepdims=True) + x * jnp.mean(h * x, axis=-1, keepdims=True)
        steps = rate[..., None] * h / deviation
        products = einsum("bthk,bshk->bhts", q, k) * phase.pairs[:, None]
        moved = einsum("bhts,bshv->bthv", products, steps) + einsum("bthk,bhkv->bthv", q, state.pending)
        z = einsum("bthk,bhkv->bthv", q, weights) - discount[phase.place][..., None, None] * moved
        y = q[..., :-1] + scale * _standardise(z)[0] + shift
        pending = state.pending + einsum("bthk,bthv->bhkv", k * phase.counted[..., None, None], steps)
        done = along(phase.complete, pending)
        updated = state.weights - discount[-1] * pending
        return y, State(jnp.where(done, updated, state.weights), jnp.where(done, 0, pending))

    y, state = grid.scan(block, state, inputs, segments, discount.shape[0])
    return y.astype(inputs.v.dtype), state


def _standardise(z):
    """z with mean 0 and variance 1 over its last axis, and what it was divided by."""
    z -= jnp.mean(z, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + _EPSILON)
    return z / deviation, deviation


TTT_LINEAR = Recurrence("ttt_linear", Inputs, empty, recurrent, chunked, transition=None, parameters=Parameters)
