"""The law of pack."""

import jax
import numpy as np
from flax import nnx
from laws.cases import ROWS, T, inputs, layers, make, packed
from laws.compare import OUTPUT_TOLERANCE, close


@layers
def test_pack(name):
    """A packed row = its documents run alone, without segments; padding gives what it may, documents do not see it.

    Seen to fail: document starts dropped from `Segments`; positions counted wrongly within the document; without
    segments, a document whose first token is not its start.
    """
    graph, params = make(name)
    layer = nnx.merge(graph, params)
    x = np.asarray(inputs(T))
    y = np.asarray(jax.jit(lambda x, segments: layer(x, segments)[0])(x, packed(ROWS, T)))
    run = jax.jit(lambda x: layer(x)[0])
    for row, lengths in enumerate(ROWS):
        at = 0
        for length in lengths:
            if length > 0:
                alone = run(x[row : row + 1, at : at + length])
                close(y[row : row + 1, at : at + length], alone, OUTPUT_TOLERANCE, f"row {row}, document at {at}: ")
            at += abs(length)
