"""Exact rotation of queries and keys by their positions.

Channels j and j + R/2 of a query or key at position p rotate by the angle p θ_j (Su et al., "RoFormer",
arXiv:2104.09864, equation 15); `ops/positions.py` has the θ_j.

Angles are exact at every position. A product p θ in float32 is off by up to 0.8 at p = 10^7; so θ / 2π is kept as
a 64-bit fraction of a turn, and p times it in integers that wrap around: whole turns drop out before anything is
rounded. All that does not depend on arrays is NumPy's float64, known while tracing.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from longctx.ops.backend import once
from longctx.typing import checked


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """How fast each pair of channels rotates: a constant of the traced program, so no pytree, and equal only to itself.

    Attributes:
      frequencies: `[R/2]` float64, radians a token. None of them (R = 0) is NoPE.
      magnitude: multiplies the channels that rotate.
    """

    frequencies: Float[np.ndarray, " R/2"]
    magnitude: float = 1.0

    @property
    def width(self) -> int:
        """R, the channels that rotate: the first of each head. The others pass (partial rotary)."""
        return 2 * len(self.frequencies)


@checked
def rotate(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], rotation: Rotation) -> Float[Array, "B T H K"]:
    """`x` rotated by its positions.

    Rotations add up: by p and then by q is by p + q, and -p undoes p. To move cached keys, rotate them
    by the difference of positions with magnitude 1, since they have theirs already.

    Args:
      x: queries or keys in any dtype; computed in float32.
      positions: whole numbers in the range of int32, negative ones included.
      rotation: of the first R <= K channels of each head.

    Returns:
      `[B, T, H, K]` in the dtype of `x`. The cosines and sines are within 1e-6 of the true ones at every position.

    Raises:
      ValueError: heads narrower than the rotation.
    """
    if rotation.width > x.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} channels a head, the rotation has {rotation.width}; give it fewer.")
    return rotated(x, angles(positions, *turns(rotation.frequencies)), rotation.magnitude)


def rotated(x: Float[Array, "B T H K"], angle: Float[Array, "B T R/2"], magnitude: float) -> Float[Array, "B T H K"]:
    """The first R channels of `x` rotated by angles, and multiplied by a magnitude."""
    # Computed once: else every head computes the cosines again, in most of the time of the whole rotation.
    cos, sin = (magnitude * once(part)[:, :, None] for part in (jnp.cos(angle), jnp.sin(angle)))
    rotated, passed = jnp.split(x, [2 * angle.shape[-1]], axis=-1)
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), passed], axis=-1)


def angles(
    positions: Int[Array, "B T"], high: UInt[Array, "... R/2"], low: UInt[Array, "... R/2"]
) -> Float[Array, "B T R/2"]:
    """p θ less its whole turns, in [-π, π]: the upper half of the product of two 64-bit integers, modulo 2^64.

    `high` and `low` are θ / 2π as `turns` gives it.
    """
    signed = positions.astype(jnp.int32)[..., None]
    position = jax.lax.bitcast_convert_type(signed, jnp.uint32)
    sign = jax.lax.bitcast_convert_type(signed >> 31, jnp.uint32)  # the position's upper 32 bits: all 0, or all 1
    turn = _upper_product(position, low) + position * high + sign * low
    turn = jax.lax.bitcast_convert_type(turn, jnp.int32)  # in units of 2^-32: from [0, 1) to [-1/2, 1/2)
    return turn.astype(jnp.float32) * np.float32(2 * math.pi / 2**32)


def turns(frequencies: Float[np.ndarray, " R/2"]) -> tuple[UInt[np.ndarray, " R/2"], UInt[np.ndarray, " R/2"]]:
    """θ / 2π modulo 1 in units of 2^-64: its upper and its lower 32 bits."""
    units = Fraction(0x28BE60DB9391054A7F09D5F47D4D3770, 2**64)  # a radian: 2^64 / 2π, to 64 bits after the point
    turns = np.array([round(Fraction(frequency) * units) % 2**64 for frequency in frequencies.tolist()], np.uint64)
    return (turns >> 32).astype(np.uint32), turns.astype(np.uint32)


def _upper_product(a: UInt[Array, "..."], b: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """The upper 32 bits of the 64-bit product of 32-bit integers, by halves of 16 bits. No sum of it overflows."""
    a_upper, a_lower = a >> 16, a & 0xFFFF
    b_upper, b_lower = b >> 16, b & 0xFFFF
    middle = a_upper * b_lower + (a_lower * b_lower >> 16)
    carried = a_lower * b_upper + (middle & 0xFFFF)
    return a_upper * b_upper + (middle >> 16) + (carried >> 16)
