"""The kernels that the feature maps of linear attention stand for, against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import feature_maps

K = 8
RNG = np.random.default_rng(0)
Q, KEYS = RNG.normal(size=(2, 1, 50, 2, K))
DOTS = np.sum(Q * KEYS, axis=-1) / K**0.5


def kernel(features, q=Q, k=KEYS):
    return np.sum(np.asarray(features(jnp.asarray(q)) * features(jnp.asarray(k)), np.float64), axis=-1)


def test_taylor():
    """1 + s + s²/2, to 1e-5. Seen to fail: 1 in place of 1/√2 at the squares."""
    np.testing.assert_allclose(kernel(feature_maps.taylor), 1 + DOTS + DOTS**2 / 2, rtol=1e-5, atol=1e-5)


def test_performer():
    """With 32,768 features within 3 % of the mean of exp(w·(q' + k') - (|q'|² + |k'|²)/2) over the sphere of radius √K.

    The mean of exp(w·u) over it is a series in |u|² = r: the sum of (K r / 4)^n / (n! (K/2)(K/2 + 1)...).
    Seen to fail: |x|² in place of |x|²/2; the signs of the orthogonal directions left to the algorithm.
    """
    q, k = Q / (2 * K**0.25), KEYS / (2 * K**0.25)
    r = np.sum(np.square(q + k), axis=-1)
    term, mean = np.ones_like(r), np.ones_like(r)
    for n in range(60):
        term = term * (K * r / 4) / ((n + 1) * (K / 2 + n))
        mean += term
    wanted = mean * np.exp(-0.5 * np.sum(np.square(q) + np.square(k), axis=-1))
    projection = feature_maps.orthogonal(32768, K, 0)
    got = kernel(lambda x: feature_maps.performer(x, projection), Q / 2, KEYS / 2)
    np.testing.assert_allclose(got, wanted, rtol=0.03)


def test_performer_directions():
    """Norm √K, orthogonal within K rows, the same for the same seed. Seen to fail: rows not orthogonalised."""
    rows = feature_maps.orthogonal(20, K, 3)
    np.testing.assert_allclose(rows[:K] @ rows[:K].T, K * np.eye(K), atol=1e-5)
    np.testing.assert_allclose(np.sum(np.square(rows), axis=-1), K, rtol=1e-5)
    feature_maps.orthogonal.cache_clear()
    np.testing.assert_array_equal(rows, feature_maps.orthogonal(20, K, 3))


@pytest.mark.parametrize("name", ["elu", "hedgehog", "performer", "relu2"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_feature_is_negative(name, dtype):
    """Nor infinite, for keys of norm 0 and 1,000, nor are the gradients; float32 for bfloat16.

    Seen to fail: performer without |x|²/2.
    """
    weight = jnp.broadcast_to(jnp.eye(K), (2, K, K))
    options = {"hedgehog": (weight,), "performer": (feature_maps.orthogonal(64, K, 0),)}.get(name, ())
    norms = jnp.asarray([0.0, 1.0, 1e3])[:, None, None]
    x = (norms * jnp.asarray(Q[:, :3] / np.linalg.norm(Q[:, :3], axis=-1, keepdims=True))).astype(dtype)
    features, pull = jax.vjp(lambda x: getattr(feature_maps, name)(x, *options), x)
    assert features.dtype == jnp.float32
    assert np.all((np.asarray(features) >= 0) & np.isfinite(features))
    assert np.all(np.isfinite(np.asarray(pull(features)[0], np.float32)))
