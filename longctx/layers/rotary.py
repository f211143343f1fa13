"""Rotary positions (Su et al., 2021): pairs of channels turned by an angle proportional to the position.

Channels j and j + K/2 form a pair with frequency θ_j = base^(-2j/K). Angles are float32 whatever the
activations are: bfloat16 cannot tell positions above 256 apart.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], base: float) -> Float[Array, "B T H K"]:
    """`x` turned by its positions.

    Args:
      x: `[B, T, H, K]` queries or keys; K is even.
      positions: `[B, T]` integers, within the document.
      base: of the frequencies.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    # Products with the identity, which XLA:CPU does not fuse: else every head takes the cosines of its own, in most of
    # the time of the whole rotation.
    cos, sin = (jnp.matmul(part, jnp.eye(half), precision="highest") for part in (jnp.cos(angle), jnp.sin(angle)))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
