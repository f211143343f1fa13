"""What only the clock of the matrix families can get wrong: large decays before small ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import GATED_LINEAR


@pytest.mark.parametrize("channels", [(), (4,)])
def test_small_decays_after_large(channels):
    """32 decays of exp(-100.3), then 32 of exp(-0.01): against the closed form in float64, to 1e-5.

    Fails when log decays are summed in one float32, whose spacing at 3,000 is 2e-4.
    """
    log_decay = np.concatenate([np.full(32, -100.3), np.full(32, -0.01)])
    shape = (1, 64, 1, *channels)
    gates = jnp.broadcast_to(jnp.asarray(log_decay, jnp.float32).reshape(1, 64, 1, *(1 for _ in channels)), shape)
    k = jnp.zeros((1, 64, 1, 4)).at[:, 32].set(1.0)
    q, v = jnp.ones((1, 64, 1, 4)), jnp.ones((1, 64, 1, 1))
    y, _ = jax.jit(GATED_LINEAR)(q, k, v, gates)
    np.testing.assert_allclose(y[0, 32:, 0, 0], 4 * np.exp(-0.01 * np.arange(32)), rtol=1e-5)
