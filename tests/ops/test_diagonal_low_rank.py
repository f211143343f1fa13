"""The recurrence of RWKV-7 against a loop in float64, at extremes; its laws are in tests/laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import DIAGONAL_LOW_RANK

H, K, V = 2, 8, 4


def example(length):
    """Inputs as float64 numpy arrays: decays of 0, 1 and exp(-80), values stored at keys of norm 0 and 1e3."""
    rng = np.random.default_rng(length)
    q, k, v, a = (rng.normal(size=(2, length, H, width)) for width in (K, K, V, K))
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    k[1] *= rng.choice([0.0, 1.0, 1e3], size=(length, 1, 1))
    b = a * rng.choice([0.0, 0.5, 1.0], size=(2, length, H, 1))
    log_decay = -np.exp(rng.normal(size=(2, length, H, K)) - 2)
    log_decay[1] = rng.choice([-np.inf, -80.0, 0.0, -0.1], size=(length, H, K), p=[0.05, 0.05, 0.6, 0.3])
    return q, k, v, -a, b, log_decay


def by_loop(q, k, v, a, b, log_decay):
    y = np.zeros_like(v)
    s = np.zeros((q.shape[0], H, K, V))
    for t in range(q.shape[1]):
        read = np.einsum("bhk,bhkv->bhv", a[:, t], s)
        s = np.exp(log_decay[:, t])[..., None] * s + b[:, t, ..., None] * read[..., None, :]
        s += k[:, t, ..., None] * v[:, t, :, None]
        y[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], s)
    return y, s


@pytest.mark.parametrize("length", [1, 70])
def test_extremes(length):
    """The fast form, to 1e-5 of each row's largest entry, and finite gradients.

    Seen to fail: a decayed with its own token's decay instead of that before it.
    """
    inputs = example(length)
    as_float32 = [jnp.asarray(leaf, jnp.float32) for leaf in inputs]
    fast = functools.partial(DIAGONAL_LOW_RANK, form="chunked")
    outputs, pull = jax.jit(lambda *inputs: jax.vjp(fast, *inputs))(*as_float32)
    for have, want in zip(outputs, by_loop(*inputs), strict=True):
        for row in range(2):
            np.testing.assert_allclose(have[row], want[row], rtol=0, atol=1e-5 * np.abs(want[row]).max())
    for gradient in jax.jit(pull)(outputs):
        assert np.isfinite(np.asarray(gradient)).all()


def test_bfloat16():
    """The sums are in float32: only the output is rounded, to 2^-8. Seen to fail: products of bfloat16."""
    inputs = [jnp.asarray(leaf, jnp.bfloat16) for leaf in example(70)]
    y, state = DIAGONAL_LOW_RANK(*inputs)
    wanted, after = by_loop(*(np.asarray(leaf, np.float64) for leaf in inputs))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(state, after, rtol=0, atol=1e-5 * np.abs(after).max())
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=2**-8, atol=1e-5 * np.abs(wanted).max())
