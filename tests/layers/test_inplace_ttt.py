"""In-Place TTT continues a SwiGLU: the same function, to the bit, until its convolution is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.layers import InPlaceTTT, SwiGLU
from longctx.typing import Segments

D, F, T = 8, 12, 40


def layers():
    mlp = SwiGLU(D, SwiGLU.Config(F), nnx.Rngs(params=0))
    return mlp, InPlaceTTT.from_swiglu(mlp, InPlaceTTT.Config(hidden=F, minibatch=7), nnx.Rngs(params=1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unchanged_at_initialisation(dtype):
    """No bit of the output differs over several mini-batches. Seen to fail: taps that begin with noise."""
    mlp, layer = layers()
    x, segments = jax.random.normal(jax.random.key(2), (2, T, D), dtype), Segments.single(2, T)
    y, state = layer(x, segments)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, mlp(x, segments)[0])
    assert not any(np.any(leaf) for leaf in (state.weights, state.pending))


def test_learns_from_the_start():
    """The convolution gets a gradient though it is zero, since the target's projection is not."""
    _, layer = layers()
    x, segments = jax.random.normal(jax.random.key(2), (2, T, D)), Segments.single(2, T)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x, segments)[0] ** 2))(layer)
    assert np.any(gradient.taps[...])


def test_copies():
    """The parameters are copies: training one leaves the other. A hidden width that does not fit is refused."""
    mlp, layer = layers()
    assert mlp.gate.weight[...].unsafe_buffer_pointer() != layer.gate.weight[...].unsafe_buffer_pointer()
    with pytest.raises(ValueError, match=f"give {F}"):
        InPlaceTTT.from_swiglu(mlp, InPlaceTTT.Config(hidden=F + 1), nnx.Rngs(params=1))
