"""Collision and effective rank, on keys and matrices whose answer is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.memory.diagnostics import effective_rank, key_collision


def test_key_collision():
    """Seen to fail: a key compared with itself; keys not normalised."""
    eye = jnp.eye(4)
    same, mixed = jnp.ones((4, 4)), jnp.array([[1, 0, 0, 0], [-5, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]])
    # Of the six pairs in `mixed` one is (anti)parallel, the others orthogonal.
    np.testing.assert_allclose(key_collision(jnp.stack([eye, same, mixed])), [0, 1, 1 / 6], atol=1e-6)
    np.testing.assert_allclose(key_collision(eye, same), 0.5, atol=1e-6)
    np.testing.assert_allclose(key_collision(eye[:2], -3 * eye[:1]), 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "rank"),
    [([1, 1, 1], 3.0), ([2, 2, 0], 2.0), ([1e-3, 0, 0], 1.0), ([0, 0, 0], 0.0), ([2, 1, 1], 2**1.5)],
)
def test_effective_rank(values, rank):
    """Singular values between random orthogonal bases. Seen to fail: squared singular values in the entropy."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, 3)))[0] for size in (7, 5))
    matrix = jnp.asarray(left @ np.diag(values) @ right.T)
    np.testing.assert_allclose(effective_rank(jnp.stack([matrix, 10 * matrix])), [rank, rank], atol=1e-3)
