"""Products of delta steps against a loop in float64, at extremes; their laws are in tests/laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import GATED_DELTA_PRODUCT

H, K, V, STEPS = 2, 8, 4, 3


def example(length):
    """Inputs as float64 numpy arrays: decays of 0, 1 and exp(-80), beta of 0, 1 and 2, keys that repeat or are 0."""
    rng = np.random.default_rng(length)
    q, k, v = (
        rng.normal(size=shape) for shape in ((2, length, H, K), (2, length, STEPS, H, K), (2, length, STEPS, H, V))
    )
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    k[1, :, 1] = k[1, :, 0]
    k[1, ::5] = 0
    beta = rng.choice([0.0, 0.5, 1.0, 2.0], size=(2, length, STEPS, H))
    log_decay = -np.exp(rng.normal(size=(2, length, H)) - 2)
    log_decay[1] = rng.choice([-np.inf, -80.0, 0.0, -0.1], size=(length, H), p=[0.05, 0.05, 0.6, 0.3])
    return q, k, v, beta, log_decay


def by_loop(q, k, v, beta, log_decay):
    s, y = np.zeros((2, H, K, V)), np.zeros((*q.shape[:3], V))
    for t in range(q.shape[1]):
        s = np.exp(log_decay[:, t])[..., None, None] * s
        for i in range(STEPS):
            error = v[:, t, i] - np.einsum("bhk,bhkv->bhv", k[:, t, i], s)
            s = s + (beta[:, t, i, :, None] * k[:, t, i])[..., None] * error[..., None, :]
        y[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], s)
    return y, s


@pytest.mark.parametrize("length", [1, 70])
def test_extremes(length):
    """The fast form, to 1e-5 of each row's largest entry, and finite gradients.

    Seen to fail: the decay on the last step of a token; the read after the first.
    """
    inputs = example(length)
    as_float32 = [jnp.asarray(leaf, jnp.float32) for leaf in inputs]
    fast = functools.partial(GATED_DELTA_PRODUCT, form="chunked")
    outputs, pull = jax.jit(lambda *inputs: jax.vjp(fast, *inputs))(*as_float32)
    for have, want in zip(outputs, by_loop(*inputs), strict=True):
        for row in range(2):
            np.testing.assert_allclose(have[row], want[row], rtol=0, atol=1e-5 * np.abs(want[row]).max())
    for gradient in jax.jit(pull)(outputs):
        assert np.isfinite(np.asarray(gradient)).all()
