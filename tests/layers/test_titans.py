"""Persistent tokens, and the gate of Titans, beside what the paper's section 4.2 says of them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.layers.attention import Attention
from longctx.layers.positions import NoPositions
from longctx.layers.titans import Titans
from longctx.typing import Segments

D, T = 8, 23
run = jax.jit(lambda layer, x, segments: layer(x, segments)[0])


def moved(layer):
    """The layer, its parameters off their initial values."""
    graph, params = nnx.split(layer)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def test_persistent_tokens_are_a_prefix_that_all_see():
    """Window and persistent tokens = a window and the first tokens of a document that begins with them.

    Seen to fail: their values left out; their keys without the norm.
    """
    options = {"heads": 4, "kv_heads": 2, "head_width": 4, "positions": NoPositions(), "sinks": True, "soft_cap": 3.0}
    layer = moved(Attention(D, Attention.Config(pattern="Window(5)", persistent=3, **options), nnx.Rngs(params=0)))
    x = jax.random.normal(jax.random.key(2), (2, T, D))
    y = run(layer, x, Segments.single(2, T))

    prefix = jnp.broadcast_to(layer.persistent[...], (2, 3, D))
    layer.persistent, layer.options = None, Attention.Config(pattern="Window(5) | Sinks(3)", **options)
    wanted = run(layer, jnp.concatenate([prefix, x], axis=1), Segments.single(2, T + 3))
    np.testing.assert_allclose(y, wanted[:, 3:], rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_gate():
    """norm(attention) * sigmoid(norm(memory)), each with a scale per channel. Seen to fail: either norm left out."""
    options = Titans.Config(mode="gate", persistent=2)
    layer = moved(Titans(D, options, nnx.Rngs(params=0)))
    x, segments = jax.random.normal(jax.random.key(2), (2, T, D)), Segments.single(2, T)
    y = run(layer, x, segments)

    def norm(x, scale):
        return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6) * np.asarray(scale)

    near = norm(np.asarray(run(layer.window, x, segments)), layer.near_norm.scale[...])
    gate_scale, layer.options, layer.window = layer.gate_norm.scale[...], Titans.Config(window=0), None
    memory = norm(np.asarray(run(layer, x, segments)), gate_scale)
    np.testing.assert_allclose(y, near / (1 + np.exp(-memory)), rtol=0, atol=1e-5 * np.abs(y).max())
