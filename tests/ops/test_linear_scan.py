"""What only the elementwise recurrence has: a closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import LINEAR_SCAN


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_geometric_series(form):
    """A constant input under a constant decay a gives (1 - a^t) / (1 - a). Fails when the input is decayed too."""
    decay = 0.9
    x = jnp.ones((1, 130, 2))
    y, state = jax.jit(functools.partial(LINEAR_SCAN, form=form))(x, jnp.full(x.shape, np.log(decay)))
    wanted = (1 - decay ** np.arange(1, 131)) / (1 - decay)
    np.testing.assert_allclose(y[0], np.stack([wanted] * 2, axis=1), rtol=1e-5)
    np.testing.assert_allclose(state[0], wanted[-1], rtol=1e-5)
