r"""Entmax: attention whose weights are exactly 0 for all keys but those that score near the best.

For query t with logits z_s = scale q_t . k_s of the visible keys s, per head, alpha = 1.5 or 2 (sparsemax),

    p_s = max((alpha - 1) z_s - tau, 0)^m,    m = 1 / (alpha - 1),    tau such that sum_s p_s = 1
    out_t = sum_s p_s v_s

the distribution that maximises p . z plus its Tsallis entropy of order alpha; alpha -> 1 is softmax. The gradient of
a row, with s_j = p_j^(2 - alpha) where p_j > 0 and 0 elsewhere, is

    dz = s (dp - sum_j s_j dp_j / sum_j s_j)

Definition: tau from the sorted logits. If the best n of x = (alpha - 1) z are those above it, and M is their mean and
D the sum of their squared distances from it, then tau = M - 1/n for alpha = 2, M - sqrt((1 - D) / n) for 1.5.

Block form. tau lies between max x - 1 and max x, where |y|_m = (sum_s y_s^m)^(1/m), y_s = max(x_s - tau, 0), passes 1.
That is convex in tau, so that Newton's steps from the left end,

    tau <- tau + (|y|_m - 1) |y|_m^(m-1) / sum_s y_s^(m-1)

never pass the root. A step is a sweep over the blocks of keys, which makes their logits anew; so is finding the
maximum, and so is the output. Until |y|_m is 1 to within 1e-6, a block of queries takes 1 to 8 steps for alpha = 1.5
and 1 to 13 for 2 (rows of 10^5 logits of many distributions): up to 11 and 16 matrix products for each pair of blocks,
where softmax has two, and seven more backwards, where it has five. Memory grows linearly with T.

There is no partial result over a part of the keys that would merge with others: tau is known once all keys are.

References: Peters et al., "Sparse Sequence-to-Sequence Models", 2019 (arXiv:1905.05702); Correia et al., "Adaptively
Sparse Transformers", 2019 (arXiv:1909.00015); Martins and Astudillo, "From Softmax to Sparsemax", 2016
(arXiv:1602.02068).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.numpy import float32 as f32
from jaxtyping import Array, Float

from longctx.ops.patterns import Pattern
from longctx.typing import Segments, checked

_NEAR = 1e-6  # of |y|_m to 1
_MOST = 64  # steps, which no distribution of logits was seen to need
_SHORT = 1 - 2.0**-20  # of a step: rounding, which is less than the rest of it, does not carry it past the root


@checked
def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    pattern: Pattern,
    segments: Segments,
    held: Segments,
    *,
    alpha: float = 1.5,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """The definition. Holds all logits.

    Args:
      q: queries; head h reads the keys and values of group h // (H // G).
      k, v: keys and values.
      pattern: which keys of its document a query may see, each of them once.
      segments: of the queries.
      held: of the keys; the same document has the same id in both.
      alpha: 1.5 or 2.
      scale: of the logits; None for 1 / sqrt(K).

    Returns:
      `[B, T, H, V]` in v's dtype; 0 for padding and for queries that see no key.

    Raises:
      ValueError: another alpha, or a pattern that shows a key more than once.
    """
    _check(pattern, alpha)
    k, v32 = (x.astype(f32).repeat(q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    seen = (segments.ids[:, :, None] == held.ids[:, None, :]) & segments.valid[:, :, None]
    seen &= pattern.mask(segments.positions[:, :, None], held.positions[:, None, :])
    seen = seen[:, None]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    x = (alpha - 1) * jnp.einsum("bthk,bshk->bhts", scale * q.astype(f32), k, precision="highest")
    best = jax.lax.stop_gradient(jnp.where(seen, x, -jnp.inf).max(-1, keepdims=True))
    # Counted from the best, tau is at least -1, so that keys below it change nothing.
    x = jnp.where(seen, jnp.maximum(x - jnp.where(jnp.isneginf(best), 0.0, best), -1.0), -1.0)
    order = -jnp.sort(-jax.lax.stop_gradient(x), axis=-1)
    count = jnp.arange(1, x.shape[-1] + 1)
    mean = jnp.cumsum(order, -1) / count
    spread = jnp.cumsum(order**2, -1) - count * mean**2
    tau = jnp.maximum(_threshold(alpha, count, mean, jnp.minimum(spread, 1.0)), -1.0)
    size = (order > tau).sum(-1, keepdims=True)
    tau = jnp.take_along_axis(tau, jnp.maximum(size - 1, 0), axis=-1)
    # Once more for those keys, which has a gradient, and whose D is of no large numbers.
    chosen = seen & (x > tau)
    count = jnp.maximum(chosen.sum(-1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(chosen, x, 0.0), -1, keepdims=True) / count
    spread = jnp.sum(jnp.where(chosen, x - mean, 0.0) ** 2, -1, keepdims=True)
    y = jnp.where(chosen, x - _threshold(alpha, count, mean, spread), 0.0)
    weights = jnp.maximum(y, 0.0) ** round(1 / (alpha - 1))
    return jnp.einsum("bhts,bshv->bthv", weights, v32, precision="highest").astype(v.dtype)


def _threshold(alpha, count, mean, spread):
    return mean - (1 / count if alpha == 2 else jnp.sqrt((1 - spread) / count))


@checked
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    pattern: Pattern,
    segments: Segments,
    held: Segments,
    *,
    alpha: float = 1.5,
    scale: float | None = None,
    chunk: int = 128,
) -> Float[Array, "B T H V"]:
    """The same as `recurrent`, by blocks of `chunk` queries and keys. First derivatives only."""
    _check(pattern, alpha)
    groups, scale = k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    tokens = tuple(tuple(_blocks(x, chunk) for x in (side.ids, side.positions)) for side in (segments, held))
    q, *keys = (_split(x, groups, chunk) for x in ((q * scale).astype(q.dtype), k, v))
    out = _attend(pattern, alpha, q, *(x[:, :, :, 0] for x in keys), tokens)  # [blocks, B, G, R, C, V]
    out = jnp.moveaxis(out, (0, 4), (1, 2))
    return out.reshape(len(v), -1, groups * out.shape[4], v.shape[-1])[:, : segments.ids.shape[1]]


def _check(pattern: Pattern, alpha: float):
    if alpha not in (1.5, 2):
        raise ValueError(f"alpha is {alpha}; entmax is here for 1.5 and for 2 (sparsemax).")
    if len(pattern.summands) > 1:
        raise ValueError(f"{pattern} shows a key more than once, and entmax counts keys once; join patterns by |.")


def _blocks(x, size):
    """`[blocks, B, C, ...]`, filled up with zeros."""
    size = min(size, x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _split(x, groups, size):
    """`[blocks, B, G, R, C, W]`."""
    x = _blocks(x, size)
    return jnp.moveaxis(x.reshape(*x.shape[:3], groups, -1, x.shape[-1]), 2, 4)


def _mask(pattern: Pattern, tokens, i, j):
    """Which keys of block j the queries of block i may see, `[B, queries, keys]`."""
    ids, positions = (x[i] for x in tokens[0])
    k_ids, k_positions = (x[j] for x in tokens[1])
    document = (ids[:, :, None] == k_ids[:, None, :]) & (ids[:, :, None] > 0)
    return document & pattern.mask(positions[:, :, None], k_positions[:, None, :])


def _touched(pattern: Pattern, tokens, i):
    """The blocks of keys, first those in which a query of block i sees any, and the number of these."""
    blocks = jnp.arange(len(tokens[1][0]))
    touched = jax.lax.map(lambda j: _mask(pattern, tokens, i, j).any(), blocks)
    return jnp.argsort(~touched, stable=True), touched.sum()


def _scores(pattern: Pattern, alpha, q, k, tokens, i, j):
    """x of a pair of blocks, float32 `[B, G, R, queries, keys]`; -inf where the query may not see the key."""
    x = (alpha - 1) * _einsum("bgrik,bgjk->bgrij", q[i], k[j])
    return jnp.where(_mask(pattern, tokens, i, j)[:, None, None], x, -jnp.inf)


_einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=f32)


def _weights(alpha, y):
    """p and its slope s, where y is x less tau."""
    y = jnp.maximum(y, 0.0)
    return (y, (y > 0).astype(f32)) if alpha == 2 else (y * y, y)


def _sweep(touched, step, carry):
    """Runs `step(carry, j)` over the touched blocks of keys."""
    order, count = touched
    return jax.lax.fori_loop(0, count, lambda n, carry: step(carry, order[n]), carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(pattern: Pattern, alpha, q, k, v, tokens):
    return _forward(pattern, alpha, q, k, v, tokens)[0]


def _forward(pattern: Pattern, alpha, q, k, v, tokens):
    shape = q.shape[1:-1]

    def rows(i):
        touched = _touched(pattern, tokens, i)

        def scores(j):
            return _scores(pattern, alpha, q, k, tokens, i, j)

        best = _sweep(touched, lambda best, j: jnp.maximum(best, scores(j).max(-1)), jnp.full(shape, -jnp.inf, f32))
        best = jnp.where(jnp.isneginf(best), 0.0, best)

        def newton(carry):
            tau, _, steps = carry  # counted from the best

            def add(sums, j):
                parts = _weights(alpha, scores(j) - best[..., None] - tau[..., None])
                return jax.tree.map(lambda total, part: total + part.sum(-1), sums, parts)

            total, slope = _sweep(touched, add, (jnp.zeros(shape, f32), jnp.zeros(shape, f32)))
            norm = total ** (alpha - 1)
            step = (norm - 1) * total / jnp.where(slope > 0, norm * slope, 1.0)
            moved = jnp.where(slope > 0, jnp.maximum(tau, tau + _SHORT * step), tau)
            return moved, ((norm > 1 + _NEAR) & (moved > tau)).any(), steps + 1

        start = jnp.full(shape, -1.0, f32), True, 0
        tau, *_ = jax.lax.while_loop(lambda carry: carry[1] & (carry[2] < _MOST), newton, start)

        def read(out, j):
            weights, _ = _weights(alpha, scores(j) - best[..., None] - tau[..., None])
            return out + _einsum("bgrij,bgjv->bgriv", weights.astype(v.dtype), v[j])

        out = _sweep(touched, read, jnp.zeros((*shape, v.shape[-1]), f32))
        return out.astype(v.dtype), (best, tau)

    out, threshold = jax.lax.map(rows, jnp.arange(len(q)))
    return out, (q, k, v, threshold, tokens)


def _backward(pattern: Pattern, alpha, residuals, d_out):
    q, k, v, (best, tau), tokens = residuals

    def rows(carry, i):
        touched = _touched(pattern, tokens, i)

        def weights(j):
            x = _scores(pattern, alpha, q, k, tokens, i, j)
            d_weights = _einsum("bgriv,bgjv->bgrij", d_out[i], v[j])
            return *_weights(alpha, x - best[i][..., None] - tau[i][..., None]), d_weights

        def add(sums, j):
            _, slopes, d_weights = weights(j)
            return sums[0] + (slopes * d_weights).sum(-1), sums[1] + slopes.sum(-1)

        zeros = jnp.zeros(q.shape[1:-1], f32)
        share, slope = _sweep(touched, add, (zeros, zeros))
        share /= jnp.where(slope > 0, slope, 1.0)

        def step(carry, j):
            dq, dk, dv = carry
            p, slopes, d_weights = weights(j)
            d_logits = (slopes * (d_weights - share[..., None])).astype(q.dtype)
            return (
                dq + _einsum("bgrij,bgjk->bgrik", d_logits, k[j]),
                dk.at[j].add(_einsum("bgrij,bgrik->bgjk", d_logits, q[i])),
                dv.at[j].add(_einsum("bgrij,bgriv->bgjv", p.astype(v.dtype), d_out[i])),
            )

        dq, *carry = _sweep(touched, step, (jnp.zeros(q.shape[1:], f32), *carry))
        return tuple(carry), dq.astype(q.dtype)

    start = jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32)
    (dk, dv), dq = jax.lax.scan(rows, start, jnp.arange(len(q)))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
