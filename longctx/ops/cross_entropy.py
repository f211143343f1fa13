"""Cross-entropy of a vocabulary, in chunks: the logits of a whole row are never held.

For a token with hidden vector h (width D), target y and unembedding E[V, D]:

    logits  z = E h                                (float32)
    loss    l = log sum_v exp(z_v) - z_y           (nats)
    total     = sum over tokens of weight * l

The row is cut into chunks and a `lax.scan` goes over them; the backward pass computes a chunk's logits again
instead of keeping them. Memory is B * chunk * V floats for the logits, whatever T is; the cost of computing them
twice is 2 * T * D * V operations, one matrix product in four.

A chunk is *not* a contiguous piece of the row. The row is cut into `chunk` equal contiguous pieces, and step j of
the scan takes token j of each piece. Where the row is sharded contiguously over devices, and their number divides
`chunk`, every device then works at every step on tokens that it already holds; chunks of neighbouring tokens would
leave all devices but one idle.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HELD = 2**24  # logits held at once where the caller names no chunk: 64 MiB of float32


class CrossEntropy(NamedTuple):
    """What `cross_entropy` returns.

    Attributes:
      total: the sum of `weights * losses`, float32.
      losses: `[B, T]` float32, -log p(target) in nats, not weighted.
      correct: `[B, T]` bool, true where the target has the largest logit.
    """

    total: Float[Array, ""]
    losses: Float[Array, "B T"]
    correct: Bool[Array, "B T"]


def cross_entropy(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int | None = None,
) -> CrossEntropy:
    """Cross-entropy of `hidden @ unembedding.T` against `targets`.

    Args:
      hidden: any floating dtype. The product is taken in this dtype and accumulated in float32.
      unembedding: one row per vocabulary entry.
      targets: below V; where the weight is 0 any value in range will do.
      weights: weight of each token in `total`.
      chunk: tokens of each row whose logits are held at once; a multiple of the devices that the row is sharded
        over. None holds at most `HELD` logits at once.

    Returns:
      `CrossEntropy`, differentiable with respect to `hidden` and `unembedding`.
    """
    batch, length, _ = hidden.shape
    if chunk is None:
        chunk = max(1, HELD // (batch * unembedding.shape[0]))
    chunk = min(chunk, length)
    steps = -(-length // chunk)
    matrix = unembedding.astype(hidden.dtype)

    def strided(x):  # [B, T, ...] -> [steps, B, chunk, ...], chunk being the sharded part of T
        x = jnp.pad(x, ((0, 0), (0, steps * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, chunk, steps, *x.shape[2:]), 2, 0)

    def whole(x):  # [steps, B, chunk] -> [B, T]
        return jnp.moveaxis(x, 0, 2).reshape(batch, steps * chunk)[:, :length]

    @jax.checkpoint
    def step(total, inputs):
        hidden, targets, weights = inputs
        logits = jnp.einsum("bcd,vd->bcv", hidden, matrix, precision="highest", preferred_element_type=jnp.float32)
        # A comparison with iota, not a gather: it stays local where the vocabulary is sharded.
        here = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
        losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(here, logits, 0), axis=-1)
        correct = jnp.argmax(logits, axis=-1) == targets
        return total + jnp.sum(weights * losses), (losses, correct)

    inputs = strided(hidden), strided(targets), strided(weights.astype(jnp.float32))
    total, (losses, correct) = jax.lax.scan(step, jnp.zeros((), jnp.float32), inputs)
    return CrossEntropy(total, whole(losses), whole(correct))
