"""Entmax: the definition against bisection in float64, and the fast form against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import entmax
from longctx.ops.patterns import Causal, Dilated, Sinks, Window
from longctx.typing import Segments

B, H, G, K, V = 2, 4, 2, 8, 6

FORMS = {"recurrent": entmax.recurrent, "chunked": functools.partial(entmax.chunked, chunk=16)}
every_form = pytest.mark.parametrize("form", FORMS)
every_alpha = pytest.mark.parametrize("alpha", [1.5, 2.0])


@functools.cache
def inputs(length, keys=None):
    """q, k, v, and the gradient of the output."""
    rng = np.random.default_rng(0)
    keys = keys or length
    shapes = (B, length, H, K), (B, keys, G, K), (B, keys, G, V), (B, length, H, V)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def packed(length):
    """Two documents with padding between; one with padding at both ends."""
    ids = np.zeros((B, length), int)
    ids[0, : length // 3], ids[0, length // 3 + 2 :] = 1, 2
    ids[1, 3 : length - 5] = 4
    origin = np.where(ids == 2, length // 3 + 2, np.where(ids == 4, 3, 0))
    return Segments.from_ids(ids, np.where(ids > 0, np.arange(length) - origin, 0))


def weights(z, alpha):
    """The weights of logits `[..., n]`, tau by bisection, in float64."""
    x, power = (alpha - 1) * np.asarray(z, np.float64), 1 / (alpha - 1)
    low, high = x.max(-1, keepdims=True) - 1, x.max(-1, keepdims=True)
    for _ in range(100):
        middle = (low + high) / 2
        more = (np.maximum(x - middle, 0) ** power).sum(-1, keepdims=True) > 1
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return np.maximum(x - low, 0) ** power


def run(form, arrays, pattern, alpha, segments, held=None):
    *arrays, cotangent = arrays

    def loss(*arrays):
        y = FORMS[form](*arrays, pattern, segments, segments if held is None else held, alpha=alpha)
        return jnp.vdot(y.astype(jnp.float32), cotangent), y

    gradients, y = jax.jit(jax.grad(loss, range(3), has_aux=True))(*arrays)
    return y, *gradients


def close(found, expected):
    """Outputs to 1e-4 of their largest entry, gradients to 5e-4."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=0, atol=(5e-4 if i else 1e-4) * float(jnp.abs(b).max()))


LOGITS = {
    "normal": np.random.default_rng(1).standard_normal(700),
    "small": 0.1 * np.random.default_rng(1).standard_normal(700),
    "wide": 1e3 * np.random.default_rng(1).standard_normal(700),
    "heavy": np.random.default_rng(1).standard_cauchy(700),
    "equal": np.full(700, 3.0),
    "two best": np.r_[5.0, 5.0, np.zeros(698)],
    "geometric": -(2.0 ** -np.arange(30)),
    "ramp": -np.linspace(0, 1, 700),
    "logarithms": -np.log(np.arange(1, 701)) / 4,
    "one": np.zeros(1),
}


def of_logits(form, logits, alpha, d):
    """The weights that a form gives to rows of logits, filled up to the longest, and the gradient of `d . weights`.

    One query and one head a row, and values that are the unit vectors, and d.
    """
    length, op = max(map(len, logits)), FORMS[form]
    z, ids = (np.zeros((len(logits), length), kind) for kind in (np.float32, np.int32))
    for row, one in enumerate(logits):
        z[row, : len(one)], ids[row, : len(one)] = one, 1
    query = Segments.single(len(logits), 1, offset=length)
    held = Segments.from_ids(ids, np.arange(length) * ids)
    values = np.concatenate([np.broadcast_to(np.eye(length), (*z.shape, length)), d[..., None]], -1)[:, :, None]

    def both(z):
        y = op(jnp.ones((len(z), 1, 1, 1)), z, jnp.float32(values), Causal(), query, held, alpha=alpha, scale=1.0)
        return y[..., -1].sum(), y[:, 0, 0, :-1]

    gradient, p = jax.jit(jax.grad(both, has_aux=True))(jnp.asarray(z)[:, :, None, None])
    return np.asarray(p), np.asarray(gradient)[:, :, 0, 0]


@every_form
@every_alpha
def test_weights_and_their_gradient(form, alpha):
    """Against float64, weights within 1e-5 that are zeros exactly where they should be, and the closed gradient.

    Seen to fail: one step of Newton's only; whole steps, whose rounding passes the root.
    """
    logits = [z.astype(np.float32) for z in LOGITS.values()]
    d = np.random.default_rng(2).standard_normal((len(logits), max(map(len, logits))))
    for name, z, d_row, p, gradient in zip(LOGITS, logits, d, *of_logits(form, logits, alpha, d), strict=True):
        n, expected = len(z), weights(z, alpha)
        np.testing.assert_allclose(p[:n], expected, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(p.sum(), 1, rtol=0, atol=1e-5, err_msg=name)
        # Where the least of the weights is as small as rounding is, it may be 0 or not.
        sure = (expected > 1e-6) | (expected == 0)
        np.testing.assert_array_equal((p[:n] > 0)[sure], (expected > 0)[sure], err_msg=name)
        slope = (expected > 0) * expected ** (2 - alpha)
        exact = slope * (d_row[:n] - slope @ d_row[:n] / slope.sum())
        np.testing.assert_allclose(gradient[:n], exact, rtol=0, atol=5e-4, err_msg=name)
        assert not p[n:].any()


@every_alpha
@pytest.mark.parametrize(
    ("length", "pattern"),
    [
        (1, Causal()),
        (7, Causal()),
        (75, Causal()),
        (64, Causal() & (Window(9) | Sinks(2))),
        (75, Causal() & ~Window(7)),
    ],
)
def test_fast_form_is_the_definition(length, pattern, alpha):
    """Outputs and gradients; padding and queries that see nothing give exactly 0.

    Seen to fail: the mask of a block taken of another; the share of a row not divided by its slopes; keys that the
    definition clips among its chosen.
    """
    segments = packed(length) if length > 50 else Segments.single(B, length)
    expected = run("recurrent", inputs(length), pattern, alpha, segments)
    close(run("chunked", inputs(length), pattern, alpha, segments), expected)
    if "~" in repr(pattern):
        assert not expected[0][~np.asarray(segments.valid & (segments.positions >= 7))].any()
    else:
        assert not expected[0][~np.asarray(segments.valid)].any()


def test_a_span_sees_what_came_before():
    """A cache with empty slots, then the span's own keys."""
    length, cut, empty = 60, 41, 5
    q, k, v, cotangent = inputs(length)
    whole = run("recurrent", (q, k, v, cotangent.at[:, :cut].set(0)), Causal(), 1.5, Segments.single(B, length))
    pad = ((0, 0), (0, empty), (0, 0), (0, 0))
    keys, values = (jnp.concatenate([jnp.pad(x[:, :cut], pad, constant_values=9.0), x[:, cut:]], 1) for x in (k, v))
    place = np.r_[:cut, np.zeros(empty, int), cut:length]
    ids = np.r_[np.ones(cut, int), np.zeros(empty, int), np.ones(length - cut, int)]
    held = Segments.from_ids(*(np.tile(x, (B, 1)) for x in (ids, place)))
    arrays = q[:, cut:], keys, values, cotangent[:, cut:]
    y, dq, dk, dv = run("chunked", arrays, Causal(), 1.5, Segments.single(B, length - cut, offset=cut), held)
    dk, dv = (x[:, np.flatnonzero(ids)] for x in (dk, dv))
    close((y, dq, dk, dv), (whole[0][:, cut:], whole[1][:, cut:], *whole[2:]))


@every_form
@every_alpha
@pytest.mark.parametrize("size", [0.0, 1e3])
def test_extremes(form, alpha, size):
    """Inputs of 0 and of 1,000: finite, gradients included. Equal logits give the mean of the values."""
    *arrays, cotangent = inputs(40)
    q, k, v = arrays[0] * size, arrays[1] * size, arrays[2]
    y, *gradients = run(form, (q, k, v, cotangent), Causal(), alpha, Segments.single(B, 40))
    assert all(np.isfinite(x).all() for x in (y, *gradients))
    if size == 0:
        np.testing.assert_allclose(y[:, -1], v.mean(1).repeat(H // G, axis=1), atol=1e-5)


@every_form
def test_bfloat16(form):
    """Logits and threshold are float32; inputs, weights and output are rounded."""
    *arrays, cotangent = [x.astype(jnp.bfloat16) for x in inputs(75)]
    y = run(form, (*arrays, cotangent.astype(jnp.float32)), Causal(), 1.5, packed(75))[0]
    assert y.dtype == jnp.bfloat16
    exact = entmax.recurrent(*(x.astype(jnp.float32) for x in arrays), Causal(), packed(75), packed(75))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-7, atol=2**-7)


def test_memory_is_linear():
    """Temporary memory of forward and backward at T and 4T."""

    def bytes_at(length):
        shapes = (B, length, H, K), (B, length, G, K), (B, length, G, V), (B, length, H, V)
        row = Segments.single(B, length)

        def loss(*arrays):
            return jnp.vdot(entmax.chunked(*arrays[:3], Causal(), row, row), arrays[3])

        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(jax.grad(loss, range(3))).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert bytes_at(4096) <= 4.6 * bytes_at(1024)


@every_form
def test_refusals(form):
    *arrays, _ = inputs(7)
    row = Segments.single(B, 7)
    with pytest.raises(ValueError, match=r"alpha is 1\.3; entmax is here for 1\.5 and for 2"):
        FORMS[form](*arrays, Causal(), row, row, alpha=1.3)
    with pytest.raises(ValueError, match="shows a key more than once, and entmax counts keys once"):
        FORMS[form](*arrays, Causal() & (Dilated(4, 1) + Dilated(4, 2)), row, row)
