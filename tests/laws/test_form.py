"""The law of form."""

import jax.numpy as jnp
import pytest
from flax import nnx
from laws.cases import grow, inputs, layers, make, packed, slow
from laws.compare import compare, with_gradients

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
    graph, params = make(name)
    length = sum(rows[0])
    segments, after = packed(rows, length), grow(None, jnp.asarray([row[-1] for row in rows]), 3)

    def run(params, x):
        layer = nnx.merge(graph, params)
        y, state = layer(x[:, :length], segments, layer.init_state(2, length + 3, x.dtype))
        return jnp.concatenate([y, layer(x[:, length:], after, state)[0]], axis=1)

    fast = with_gradients(run)(params, inputs(length + 3))
    with definitions():
        compare(fast, with_gradients(lambda *a: run(*a))(params, inputs(length + 3)))
