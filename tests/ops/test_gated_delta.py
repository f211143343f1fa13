"""What only the delta rule has: an inverse per chunk."""

import jax
import jax.numpy as jnp
import numpy as np

from longctx.ops import GATED_DELTA


def test_keys_that_repeat():
    """One key for all tokens, replaced whole each time: y_t = v_t. Fails when the inverse is summed from powers."""
    rng = np.random.default_rng(0)
    k = jnp.zeros((1, 130, 1, 8)).at[..., 0].set(1.0)
    v = jnp.asarray(rng.normal(size=(1, 130, 1, 4)), jnp.float32)
    y, state = jax.jit(GATED_DELTA)(k, k, v, jnp.ones((1, 130, 1)), jnp.zeros((1, 130, 1)))
    np.testing.assert_allclose(y, v, atol=1e-4)
    np.testing.assert_allclose(state[:, :, 0], v[:, -1], atol=1e-4)
