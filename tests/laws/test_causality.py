"""The law of causality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws.cases import ROWS, T, inputs, layers, make, packed


@layers
def test_causality(name):
    """The gradient of output t with respect to inputs after t, and to other documents, is exactly zero.

    The message names the row, both tokens and their documents. Seen to fail: Causal showing one token ahead.
    """
    graph, params = make(name)
    layer = nnx.merge(graph, params)
    segments = packed(ROWS, T)
    ids = np.asarray(segments.ids)

    @jax.jit
    def influence(x, t):
        return jax.grad(lambda x: jnp.sum(jnp.square(layer(x, segments)[0][:, t])))(x)

    for t in (0, 4, 5, 23, 24, 40, 53, 59):
        gradient = np.abs(np.asarray(influence(inputs(T), t))).sum(-1)
        document = (np.arange(T) <= t) & (ids == ids[:, t : t + 1]) & (ids[:, t : t + 1] > 0)
        allowed = document | (np.arange(T) == t)  # what padding gives is nobody's business, if it reads itself alone
        for row, at in np.argwhere((gradient != 0) & ~allowed)[:1]:
            pytest.fail(f"output {t} of row {row}, {_what(ids[row, t])}, depends on input {at}, {_what(ids[row, at])}")
        for row in np.flatnonzero((gradient[:, t] == 0) & (ids[:, t] > 0)):
            pytest.fail(f"output {t} of row {row} does not depend on its own input")


def _what(document):
    return f"of document {document}" if document else "padding"
