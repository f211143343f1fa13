"""What only the convolution has: a state of tokens, and kernels of any width."""

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import CAUSAL_CONV
from longctx.typing import Segments


@pytest.mark.parametrize("width", [1, 2, 5])
def test_against_numpy(width):
    """Equal to `numpy.convolve`, cut to the causal part. Fails when the kernel is reversed."""
    rng = np.random.default_rng(width)
    x, kernel = rng.normal(size=(1, 9, 1)), rng.normal(size=(width, 1))
    y, tail = CAUSAL_CONV(jnp.asarray(x, jnp.float32), parameters=(jnp.asarray(kernel, jnp.float32),))
    np.testing.assert_allclose(y[0, :, 0], np.convolve(x[0, :, 0], kernel[::-1, 0])[:9], atol=1e-5)
    np.testing.assert_allclose(tail[0], x[0, 10 - width :], atol=1e-6)


def test_padding_before_a_document_that_goes_on():
    """The state stands right before the first token, not before the padding. Fails when it is put before that."""
    rng = np.random.default_rng(0)
    x, kernel, state = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, 6, 2), (4, 2), (1, 3, 2)))
    segments = Segments.from_ids([[0, 0, 1, 1, 1, 1]])
    y, tail = CAUSAL_CONV(x, parameters=(kernel,), state=state, segments=segments)
    wanted, wanted_tail = CAUSAL_CONV(x[:, 2:], parameters=(kernel,), state=state)
    np.testing.assert_allclose(y[:, 2:], wanted, atol=1e-5)
    np.testing.assert_array_equal(tail, wanted_tail)
