"""The law of form: the fast form of a layer computes what its definition does."""

import numpy as np
import pytest
from laws.cases import inputs, layers, packed, slow
from laws.compare import compare
from laws.spans import compiled, empty, real, span, weights

from longctx.ops.family import definitions

# Lengths of documents in two rows: one token, one more than a chunk, and no multiple of any.
AWKWARD = ([1, 65, 434], [434, 1, 65])


@layers
@pytest.mark.parametrize("rows", [AWKWARD, *slow(([1], [1]), ([63], [63]), ([64], [64]), ([500], [500]))], ids=str)
def test_form(name, rows):
    """Fast form = definition: token-by-token recurrences and dense softmax. Outputs, state, gradients.

    Seen to fail: gated_delta's inverse without its last power; the blockwise executor without the rescaling of its
    running sum.
    """
    length = sum(rows[0])
    x, segments = np.asarray(inputs(length)), packed(rows, length)
    dy, dstate = weights(x), weights(real(empty(name, length)))

    def run():
        return span(name, x, segments, None, dy, dstate, 1, room=length, run=compiled(name, length, length))

    fast = run()
    with definitions():
        definition = run()
    compare((fast[:2], fast.gradients), (definition[:2], definition.gradients))
