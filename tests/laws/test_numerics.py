"""Extremes, and the dtypes of states."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws.cases import LAYERS, ROWS, D, T, inputs, layers, make, packed
from laws.compare import close, with_losses

from longctx.memory.store import Store
from longctx.typing import Segments


@layers
def test_extremes(name):
    """Inputs of 0 and of 1,000, and bfloat16: outputs and gradients are finite, and of the inputs' dtype.

    In bfloat16 the outputs are those of float32 to a tenth of their largest entry, most to far less: parameters,
    activations and outputs are rounded to eight bits, states and decays are not.

    Seen to fail: a root of 0, whose slope is not finite; an output left in float32.
    """
    graph, params = make(name)
    segments = packed(ROWS, T)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            (y, _), losses = with_losses(nnx.merge(graph, params), x, segments)
            return losses + jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, gradients

    x = inputs(T)
    for given in (jnp.zeros_like(x), 1e3 * x, x.astype(jnp.bfloat16)):
        y, gradients = run(params, given)
        assert y.dtype == given.dtype
        for path, leaf in jax.tree.leaves_with_path((y, gradients)):
            assert np.isfinite(np.asarray(leaf, np.float32)).all(), f"{jax.tree_util.keystr(path)} is not finite"
    exact = run(params, x)[0]
    close(y.astype(jnp.float32), exact, 0.1, "bfloat16: ")


@pytest.mark.parametrize("name", LAYERS)
def test_states_are_float32(name):
    """Under bfloat16 activations a state keeps its shapes and dtypes from span to span, and what it sums is float32.

    Only what is kept of a token, and need not be exact, has the activations' dtype. Nothing is computed.

    Seen to fail: a state that takes the dtype of what is written to it.
    """
    layer = nnx.merge(*make(name))
    before = jax.eval_shape(lambda: layer.init_state(2, T, jnp.bfloat16))
    x = jax.ShapeDtypeStruct((2, 16, D), jnp.bfloat16)
    after = jax.eval_shape(lambda x, state: layer(x, Segments.single(2, 16), state)[1], x, before)
    alone = jax.eval_shape(lambda x: layer(x, Segments.single(2, 16))[1], x)

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
