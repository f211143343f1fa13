"""Rotary frequencies against their papers' formulas, rotation against rational arithmetic, and biases by distance."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import positions, rotary
from longctx.ops.rotary import Rotation, rotate

WIDTH, BASE, FACTOR, TRAINED = 64, 10_000.0, 8.0, 4096
PAIRS = range(WIDTH // 2)
THETA = [BASE ** (-2 * j / WIDTH) for j in PAIRS]
SHORT = [1 + j / 100 for j in PAIRS]
LONG = [1 + j for j in PAIRS]
PLACES = [0, 1, 255, 256, 257, 10**6, 10**7, 2**31 - 1, -1, -(10**7), -(2**31)]
TAU = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534")


def wavelength(j):
    return 2 * math.pi / THETA[j]


def by_parts(j, slow, fast):
    """Definition 2 of YaRN, case by case."""
    turns = TRAINED / wavelength(j)
    if turns < slow:
        return THETA[j] / FACTOR
    if turns > fast:
        return THETA[j]
    kept = (turns - slow) / (fast - slow)
    return (1 - kept) * THETA[j] / FACTOR + kept * THETA[j]


def yarn(j, truncate):
    """The ramp of the released code between the pairs whose wavelengths are L / 32 and L."""
    low, high = (WIDTH / 2 * math.log(TRAINED / turns / (2 * math.pi), BASE) for turns in (32, 1))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    ramp = min(max((j - low) / (high - low), 0), 1)
    return THETA[j] * (1 - ramp) + THETA[j] / FACTOR * ramp


def ntk(j, factor):
    return (BASE * factor ** (WIDTH / (WIDTH - 2))) ** (-2 * j / WIDTH)


def llama3(j):
    """Llama 3.1's code: by wavelengths between L / 4 and L."""
    if wavelength(j) < TRAINED / 4:
        return THETA[j]
    if wavelength(j) > TRAINED / 1:
        return THETA[j] / FACTOR
    smooth = (TRAINED / wavelength(j) - 1) / (4 - 1)
    return (1 - smooth) * THETA[j] / FACTOR + smooth * THETA[j]


def truncated(j):
    return THETA[j] if THETA[j] >= 0.1 else 0.02 if THETA[j] > 0.01 else 0.0


EXTENDED = (WIDTH, BASE, FACTOR, TRAINED)
# The scheme, the frequency of pair j, and the magnitude.
SCHEMES = {
    "rope": (positions.rope(WIDTH, BASE), lambda j: THETA[j], 1),
    "linear": (positions.linear(WIDTH, BASE, FACTOR), lambda j: THETA[j] / FACTOR, 1),
    "ntk": (positions.ntk(WIDTH, BASE, FACTOR), lambda j: ntk(j, FACTOR), 1),
    "dynamic_ntk": (positions.dynamic_ntk(*EXTENDED, 12288), lambda j: ntk(j, FACTOR * 3 - (FACTOR - 1)), 1),
    "dynamic_ntk, trained length": (positions.dynamic_ntk(*EXTENDED, 4096), lambda j: THETA[j], 1),
    "ntk_by_parts": (positions.ntk_by_parts(*EXTENDED), lambda j: by_parts(j, 1, 32), 1),
    "ntk_by_parts, other bounds": (positions.ntk_by_parts(*EXTENDED, 20, 2), lambda j: by_parts(j, 2, 20), 1),
    "yarn": (positions.yarn(*EXTENDED), lambda j: yarn(j, True), 0.1 * math.log(FACTOR) + 1),
    "yarn, not truncated": (positions.yarn(*EXTENDED, truncate=False), lambda j: yarn(j, False), 1.2079441541679836),
    "yarn, magnitude": (positions.yarn(*EXTENDED, magnitude=1.5), lambda j: yarn(j, True), 1.5),
    "llama3": (positions.llama3(*EXTENDED), llama3, 1),
    "longrope": (positions.longrope(*EXTENDED, 4096, SHORT, LONG), lambda j: THETA[j] / SHORT[j], 1.118033988749895),
    "longrope, long": (positions.longrope(*EXTENDED, 4097, SHORT, LONG), lambda j: THETA[j] / LONG[j], 1.25**0.5),
    "giraffe_power": (positions.giraffe_power(WIDTH, BASE, 0.5), lambda j: THETA[j] * (1 - j / 32) ** 0.5, 1),
    "giraffe_truncated": (positions.giraffe_truncated(WIDTH, BASE, 0.01, 0.1, 0.02), truncated, 1),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_is_the_formula(name):
    """To 1e-12, in float64.

    Seen to fail: j/R for 2j/R; s for 1/s in linear, ntk, and the slowed pairs; T/L the other way round; π for 2π and
    another denominator in ntk_by_parts; yarn's weights a pair later; log2 for ln; 8 for 4 in llama3; longrope's factors
    swapped, or the long ones at the trained length, or its magnitude without the root; rho and 0 swapped.
    """
    rotation, frequency, magnitude = SCHEMES[name]
    assert rotation.frequencies.dtype == np.float64
    assert rotation.width == WIDTH
    np.testing.assert_allclose(rotation.frequencies, [frequency(j) for j in PAIRS], rtol=1e-12)
    np.testing.assert_allclose(rotation.magnitude, magnitude, rtol=1e-12)


@pytest.mark.parametrize(
    "rotation",
    [
        positions.linear(WIDTH, BASE, 1),
        positions.ntk(WIDTH, BASE, 1),
        positions.ntk(2, BASE, 8),
        positions.ntk_by_parts(WIDTH, BASE, 1, TRAINED),
        positions.yarn(WIDTH, BASE, 1, TRAINED),
        positions.yarn(WIDTH, BASE, FACTOR, 10**12, magnitude=1.0),
        positions.llama3(WIDTH, BASE, 1, TRAINED),
        positions.longrope(4, BASE, 1, TRAINED, TRAINED, [1, 1], [2, 2]),
        positions.giraffe_power(WIDTH, BASE, 0),
        positions.giraffe_truncated(WIDTH, BASE, 0, 1e-9, 1),
    ],
)
def test_nothing_to_extend_is_rope(rotation):
    """A factor of 1, a single pair, or a trained length in which all pairs are fast.

    Seen to fail: ntk dividing by the 0 pairs after the first; yarn without the bound on its denominator, which slows
    all pairs where all are fast.
    """
    np.testing.assert_allclose(rotation.frequencies, positions.rope(rotation.width, BASE).frequencies, rtol=1e-12)
    assert rotation.magnitude == 1


@pytest.mark.parametrize("name", ["ntk", "ntk_by_parts", "yarn", "yarn, not truncated", "llama3"])
def test_the_fastest_pair_stays_and_the_slowest_is_interpolated(name):
    """And all pairs stay in order, none slowed by more than s. Seen to fail: yarn's weights reversed; ntk's 2j/R."""
    frequencies = SCHEMES[name][0].frequencies
    assert frequencies[0] == THETA[0]
    np.testing.assert_allclose(frequencies[-1], THETA[-1] / FACTOR, rtol=1e-12)
    slowed = np.asarray(THETA) / frequencies
    assert np.all(np.diff(frequencies) < 0)
    assert np.all(np.diff(slowed) > -1e-9)
    assert np.all((slowed > 1 - 1e-12) & (slowed < FACTOR + 1e-12))


def test_yarn_magnitude():
    """DeepSeek's factor of 40 and mscale of 0.707. Seen to fail: log2 for ln; mscale left out."""
    assert positions.yarn_magnitude(1) == 1
    np.testing.assert_allclose(positions.yarn_magnitude(40, 0.707), 1 + 0.0707 * 3.6888794541139363, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: positions.rope(7, BASE), "width is 7; expected an even"),
        (lambda: positions.rope(8, 1), "base is 1; expected a number above 1"),
        (lambda: positions.rope(8, math.nan), "base is nan"),
        (lambda: positions.linear(8, BASE, 0.5), "factor is 0.5; expected the length to reach"),
        (lambda: positions.ntk(8, BASE, 0), "factor is 0"),
        (lambda: positions.ntk_by_parts(8, BASE, 2, 10, 1, 32), r"\(fast, slow\) is \(1, 32\); expected fast > slow"),
        (lambda: positions.yarn(8, BASE, 2, 10, 32, 0), r"\(fast, slow\) is \(32, 0\)"),
        (lambda: positions.yarn_magnitude(0.9), "factor is 0.9"),
        (lambda: positions.longrope(8, BASE, 2, 10, 10, [1] * 3, [1] * 4), "short is 3 numbers; expected 4 positive"),
        (lambda: positions.longrope(8, BASE, 2, 10, 10, [1] * 4, [1, 1, 1, 0]), "long is 4 numbers; expected 4 pos"),
        (lambda: positions.giraffe_power(8, BASE, -1), "power is -1"),
        (lambda: positions.giraffe_truncated(8, BASE, 0.2, 0.1, 0.1), "high is 0.1; expected above low, 0.2"),
        (lambda: positions.giraffe_truncated(8, BASE, -1, 0.1, 0.1), "low is -1"),
        (lambda: positions.giraffe_truncated(8, BASE, 0, 0.1, -1), "rho is -1"),
        (lambda: positions.alibi_slopes(0), "heads is 0; expected at least 1"),
        (lambda: positions.t5_buckets(np.arange(3), 3, causal=False), "buckets is 3; expected at least 2 for each"),
        (lambda: positions.t5_buckets(np.arange(3), 32, 16), "max_distance is 16; expected more than the 16 single"),
        (lambda: positions.xpos_scales(3), "width is 3"),
        (lambda: turn(np.ones((1, 2, 1, 6)), [0, 1], positions.rope(8, BASE)), "has 6 channels a head, .* has 8"),
        (lambda: rotate(jnp.ones((1, 2, 1, 8)), jnp.ones((1, 2)), positions.rope(8, BASE)), "positions is float32"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make, message):
    """Seen to fail: any one of the checks left out."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "scheme",
    [
        lambda factor, trained: positions.dynamic_ntk(8, BASE, factor, trained, 20),
        lambda factor, trained: positions.ntk_by_parts(8, BASE, factor, trained),
        lambda factor, trained: positions.yarn(8, BASE, factor, trained, magnitude=1.0),
        lambda factor, trained: positions.llama3(8, BASE, factor, trained),
        lambda factor, trained: positions.longrope(8, BASE, factor, trained, 20, [1] * 4, [1] * 4, magnitude=1.0),
    ],
    ids=["dynamic_ntk", "ntk_by_parts", "yarn", "llama3", "longrope"],
)
def test_an_extension_needs_a_longer_length(scheme):
    """Seen to fail: the checks left out of any one scheme."""
    with pytest.raises(ValueError, match=r"factor is 0\.9; expected the length to reach over the trained length"):
        scheme(0.9, 10)
    with pytest.raises(ValueError, match="trained is 1; expected the number of tokens"):
        scheme(2, 1)


def turn(x, places, rotation):
    return rotate(jnp.asarray(x, jnp.float32), jnp.asarray([places], jnp.int32), rotation)


def true_angle(place, frequency):
    """In rational arithmetic, less its whole turns, rounded once."""
    return float(Fraction(place) * Fraction(frequency) % TAU)


@pytest.mark.parametrize("base", [10_000.0, 5e5])
def test_rotation_is_exact_at_every_position(base):
    """Cosines and sines to 1e-6, from 0 to both ends of int32.

    Seen to fail: angles as float32 products; without the lower half of the fraction, or of that half; 1 / 2π to 48
    bits; without the upper half of a negative position.
    """
    rotation = positions.rope(128, base)
    x = np.concatenate([np.ones(64), np.zeros(64)])
    y = turn(np.tile(x, (1, len(PLACES), 1, 1)), PLACES, rotation)[0, :, 0]
    angles = [[true_angle(place, frequency) for frequency in rotation.frequencies.tolist()] for place in PLACES]
    np.testing.assert_allclose(y, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), rtol=0, atol=1e-6)


def test_upper_half_of_a_product():
    """Bit for bit that of Python's integers. Seen to fail: without the carry of the lowest halves, or of the middle."""
    a = np.random.default_rng(2).integers(0, 2**32, 1000, np.uint32)
    a[:4] = 0, 1, 2**16, 2**32 - 1
    for b in (np.uint32(2**32 - 1), np.uint32(2**16 - 1), np.uint32(0xDEADBEEF)):
        wanted = [one * int(b) >> 32 for one in a.tolist()]
        np.testing.assert_array_equal(rotary._upper_product(jnp.asarray(a), b), wanted)


def test_fast_frequencies_wrap_around():
    """More than a turn a token, and backwards. Seen to fail: turns not modulo 2^64, an overflow; turns by float64."""
    rotation = Rotation(np.array([7.0, 1e9, -2.0]))
    y = turn(np.tile([1, 1, 1, 0, 0, 0], (1, 3, 1, 1)), [1, 3, 10**7], rotation)[0, :, 0]
    angles = [[true_angle(place, frequency) for frequency in (7.0, 1e9, -2.0)] for place in (1, 3, 10**7)]
    np.testing.assert_allclose(y, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), rtol=0, atol=1e-6)


X, WEIGHT = np.random.default_rng(0).normal(size=(2, 1, len(PLACES), 3, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("name", SCHEMES)
def test_norms_are_multiplied_by_the_magnitude(name):
    """Seen to fail: the sign of one sine; magnitude left out; magnitude at the cosines only."""
    rotation = SCHEMES[name][0]
    norms = np.linalg.norm(turn(X, PLACES, rotation), axis=-1)
    np.testing.assert_allclose(norms, rotation.magnitude * np.linalg.norm(X, axis=-1), rtol=2e-6)


@pytest.mark.parametrize("start", [1, 10**7, 2**31 - 100, -(10**7)])
def test_products_depend_on_the_distance_only(start):
    """To 2e-6 of the norms, wherever the two stand. Seen to fail: angles as float32 products, at 10^7."""
    rotation = positions.rope(WIDTH, BASE)
    q, k = np.random.default_rng(1).normal(size=(2, 1, 20, 1, WIDTH))
    q, k = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (q, k))
    places = np.arange(20)
    moved, still = (
        jnp.einsum("bqhk,bshk->qs", turn(q, places + at, rotation), turn(k, places + at, rotation)) for at in (start, 0)
    )
    np.testing.assert_allclose(moved, still, rtol=0, atol=2e-6)


def test_rotations_add_up():
    """Keys are moved by a difference of positions, and turned back. Seen to fail: negative positions as uint32 ones."""
    rotation = positions.rope(WIDTH, BASE)
    start, distance = np.array([10**7, 3, 0, 5]), np.array([-(10**7), 2**31 - 9, -7, 0])
    x = X[:, :4]
    moved = turn(turn(x, start, rotation), distance, rotation)
    np.testing.assert_allclose(moved, turn(x, start + distance, rotation), rtol=0, atol=5e-6)
    np.testing.assert_allclose(turn(turn(x, distance, rotation), -distance, rotation), x, rtol=0, atol=5e-6)


@pytest.mark.parametrize("width", [0, 2, 24])
def test_only_the_first_channels_turn(width):
    """As heads of that width, the others bit for bit as they were; NoPE turns none. Seen to fail: the last ones."""
    rotation = Rotation(positions.rope(width, BASE).frequencies, 1.25)
    y = turn(X, PLACES, rotation)
    np.testing.assert_array_equal(y[..., width:], X[..., width:])
    np.testing.assert_array_equal(y[..., :width], turn(X[..., :width], PLACES, rotation))


def test_bfloat16():
    """Rounded once, at the end. Seen to fail: cosines and sines in the dtype of the input; positions in it."""
    rotation, places = SCHEMES["yarn"][0], jnp.asarray([PLACES], jnp.int32)
    x = jnp.asarray(X, jnp.bfloat16)
    y = rotate(x, places, rotation)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, rotate(x.astype(jnp.float32), places, rotation).astype(jnp.bfloat16))


def test_gradient_and_transformations():
    """The gradient is the rotation back; under jit and vmap as without. Seen to fail: stop_gradient on one half."""
    rotation, places = SCHEMES["yarn"][0], jnp.asarray([PLACES[:-1]], jnp.int32)  # -(-2^31) is no int32
    x, weight = jnp.asarray(X[:, :-1]), jnp.asarray(WEIGHT[:, :-1])
    y, pull = jax.vjp(lambda x: rotate(x, places, rotation), x)
    back = rotate(weight, -places, rotation)
    np.testing.assert_allclose(pull(weight)[0], back, rtol=0, atol=2e-6)
    np.testing.assert_allclose(jax.jit(lambda x: rotate(x, places, rotation))(x), y, rtol=0, atol=2e-6)
    both = jax.vmap(lambda x, places: rotate(x, places, rotation))(jnp.stack([x, weight]), jnp.stack([places, -places]))
    np.testing.assert_allclose(both, jnp.stack([y, back]), rtol=0, atol=2e-6)


def test_alibi_slopes():
    """Powers of 2 as in the paper, others by its recipe. Seen to fail: the second, fourth, ... of the next power."""

    def recipe(heads):
        if heads & (heads - 1) == 0:
            return [2 ** (-8 * i / heads) for i in range(1, heads + 1)]
        lower = 2 ** (heads.bit_length() - 1)
        return recipe(lower) + recipe(2 * lower)[0::2][: heads - lower]

    np.testing.assert_allclose(
        positions.alibi_slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    )
    for heads in range(1, 41):
        np.testing.assert_allclose(positions.alibi_slopes(heads), recipe(heads), rtol=1e-12)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 1000), (33, 100), (10, 160), (64, 40)])
@pytest.mark.parametrize("causal", [True, False])
def test_t5_buckets(buckets, max_distance, causal):
    """The logarithm of the paper in whole numbers.

    Seen to fail: edges not rounded (80.00000000000001 at 10 buckets to 160); > for >=; directions swapped.
    """
    side = buckets if causal else buckets // 2
    single = side // 2
    geometric = side - single

    def bucket(distance):
        if distance < 0:
            return 0 if causal else side + bucket(-distance)
        if distance < single:
            return distance
        # The largest k with log(distance / single) / log(max_distance / single) * geometric >= k.
        reached = [
            k for k in range(geometric) if distance**geometric * single**k >= max_distance**k * single**geometric
        ]
        return single + max(reached)

    distance = np.arange(-300, 1200).reshape(30, 50)
    found = positions.t5_buckets(jnp.asarray(distance), buckets, max_distance, causal)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [[bucket(one) for one in row] for row in distance.tolist()])


def test_xpos_scales():
    """Table of the formula at R = 8, where 2j/R is 0, 1/4, 1/2, 3/4. Seen to fail: j/R for 2j/R."""
    np.testing.assert_allclose(positions.xpos_scales(8), [0.4 / 1.4, 0.65 / 1.4, 0.9 / 1.4, 1.15 / 1.4], rtol=1e-12)
