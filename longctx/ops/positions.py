"""Positions in attention: rotary frequencies and their extensions, and biases by distance.

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

The schemes share these arguments, and raise a ValueError that names the one that cannot be:

    width    R, even; 0 for NoPE
    base     b, above 1
    factor   s, the length to reach over the trained length; at least 1
    trained  L, at least 2
    length   T, of the document
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longctx.ops.patterns.sparse import hashed
from longctx.ops.rotary import Rotation, angles, rotated, turns
from longctx.typing import checked


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
    known = zip(words, turns(theta), strict=True)
    both = (jnp.where(longer, word.astype(jnp.uint32), short) for word, short in known)
    return rotated(x, angles(positions, *both), 1.0)


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
