"""Positions in attention: rotary frequencies and their extensions, exact rotation, and biases by distance.

RoPE rotates channels j and j + R/2 of a query or key at position p by the angle p θ_j,

    θ_j = b^(-2j/R),   j = 0, 1, ..., R/2 - 1        Su et al., "RoFormer", arXiv:2104.09864, equation 15

so that the product of a query and a key depends on the distance between them, not on their positions. A model trained
on L tokens is extended to s L by other frequencies, and by a magnitude of queries and keys:

linear             θ_j / s                                       Chen et al., arXiv:2306.15595 (PI)
ntk                θ_j s^(-2j/(R-2)), RoPE with b s^(R/(R-2))    Peng et al., arXiv:2309.00071 (YaRN), definition 1
dynamic_ntk        ntk with 1 + s (T/L - 1) at a length T > L    the same
ntk_by_parts       θ_j (g_j + (1 - g_j) / s)                     the same, definition 2
yarn               the same, and magnitude 1 + 0.1 ln s          the same, definition 3
llama3             ntk_by_parts with another g_j                 Llama Team, arXiv:2407.21783, and its code for 3.1
longrope           θ_j / λ_j, and magnitude √(1 + ln s / ln L)   Ding et al., arXiv:2402.13753
giraffe_power      θ_j (1 - 2j/R)^k                              Pal et al., arXiv:2308.10882
giraffe_truncated  θ_j, ρ or 0, from the fastest to the slowest  the same

The weight g_j is 1 for pairs that make many turns in the trained length, 0 for those that make no whole one.

Angles are exact at every position. A product p θ in float32 is off by up to 0.8 at p = 10^7; so θ / 2π is kept as
a 64-bit fraction of a turn, and p times it in integers that wrap around: whole turns drop out before anything is
rounded. All that does not depend on arrays is NumPy's float64, known while tracing.

The schemes share these arguments, and raise a ValueError that names the one that cannot be:

    width    R, even; 0 for NoPE
    base     b, above 1
    factor   s, the length to reach over the trained length; at least 1
    trained  L, at least 2
    length   T, of the document
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from longctx.ops.backend import once
from longctx.ops.patterns.sparse import hashed
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
    return _rotated(x, _angles(positions, *_turns(rotation.frequencies)), rotation.magnitude)


@checked
def rotate_dynamic_ntk(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"],
    width: int,
    base: float,
    factor: float,
    trained: int,
) -> Float[Array, "B T H K"]:
    """`x` rotated as `dynamic_ntk` says, where the length T is an array.

    Up to the trained length this is `rotate` by RoPE. Beyond, frequencies are within 1e-6 of their value, all of a
    document alike: the angle between two of its tokens depends on their distance alone, at every position.

    Args:
      x, positions: as of `rotate`.
      lengths: T for each token, that of its document.
      width, base, factor, trained: as of `dynamic_ntk`.
    """
    theta = dynamic_ntk(width, base, factor, trained, trained).frequencies
    growth = 1 + factor * jnp.maximum(lengths - trained, 0).astype(jnp.float32) / trained
    power = np.asarray(np.arange(width // 2) / max(width // 2 - 1, 1), np.float32)
    turn = np.float32(1 / (2 * math.pi)) * theta.astype(np.float32) * jnp.exp(-power * jnp.log(growth)[..., None])
    upper = jnp.floor(turn * 2.0**32)  # turns in units of 2^-64, as two words; scaling by powers of 2 is exact
    words = upper, (turn * 2.0**32 - upper) * 2.0**32
    longer = (lengths > trained)[..., None]
    turns = (
        jnp.where(longer, word.astype(jnp.uint32), known) for word, known in zip(words, _turns(theta), strict=True)
    )
    return _rotated(x, _angles(positions, *turns), 1.0)


def _rotated(x: Float[Array, "B T H K"], angle: Float[Array, "B T R/2"], magnitude: float) -> Float[Array, "B T H K"]:
    """The first R channels of `x` rotated by angles, and multiplied by a magnitude."""
    # Computed once: else every head computes the cosines again, in most of the time of the whole rotation.
    cos, sin = (magnitude * once(part)[:, :, None] for part in (jnp.cos(angle), jnp.sin(angle)))
    rotated, passed = jnp.split(x, [2 * angle.shape[-1]], axis=-1)
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), passed], axis=-1)


def _angles(
    positions: Int[Array, "B T"], high: UInt[Array, "... R/2"], low: UInt[Array, "... R/2"]
) -> Float[Array, "B T R/2"]:
    """p θ less its whole turns, in [-π, π]: the upper half of the product of two 64-bit integers, modulo 2^64.

    `high` and `low` are θ / 2π as `_turns` gives it.
    """
    signed = positions.astype(jnp.int32)[..., None]
    position = jax.lax.bitcast_convert_type(signed, jnp.uint32)
    sign = jax.lax.bitcast_convert_type(signed >> 31, jnp.uint32)  # the position's upper 32 bits: all 0, or all 1
    turn = _upper_product(position, low) + position * high + sign * low
    turn = jax.lax.bitcast_convert_type(turn, jnp.int32)  # in units of 2^-32: from [0, 1) to [-1/2, 1/2)
    return turn.astype(jnp.float32) * np.float32(2 * math.pi / 2**32)


def _turns(frequencies: Float[np.ndarray, " R/2"]) -> tuple[UInt[np.ndarray, " R/2"], UInt[np.ndarray, " R/2"]]:
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


def rope(width: int, base: float) -> Rotation:
    """θ_j = b^(-2j/R)."""
    _expect("width", width, "an even number of channels, or 0 for none", width >= 0 and width % 2 == 0)
    _expect("base", base, "a number above 1", 1 < base < math.inf)
    return Rotation(float(base) ** -(np.arange(0, width, 2) / width))


def linear(width: int, base: float, factor: float) -> Rotation:
    """Position interpolation: θ_j / s, so that the positions of s L tokens fill the range of L."""
    _expect_factor(factor)
    return Rotation(rope(width, base).frequencies / factor)


def ntk(width: int, base: float, factor: float) -> Rotation:
    """A larger base ("NTK-aware"): the fastest pair stays and the slowest is slowed by s, others by powers of s."""
    _expect_factor(factor)
    theta = rope(width, base).frequencies
    # RoPE with base b s^(R/(R-2)), written so that a single pair, fastest and slowest at once, stays.
    return Rotation(theta * factor ** -(np.arange(width // 2) / max(width // 2 - 1, 1)))


def dynamic_ntk(width: int, base: float, factor: float, trained: int, length: int) -> Rotation:
    """RoPE up to the trained length, beyond it `ntk` with the factor 1 + s (T/L - 1).

    With s = 1 that is T/L, as in the paper; transformers has the s.
    """
    _expect_factor(factor)
    _expect_trained(trained)
    return ntk(width, base, 1 + factor * max(length / trained - 1, 0))


def ntk_by_parts(
    width: int, base: float, factor: float, trained: int, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> Rotation:
    """Fast pairs stay, slow ones are slowed by s, those between them by a mean with weights linear in their turns.

    Args:
      beta_fast: a pair that makes so many turns in the trained length, or more, stays.
      beta_slow: a pair that makes so many turns, or fewer, is slowed by s.
    """
    _expect_factor(factor)
    _expect_trained(trained)
    _expect_bounds(beta_fast, beta_slow)
    theta = rope(width, base).frequencies
    turns = trained * theta / (2 * math.pi)
    return Rotation(_slowed(theta, factor, np.clip((turns - beta_slow) / (beta_fast - beta_slow), 0, 1)))


def yarn(
    width: int,
    base: float,
    factor: float,
    trained: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    magnitude: float | None = None,
) -> Rotation:
    """`ntk_by_parts` with a magnitude, as in the released models: the weights are linear in j, not in the turns.

    Args:
      beta_fast: the weights begin to fall at the pair that makes so many turns in the trained length,
      beta_slow: and reach 0 at the one that makes so many.
      truncate: those two are pairs that exist, the next ones outward, not fractions between them.
      magnitude: of queries and keys; None for `yarn_magnitude(factor)`. A model with `mscale` and `mscale_all_dim` has
        `yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)`.
    """
    _expect_factor(factor)
    _expect_trained(trained)
    _expect_bounds(beta_fast, beta_slow)
    theta = rope(width, base).frequencies
    first, last = (
        width * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (beta_fast, beta_slow)
    )
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)  # as in the released code, not R/2 - 1
    fallen = np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0, 1)
    return Rotation(_slowed(theta, factor, 1 - fallen), yarn_magnitude(factor) if magnitude is None else magnitude)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln s + 1: its square is the inverse temperature that YaRN gives to attention."""
    _expect_factor(factor)
    return 0.1 * mscale * math.log(factor) + 1


def llama3(
    width: int,
    base: float,
    factor: float,
    trained: int,
    low_frequency_factor: float = 1.0,
    high_frequency_factor: float = 4.0,
) -> Rotation:
    """Llama 3.1's `ntk_by_parts`: the factors are its `beta_slow` and `beta_fast`."""
    return ntk_by_parts(width, base, factor, trained, high_frequency_factor, low_frequency_factor)


def longrope(
    width: int,
    base: float,
    factor: float,
    trained: int,
    length: int,
    short: Sequence[float],
    long: Sequence[float],
    magnitude: float | None = None,
) -> Rotation:
    """Every pair slowed by a factor λ_j of its own, which the paper finds by a search.

    Args:
      short: λ at lengths up to the trained one, R/2 positive numbers.
      long: λ beyond it.
      magnitude: of queries and keys, the same at every length; None for √(1 + ln s / ln L).
    """
    _expect_factor(factor)
    _expect_trained(trained)
    theta = rope(width, base).frequencies
    for name, factors in (("short", short), ("long", long)):
        fits = len(factors) == len(theta) and all(0 < one < math.inf for one in factors)
        _expect(name, f"{len(factors)} numbers", f"{len(theta)} positive ones, half the width", fits)
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(trained))
    return Rotation(theta / np.asarray(long if length > trained else short, np.float64), magnitude)


def giraffe_power(width: int, base: float, power: float) -> Rotation:
    """θ_j (1 - 2j/R)^k, k = `power` at least 0: the slower a pair, the more it is slowed."""
    _expect("power", power, "a number of at least 0", 0 <= power < math.inf)
    return Rotation(rope(width, base).frequencies * (1 - np.arange(0, width, 2) / width) ** power)


def giraffe_truncated(width: int, base: float, low: float, high: float, rho: float) -> Rotation:
    """Fast pairs stay and slow ones stand still, so that training sees every angle there is.

    Args:
      low: pairs of at most this frequency have frequency 0; in radians a token, as `high` and `rho`.
      high: pairs of at least this frequency keep it.
      rho: the frequency of those between.
    """
    _expect("low", low, "at least 0", low >= 0)
    _expect("high", high, f"above low, {low}", high > low)
    _expect("rho", rho, "a number of at least 0", 0 <= rho < math.inf)
    theta = rope(width, base).frequencies
    return Rotation(np.where(theta >= high, theta, np.where(theta > low, rho, 0.0)))


def _slowed(theta: np.ndarray, factor: float, weight: np.ndarray) -> np.ndarray:
    """The mean of θ and θ / s, the former with the given weight."""
    return theta * (weight + (1 - weight) / factor)


def alibi_slopes(heads: int) -> Float[np.ndarray, " H"]:
    """ALiBi's slopes: a logit gets -slope times the distance of query and key. Press et al., arXiv:2108.12409.

    2^(-8i/n), i = 1, ..., n, for n heads if n is a power of 2. Else those of the next lower power, and then the first,
    third, ... of the next higher one.

    Raises:
      ValueError: no heads.
    """
    _expect("heads", heads, "at least 1", heads >= 1)
    power = 2 ** math.floor(math.log2(heads))
    steps = np.concatenate([np.arange(1, power + 1), np.arange(0.5, heads - power)])
    return np.exp2(-8 * steps / power)


def t5_buckets(
    distance: Int[Array, "..."], buckets: int = 32, max_distance: int = 128, causal: bool = True
) -> Int[Array, "..."]:
    """T5's buckets of distances, each of which has a bias per head. Raffel et al., arXiv:1910.10683, section 2.1.

    Half of the buckets are for one distance each: 0, 1, ... The others grow geometrically, and the last has no end.

    Args:
      distance: position of the query less that of the key.
      buckets: their number; where attention is not causal, half of it for each direction, keys after the query last.
      max_distance: where the last bucket would end, did it grow as the others.
      causal: a negative distance counts as 0.

    Returns:
      int32 below `buckets`, in the shape of `distance`.

    Raises:
      ValueError: fewer than two buckets a direction, or no distances for the geometric half of them.
    """
    side = buckets if causal else buckets // 2
    single = side // 2
    _expect("buckets", buckets, "at least 2 for each direction", side >= 2)
    _expect("max_distance", max_distance, f"more than the {single} single distances", max_distance > single)
    geometric = single * (max_distance / single) ** (np.arange(1, side - single) / (side - single))
    # Where the buckets after the first begin. Rounded first: what is a whole number must not come out a little above.
    edges = np.concatenate([np.arange(1, single + 1), np.ceil(np.round(geometric, 9))]).astype(np.int32)
    if causal:
        return jnp.searchsorted(edges, distance, side="right", method="compare_all")
    bucket = jnp.searchsorted(edges, jnp.abs(distance), side="right", method="compare_all")
    return bucket + jnp.where(distance < 0, side, 0)


def xpos_scales(width: int) -> Float[np.ndarray, " R/2"]:
    """xPos's decays ζ_j = (2j/R + γ) / (1 + γ), γ = 0.4. Sun et al., arXiv:2212.10554.

    Queries are multiplied by ζ^(p/512) and keys by ζ^(-p/512), so that their product decays with the distance.

    Raises:
      ValueError: an odd width.
    """
    _expect("width", width, "an even number of channels", width >= 0 and width % 2 == 0)
    return (np.arange(0, width, 2) / width + 0.4) / 1.4


def stratified(positions: Int[Array, "..."], stride: int | Int[Array, "..."], seed: int = 0) -> Int[Array, "..."]:
    """Positions p in order with gaps drawn at random: p `stride` + a hash of p and `seed`, from 0 to `stride` - 1."""
    return positions * stride + hashed(positions, seed) % stride


def _expect(name: str, value, wanted: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; expected {wanted}.")


def _expect_factor(factor: float) -> None:
    _expect("factor", factor, "the length to reach over the trained length, at least 1", 1 <= factor < math.inf)


def _expect_trained(trained: int) -> None:
    _expect("trained", trained, "the number of tokens in the trained length, at least 2", 2 <= trained < math.inf)


def _expect_bounds(fast: float, slow: float) -> None:
    _expect("the pair of bounds (fast, slow)", (fast, slow), "fast > slow > 0, in turns", math.inf > fast > slow > 0)
