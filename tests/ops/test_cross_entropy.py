"""The chunked cross-entropy against the formula, its memory, and its behaviour on a sharded row."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.ops.cross_entropy import Unembedding, cross_entropy
from longctx.ops.sizes import sizes


def inputs(batch=2, length=24, width=8, vocabulary=19, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (batch, length, width), dtype),
        jax.random.normal(keys[1], (vocabulary, width), jnp.float32),
        jax.random.randint(keys[2], (batch, length), 0, vocabulary),
        jax.random.uniform(keys[3], (batch, length)).at[:, 3].set(0),
    )


def definition(hidden, unembedding, targets, weights, smoothing=0.0):
    """-log softmax, token by token, in float64; in the total, of smoothed targets."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64).T
    largest = logits.max(-1, keepdims=True)
    log_p = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    smoothed = (1 - smoothing) * losses - smoothing * log_p.mean(-1)
    return (smoothed * np.asarray(weights)).sum(), losses, logits.argmax(-1) == np.asarray(targets)


@pytest.mark.parametrize(("chunk", "smoothing"), [(1, 0), (6, 0.1), (7, 0), (24, 0), (100, 0), (None, 0.3)])
def test_equals_the_definition(chunk, smoothing):
    """Tolerance 1e-5 of the largest loss. Fails if the order of the chunks is not undone, or padding is counted."""
    given = inputs()
    found = cross_entropy(*given, chunk=chunk, smoothing=smoothing)
    total, losses, correct = definition(*given, smoothing)
    np.testing.assert_allclose(found.losses, losses, atol=1e-5 * losses.max())
    np.testing.assert_allclose(found.total, total, rtol=1e-5)
    np.testing.assert_array_equal(found.correct, correct)


@pytest.mark.parametrize(("chunk", "smoothing"), [(5, 0), (8, 0), (8, 0.1)])
def test_gradients_are_softmax_minus_target(chunk, smoothing):
    """The gradient of a token's loss in its logits is softmax - target. Tolerance 1e-5 absolute, gradients near 1."""
    hidden, unembedding, targets, weights = inputs()

    def total(hidden, unembedding):
        return cross_entropy(hidden, unembedding, targets, weights, chunk=chunk, smoothing=smoothing).total

    found = jax.grad(total, (0, 1))(hidden, unembedding)
    h, e = np.asarray(hidden, np.float64), np.asarray(unembedding, np.float64)
    exponentials = np.exp(h @ e.T)
    goal = (1 - smoothing) * np.eye(len(e))[np.asarray(targets)] + smoothing / len(e)
    slopes = exponentials / exponentials.sum(-1, keepdims=True) - goal
    slopes *= np.asarray(weights)[..., None]
    np.testing.assert_allclose(found[0], slopes @ e, atol=1e-5)
    np.testing.assert_allclose(found[1], np.einsum("btv,btd->vd", slopes, h), atol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_z_loss_bias_and_cap(cap):
    """Against jax's own gradients of the formula, float64 being off: 1e-5 relative to the largest entry.

    Seen to fail: the slope without its factor of 2; weights left out; the z-loss in `losses`; the cap's slope left out.
    """
    hidden, unembedding, targets, weights = inputs()
    bias = jnp.asarray(np.random.default_rng(1).standard_normal(len(unembedding)), jnp.float32)

    def plain(hidden, unembedding, bias):
        logits = jnp.einsum("btd,vd->btv", hidden, unembedding, precision="highest") + bias
        logits = cap * jnp.tanh(logits / cap) if cap else logits
        log_mass = jax.nn.logsumexp(logits, axis=-1)
        here = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        z_loss = 0.3 * jnp.sum(weights * log_mass**2)
        return jnp.sum(weights * (log_mass - here)) + z_loss, z_loss

    def chunked(hidden, unembedding, bias, z_loss=0.3):
        found = cross_entropy(hidden, Unembedding(unembedding, bias, cap), targets, weights, z_loss=z_loss, chunk=5)
        return found.total, found.z_loss

    arrays = hidden, unembedding, bias
    expected = jax.value_and_grad(plain, (0, 1, 2), has_aux=True)(*arrays)
    found = jax.value_and_grad(chunked, (0, 1, 2), has_aux=True)(*arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    without = chunked(*arrays, z_loss=0.0)
    assert without[1] == 0
    np.testing.assert_allclose(found[0][0] - found[0][1], without[0], rtol=1e-5)
    losses = [cross_entropy(hidden, unembedding, targets, weights, z_loss=z, chunk=5).losses for z in (0.0, 0.3)]
    np.testing.assert_array_equal(*losses)


def test_large_logits_stay_finite():
    """Logits of ±1e4 would overflow exp; the loss is finite and so are its gradients."""
    hidden, unembedding, targets, weights = inputs()
    loss, slopes = jax.value_and_grad(lambda h: cross_entropy(h, unembedding, targets, weights).total)(1e4 * hidden)
    assert np.isfinite(loss)
    assert np.isfinite(slopes).all()


def test_bfloat16_hidden_gives_float32_losses():
    found = cross_entropy(*inputs(dtype=jnp.bfloat16), chunk=8)
    assert found.losses.dtype == found.total.dtype == jnp.float32
    # The hidden vectors are exact in bfloat16; only the unembedding is rounded, by 2^-9 of logits of size ~10.
    np.testing.assert_allclose(found.losses, definition(*inputs(dtype=jnp.bfloat16))[1], atol=0.1)


def test_logits_of_the_row_are_never_held():
    """Temporary memory of value and gradient stays below half of the row's logits, and is flat in their number.

    Guards against a backward pass for which the scan keeps every chunk's logits.
    """

    def temporary(length, vocabulary=4096):
        h, e, y, w = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((1, length, 8), jnp.float32),
                ((vocabulary, 8), jnp.float32),
                ((1, length), jnp.int32),
                ((1, length), jnp.float32),
            )
        )
        slope = jax.jit(jax.grad(lambda *a: cross_entropy(*a, chunk=16).total, (0, 1)))
        return slope.lower(h, e, y, w).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(256), temporary(1024)
    assert long < 1024 * 4096 * 4 / 2
    assert long - short < (1024 - 256) * 4096 * 4 / 20


def test_a_sharded_row_is_not_gathered():
    """Batch and row sharded over 2 x 4 devices: the same numbers, and no collective as large as the row.

    Fails for chunks of neighbouring tokens, where XLA gathers the row.
    """
    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    hidden, unembedding, targets, weights = inputs(batch=2, length=64, width=16)
    rows, whole = NamedSharding(mesh, P("data", "context")), NamedSharding(mesh, P())
    value_and_slopes = jax.value_and_grad(lambda *a: cross_entropy(*a, chunk=8).total, (0, 1))
    places = (rows, whole, rows, rows)
    compiled = jax.jit(value_and_slopes, in_shardings=places, out_shardings=(whole, (rows, whole)))
    compiled = compiled.lower(hidden, unembedding, targets, weights).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    found = compiled(*map(jax.device_put, (hidden, unembedding, targets, weights), places))
    alone = value_and_slopes(hidden, unembedding, targets, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, alone)


def test_a_large_vocabulary_leaves_tokens_enough_at_once():
    """Fails if the logits held at once are bounded alone: 8 tokens at a time read the unembedding 32 times."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 256, 8), (128_256, 8), (1, 256))]
    traced = str(jax.make_jaxpr(lambda h, e, w: cross_entropy(h, e, w.astype(int), w).total)(*shapes))
    (steps,) = re.findall(r"length=(\d+)", traced)
    assert 256 // int(steps) == sizes().loss_tokens
