"""How far the tokens of a chunk have decayed what came before them, and products of tokens with the decay between them.

With b_i the sum of log decays up to token i, exp(b_i - b_j) is left at i of what was there at j. It is 0 where a
document starts between the two.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.chunks import cut, cut_heads
from longctx.ops.products import einsum, matmul
from longctx.typing import Segments

FLOOR = -128.0  # of log decays: exp is 0 in float32 from -104 on, so that nothing changes below it


class Clock(NamedTuple):
    """How far each token of a chunk has decayed what came before it, to be compared by `decay`.

    A sum of log decays loses its low bits when it grows, and with them the small decays that come after one large. So
    the integers nearest to the log decays, whose sums are exact, are summed apart from the rest, which stays small.

    Attributes:
      whole, rest: sum of log decays from the document's or chunk's start up to the token.
      run: documents begun in the chunk up to the token; 0 continues the state.
    """

    whole: Float[Array, "n B H C K"]
    rest: Float[Array, "n B H C K"]
    run: Int[Array, "n B 1 C 1"]

    def part(self, rows: slice) -> Clock:
        """The clock of some tokens."""
        return Clock(*(leaf[..., rows, :] for leaf in self))

    @property
    def last(self) -> Clock:
        """The clock at the chunk's end."""
        return self.part(slice(-1, None))


BEFORE = Clock(0.0, 0.0, 0)  # the clock right before the chunk


def start_clock(log_decay, segments: Segments, chunk: int, floor: float = FLOOR) -> Clock:
    """The clock of `[B, T, H]` or `[B, T, H, K]` log decays, of which none counts as less than `floor`."""
    log_decay = jnp.maximum(log_decay.astype(jnp.float32), floor)
    log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    log_decay = jnp.where((segments.valid & ~segments.starts)[..., None, None], log_decay, 0)
    run = jnp.cumsum(cut(segments.starts, chunk), axis=-1, dtype=jnp.int32)[:, :, None]
    counted = jnp.tril(run[..., :, None] == run[..., None, :]).astype(jnp.float32)
    whole = jax.lax.stop_gradient(jnp.round(log_decay))
    whole, rest = cut_heads(whole, chunk), cut_heads(log_decay - whole, chunk)
    counted = jnp.broadcast_to(counted, (*rest.shape[:-1], chunk))
    return Clock(matmul(counted, whole), matmul(counted, rest), run[..., None])


def decay(now: Clock, since: Clock) -> Float[Array, ...]:
    """What is left at `now` of what was there at `since`; exactly 0 across a document start."""
    return jnp.exp(elapsed(now, since))


def elapsed(now: Clock, since: Clock) -> Float[Array, ...]:
    """The log of `decay`: -inf across a document start."""
    log = (now.whole - since.whole) + (now.rest - since.rest)
    return jnp.where(now.run == since.run, log, -jnp.inf)


def scores(x: Float[Array, "n B G C K"], k: Float[Array, "n B G C K"], clock: Clock) -> Float[Array, "n B H C C"]:
    """sum_k x_ik k_jk exp(b_ik - b_jk) for j <= i in one document, 0 elsewhere.

    With a decay per head the exponential leaves the sum, which is one for the heads that share x and k. With a decay
    per channel the chunk is halved until eight tokens are left, which meet pair by pair: at each halving, queries in
    the second half meet keys in the first, and the decay between them is that up to the middle times that after it,
    neither above 1.
    """
    size = x.shape[-2]
    if clock.whole.shape[-1] == 1:
        row = Clock(*(jnp.swapaxes(leaf, -1, -2) for leaf in clock))
        log = (clock.whole - row.whole) + (clock.rest - row.rest)
        visible = jnp.tril(clock.run == row.run)
        products = jnp.repeat(einsum("...ck,...dk->...cd", x, k), log.shape[-3] // x.shape[-3], axis=-3)
        return products * jnp.exp(jnp.where(visible, log, -jnp.inf))
    if size <= 8:
        now, since = (Clock(*(jnp.expand_dims(leaf, axis) for leaf in clock)) for axis in (-2, -3))
        visible = jnp.tril(jnp.ones((size, size), bool))[..., None]
        left = jnp.exp(jnp.where(visible, elapsed(now, since), -jnp.inf))
        return jnp.sum(x[..., :, None, :] * k[..., None, :, :] * left, axis=-1)
    halves = jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:-2], 2, size // 2, leaf.shape[-1]), (x, k, clock))
    near = scores(*halves)
    _, k, first = jax.tree.map(lambda leaf: leaf[..., 0, :, :], halves)
    x, _, second = jax.tree.map(lambda leaf: leaf[..., 1, :, :], halves)
    far = einsum("...ck,...dk->...cd", x * decay(second, first.last), k * decay(first.last, first))
    return jnp.block([[near[..., 0, :, :], jnp.zeros_like(far)], [far, near[..., 1, :, :]]])
