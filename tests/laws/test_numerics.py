"""Extremes, bfloat16, and the dtypes of states."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws.cases import LAYERS, ROWS, D, T, inputs, layers, packed, shapes
from laws.spans import span, weights

from longctx.memory.store import Store
from longctx.typing import Segments


@layers
def test_extremes(name):
    """Inputs of 0 and of 1,000: outputs and gradients are finite.

    Seen to fail: a root of 0, whose slope is not finite.
    """
    x = np.asarray(inputs(T))
    for given in (np.zeros_like(x), 1e3 * x):
        finite(span(name, given, packed(ROWS, T), dy=weights(x), losses=1))


def finite(out):
    for path, leaf in jax.tree.leaves_with_path((out.y, out.gradients)):
        assert np.isfinite(np.asarray(leaf, np.complex64)).all(), f"{jax.tree_util.keystr(path)} is not finite"


# Errors of bfloat16, relative to the outputs: the root of the mean square, and the largest. Delta rules solve for what
# they write; RWKV-7 multiplies matrices token by token; the indexer's choice of keys is another where scores are close.
BFLOAT16 = {name: (0.03, 0.1) for name in LAYERS if "delta" in name} | {
    "kda": (0.03, 0.1),
    "multi_resolution": (0.03, 0.1),
    "titans": (0.03, 0.1),
    "rwkv7": (0.05, 0.2),
    "indexer_topk": (0.03, 0.2),
}


@layers
def test_bfloat16(name):
    """Outputs and gradients in bfloat16 are finite and of that dtype; outputs are those of float32, see `BFLOAT16`.

    Parameters, activations and outputs are rounded to eight bits, states and decays are not. Seen to fail: an output
    left in float32.
    """
    x, segments = np.asarray(inputs(T)), packed(ROWS, T)
    exact = span(name, x, segments).y
    rounded = span(name, x.astype(jnp.bfloat16), segments, dy=weights(x).astype(jnp.bfloat16), losses=1)
    assert rounded.y.dtype == rounded.gradients[1].dtype == jnp.bfloat16
    finite(rounded)
    error = rounded.y.astype(np.float32) - exact
    mean, largest = np.sqrt(np.mean(error**2) / np.mean(exact**2)), np.abs(error).max() / np.abs(exact).max()
    allowed = BFLOAT16.get(name, (0.015, 0.1))
    assert mean <= allowed[0], f"the root of the mean square of the error is {mean:.4f}"
    assert largest <= allowed[1], f"the largest error is {largest:.4f}"


@pytest.mark.parametrize("name", LAYERS)
def test_states_are_float32(name):
    """Under bfloat16 activations a state keeps its shapes and dtypes from span to span, and what it sums is float32.

    Only what is kept of a token, and need not be exact, has the activations' dtype. Nothing is computed.

    Seen to fail: a state that takes the dtype of what is written to it.
    """
    graph, params = shapes(name)
    x, given = jax.ShapeDtypeStruct((2, 16, D), jnp.bfloat16), Segments.single(2, 16)

    def spans(params, x):
        layer = nnx.merge(graph, params)
        state = layer.init_state(2, T, jnp.bfloat16)
        return state, layer(x, given, state)[1], layer(x, given)[1]

    before, after, alone = jax.eval_shape(spans, params, x)

    def carried(state):
        for path, leaf in jax.tree.leaves_with_path(state, is_leaf=lambda leaf: isinstance(leaf, Store)):
            where = jax.tree_util.keystr(path)
            if isinstance(leaf, Store):
                kept = zip(leaf.leaves, leaf.entries, strict=True)
                yield from ((f"{where}.entries[{i}]", x) for i, (kind, x) in enumerate(kept) if kind.exact)
            else:
                yield where, leaf

    for where, leaf in [*carried(before), *carried(after), *carried(alone)]:
        held = jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype in (jnp.float32, jnp.complex64)
        assert held, f"{name}: the state's {where or 'only leaf'} is {leaf.dtype}, not float32"
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
