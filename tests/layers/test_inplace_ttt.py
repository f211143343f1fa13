"""In-Place TTT continues a SwiGLU: the same function, to the bit, until its convolution is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import architecture, config
from longctx.layers import MIXERS, InPlaceTTT, SwiGLU
from longctx.models import LanguageModel
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
    run = jax.jit(lambda layer, x: layer(x, segments))
    y, state = run(layer, x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, run(mlp, x)[0])
    assert not any(np.any(leaf) for leaf in (state.memory.weights, state.memory.pending))


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


def test_targets_are_made_of_the_embeddings():
    """Every block of a model gives its MLP the embeddings of the tokens, in decoding too.

    Seen to fail: targets from the MLP's inputs.
    """
    mixer = MIXERS["gla"].Config(heads=2, key_width=4, value_width=4, gate_rank=2)
    block = architecture.Block(mixer, InPlaceTTT.Config(hidden=F, minibatch=3))
    options = config.Model(("a",), {"a": block}, width=D, repeats=2, dtype="float32")
    model = LanguageModel(options, 16, nnx.Rngs(params=0))
    taps = model.blocks[0].mlp.taps
    taps[...] = jax.random.normal(jax.random.key(1), taps.shape)
    model.blocks[0].mlp.target[...] *= 50

    tokens, segments = jax.random.randint(jax.random.key(2), (2, 10), 0, 16), Segments.single(2, 10)
    run = jax.jit(lambda layer, *inputs: layer(*inputs))
    hidden, _ = run(model, tokens, segments)
    x = embedded = model.embedding[...][tokens] * D**0.5
    inputs = x
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks[0])
        x, _ = run(one, x, segments, None, embedded)
        inputs, _ = run(one, inputs, segments)
    np.testing.assert_allclose(hidden, model.norm(x), rtol=0, atol=1e-5)
    assert np.abs(model.norm(inputs) - hidden).max() > 1e-2

    state, steps = model.init_state(2, 10), []
    for t in range(10):
        place = Segments(jnp.ones((2, 1), jnp.int32), jnp.full((2, 1), t), jnp.zeros((2, 1), bool))
        step, state = run(model, tokens[:, t : t + 1], place, state)
        steps.append(step)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), hidden, rtol=0, atol=1e-4)
