"""The law of step."""

import jax
import jax.numpy as jnp
from flax import nnx
from laws.cases import ROWS, T, inputs, layers, make, packed, part
from laws.compare import OUTPUT_TOLERANCE, close


@layers
def test_step(name):
    """Token by token from a prefilled state = the full pass, across a document's start.

    Seen to fail: the cache's ring one slot short of its window.
    """
    graph, params = make(name)
    layer = nnx.merge(graph, params)
    x = inputs(T)
    segments = packed(ROWS, T)
    full = jax.jit(lambda x: layer(x, segments)[0])(x)
    prefill = 37
    step = jax.jit(lambda x, segments, state: layer(x, segments, state))
    y, state = step(x[:, :prefill], part(segments, 0, prefill), layer.init_state(2, T, x.dtype))
    outputs = [y]
    for t in range(prefill, T):
        y, state = step(x[:, t : t + 1], part(segments, t, t + 1), state)
        outputs.append(y)
    valid = segments.valid[..., None]
    close(jnp.concatenate(outputs, axis=1) * valid, full * valid, OUTPUT_TOLERANCE, "output")
