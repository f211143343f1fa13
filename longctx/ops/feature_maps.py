"""Feature maps φ of linear attention: φ(q)·φ(k) is a positive kernel, in place of softmax's exp(q·k/√K).

elu        φ(x) = elu(x) + 1                                       Katharopoulos et al., 2020, equation 7
relu2      φ(x) = relu(x)²                                         the activation of So et al., "Primer", 2021
taylor     φ(q)·φ(k) = 1 + s + s²/2,  s = q·k/√K                   Arora et al., "Based", 2024
performer  φ_i(x) = exp(w_i·x' - |x'|²/2) / √F,  x' = x / K^¼      Choromanski et al., 2021, lemma 1
hedgehog   φ(x) = [softmax(W x), softmax(-W x)], W learned         Zhang et al., "The Hedgehog", 2024

All take `[B, T, H, K]` in any dtype and give `[B, T, H, F]` in float32, no entry of which is negative but for taylor's;
taylor's kernel is at least 1/2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from longctx.typing import checked


@checked
def elu(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """x + 1 above 0, exp(x) below; F = K."""
    return jax.nn.elu(x.astype(jnp.float32)) + 1


@checked
def relu2(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """The square of what is above 0; F = K."""
    return jnp.square(jax.nn.relu(x.astype(jnp.float32)))


@checked
def taylor(x: Float[Array, "B T H K"]) -> Float[Array, "B T H F"]:
    """1, x' and the products x'_i x'_j, with x' = x / K^¼; F = (K + 1)(K + 2) / 2.

    The product of a pair stands once for both its orders, that of a channel with itself carries 1/√2.
    """
    width = x.shape[-1]
    x = x.astype(jnp.float32) * width**-0.25
    first, second = np.triu_indices(width)
    weight = np.where(first == second, 0.5**0.5, 1.0).astype(np.float32)
    pairs = x[..., first] * x[..., second] * weight
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs], axis=-1)


@checked
def performer(x: Float[Array, "B T H K"], projection: Float[np.ndarray, "F K"]) -> Float[Array, "B T H F"]:
    """Positive random features (FAVOR+) of the regularised softmax kernel, which is near exp(q·k/√K).

    The exponent is at most |w|²/2 = K/2 for any x. So it needs no maximum over the keys, which would look ahead.

    Args:
      x: queries or keys; K at most 64, so that a kernel of exp(K) can be summed over a document in float32.
      projection: rows w of norm √K, of `orthogonal`.
    """
    features, width = projection.shape
    x = x.astype(jnp.float32) * width**-0.25
    exponent = x @ projection.T - 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.exp(exponent) * features**-0.5


@functools.cache
def orthogonal(features: int, width: int, seed: int) -> Float[np.ndarray, "F K"]:
    """Random directions of norm √K for `performer`, orthogonal within each K of them; the same for the same seed."""
    # The legacy generator: its numbers are the same in every version of numpy.
    blocks = np.random.RandomState(seed).standard_normal((-(-features // width), width, width))
    turns, triangles = np.linalg.qr(blocks)
    # Uniform over all rotations once the signs, which the algorithm chooses, are put back.
    turns *= np.sign(np.diagonal(triangles, axis1=-2, axis2=-1))[:, None]
    return (turns.reshape(-1, width)[:features] * width**0.5).astype(np.float32)


@checked
def hedgehog(x: Float[Array, "B T H K"], weight: Float[Array, "H K K"]) -> Float[Array, "B T H F"]:
    """Softmax over the channels of W x, and another over their negatives; F = 2 K.

    The paper's formula has exponentials, and a bias of W x; this is the authors' stable form, as in their code.
    """
    x = jnp.einsum("bthi,hij->bthj", x.astype(jnp.float32), weight)
    return jnp.concatenate([jax.nn.softmax(x, axis=-1), jax.nn.softmax(-x, axis=-1)], axis=-1)
