"""The neural memory of Titans: an MLP per head, trained on the document with momentum and forgetting.

For the memory M (weights W_1 ... W_L, M(x) = ... silu(x W_1) W_2, without silu after the last), a token of which
(k, v) is to be learned and q to be looked up, surprise S, decay 1 - alpha, momentum eta and rate theta:

    S_t = eta_t S_{t-1} - theta_t gradient of |M(k_t) - v_t|^2,    M_t = (1 - alpha_t) M_{t-1} + S_t,    y_t = M_t(q_t).

The gradient is that at the weights M which the mini-batch of C tokens started from; a document starts from the learned
weights M_0 and S = 0. So within a mini-batch S and M are linear recurrences of gradients that are known together, and
every token reads the weights that have learned it.

Chunk form. With a(t, r) the product of 1 - alpha from token r+1 to t, and e(t, s) that of eta, each the exponential of
a sum, 0 for r > t, and those from before the chunk written a(t), e(t):

    M_t = a(t) M + (sum_r a(t, r) e(r)) S - sum_s (sum_r a(t, r) e(r, s)) theta_s gradient_s,

and since the gradient with respect to W_l is x_s^T d_s, of layer l's input x_s and error d_s, a token's product with
its own weights is that with M and S and, in place of a matrix per token, sum_s (...) theta_s (x_t . x_s) d_s.

The gradient is not linear in the weights: spans have no transition.

Reference: Behrouz et al., "Titans: Learning to Memorize at Test Time", 2025 (arXiv:2501.00663), sections 3.1 and 3.2.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops import minibatch as grid
from longctx.ops.chunks import along
from longctx.ops.clock import FLOOR
from longctx.ops.family import Recurrence, by_token
from longctx.ops.products import einsum
from longctx.typing import Segments

Weights = tuple[Float[Array, "... H I O"], ...]  # one per layer of the memory


class Inputs(NamedTuple):
    """y has the dtype of v.

    Attributes:
      q: what is looked up.
      k, v: what is learned.
      rate: theta, at least 0.
      log_keep: log(1 - alpha), at most 0; -inf forgets all, the initial weights too.
      log_momentum: log eta, at most 0; -inf is none.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H K"]
    rate: Float[Array, "B T H"]
    log_keep: Float[Array, "B T H"]
    log_momentum: Float[Array, "B T H"]


class Parameters(NamedTuple):
    """The weights before a document."""

    initial: Weights


@dataclasses.dataclass(frozen=True)
class Options:
    """C, tokens a mini-batch: token p of a document is in its mini-batch p // C."""

    minibatch: int


class State(NamedTuple):
    """Differences from the initial weights, and the surprise; float32, `[B, H, I, O]` per layer of the memory."""

    base: Weights  # where the mini-batch in progress started
    current: Weights
    surprise: Weights


def empty(inputs: Inputs, parameters: Parameters, options: Options) -> State:
    """The state before any token."""
    return nothing(parameters.initial, inputs.k.shape[0])


def nothing(initial: Weights, batch: int) -> State:
    """A memory that has learned nothing."""
    zeros = jax.tree.map(lambda w: jnp.zeros((batch, *w.shape)), initial)
    return State(zeros, zeros, zeros)


def recurrent(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options: Options):
    """The definition, token by token."""
    (initial,) = parameters

    def memory(x, weights):
        for w in weights[:-1]:
            x = jax.nn.silu(jnp.sum(x[..., None] * w, axis=-2))
        return jnp.sum(x[..., None] * weights[-1], axis=-2)

    def step(state, q, k, v, rate, log_keep, log_momentum, position):
        rate, keep, momentum = (x[..., None, None] for x in (rate, jnp.exp(log_keep), jnp.exp(log_momentum)))
        weights = jax.tree.map(jnp.add, initial, state.base)
        gradient = jax.grad(lambda w: jnp.sum(jnp.square(memory(k, w) - v)))(weights)
        surprise = jax.tree.map(lambda s, g: momentum * s - rate * g, state.surprise, gradient)
        current = jax.tree.map(lambda w, d, s: keep * (w + d) + s - w, initial, state.current, surprise)
        y = memory(q, jax.tree.map(jnp.add, initial, current))
        done = position % options.minibatch == options.minibatch - 1
        base = jax.tree.map(lambda c, b: jnp.where(along(done, c), c, b), current, state.base)
        return y, State(base, current, surprise)

    return by_token(step, state, (*inputs, segments.positions), segments, inputs.v.dtype)


def chunked(inputs: Inputs, parameters: Parameters, state: State, segments: Segments, options: Options):
    """The same, mini-batch by mini-batch in matrix products."""
    y, state = grid.scan(functools.partial(learn, parameters.initial), state, inputs, segments, options.minibatch)
    return y.astype(inputs.v.dtype), state


def learn(initial: Weights, state: State, inputs: tuple, phase: grid.Phase):
    """What `minibatch.scan` does to the tokens of a phase: y, and the state after them.

    Args:
      initial: the weights before a document.
      state: before them.
      inputs: those of the family, float32.
      phase: which tokens, and of which mini-batches.
    """
    q, k, v, rate, log_keep, log_momentum = inputs
    keep, kept = _products(log_keep, phase)
    momentum, carried = _products(log_momentum, phase)
    # Of every token's weights: the part of the surprise before, and that of each gradient.
    part = einsum("bhtr,bhr->bht", keep, jnp.exp(carried))
    parts = einsum("bhtr,bhrs->bhts", keep, momentum)

    x, inner, slopes = k, [], []
    for first, change in zip(initial, state.base, strict=True):
        inner.append(x)
        z = einsum("bthi,bhio->btho", x, first + change)
        x, slope = jax.nn.silu(z), jax.nn.sigmoid(z)
        slopes.append(slope * (1 + z * (1 - slope)))
    error, errors = 2 * rate[..., None] * (z - v), []
    for layer in reversed(range(len(initial))):
        errors.insert(0, error)
        if layer:
            error = einsum("btho,bhio->bthi", error, initial[layer] + state.base[layer]) * slopes[layer - 1]

    order = jnp.cumsum(phase.counted, axis=1)
    end = (phase.counted & (order == order[:, -1:])).astype(jnp.float32)  # the last token that counts, if any
    kept_end, carried_end, part_end = (einsum("bt,bht->bh", end, x)[..., None, None] for x in (kept, carried, part))
    parts_end, momentum_end = (einsum("bt,bhts->bsh", end, x)[..., None] for x in (parts, momentum))

    x, current, surprise = q, [], []
    for layer, first in enumerate(initial):
        now, before = state.current[layer], state.surprise[layer]
        scores = einsum("bthi,bshi->bhts", x, inner[layer]) * parts
        z = jnp.swapaxes(jnp.exp(kept), 1, 2)[..., None] * einsum("bthi,bhio->btho", x, first + now)
        z += jnp.swapaxes(part, 1, 2)[..., None] * einsum("bthi,bhio->btho", x, before)
        z -= einsum("bhts,bsho->btho", scores, errors[layer])
        x = jax.nn.silu(z)
        write = jnp.exp(kept_end) * now + jnp.expm1(kept_end) * first + part_end * before
        current.append(write - einsum("bshi,bsho->bhio", inner[layer], parts_end * errors[layer]))
        write = jnp.exp(carried_end) * before
        surprise.append(write - einsum("bshi,bsho->bhio", inner[layer], momentum_end * errors[layer]))
    current, surprise = tuple(current), tuple(surprise)
    base = jax.tree.map(lambda c, b: jnp.where(along(phase.complete, c), c, b), current, state.base)
    return z, State(base, current, surprise)


def _products(log, phase: grid.Phase):
    """The products over tokens s+1 to t `[B, H, C, C]`, 0 unless s <= t in one mini-batch; logs of those up to t."""
    log = jnp.moveaxis(jnp.maximum(log, FLOOR), 1, 2)
    pairs = phase.pairs[:, None]
    between = jnp.cumsum(jnp.where(jnp.tril(pairs, -1), log[..., None], 0), axis=-2)
    return jnp.where(pairs, jnp.exp(between), 0), einsum("bhts,bhs->bht", pairs.astype(jnp.float32), log)


TITANS = Recurrence(
    "titans", Inputs, empty, recurrent, chunked, transition=None, parameters=Parameters, options=Options
)
