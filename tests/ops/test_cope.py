"""CoPE: the definition against the formula in float64, and the fast form against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.cope import COPE
from longctx.typing import Segments

B, H, G, K, V, N = 2, 4, 2, 8, 6, 9

every_form = pytest.mark.parametrize("form", ["definition", "chunked"])


@functools.cache
def inputs(length, keys=None, embeddings=N):
    """q, k, v, embeddings, and the gradient of the output. Positions reach N - 1 after some 20 tokens."""
    rng = np.random.default_rng(0)
    keys = keys or length
    shapes = (B, length, H, K), (B, keys, G, K), (B, keys, G, V), (embeddings, K), (B, length, H, V)
    q, k, v, embeddings, cotangent = (jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return [q, k, v, embeddings / np.sqrt(K), cotangent]


def packed(length):
    """Two documents with padding between; one with padding at both ends."""
    ids = np.zeros((B, length), int)
    ids[0, : length // 3], ids[0, length // 3 + 2 :] = 1, 2
    ids[1, 3 : length - 5] = 4
    origin = np.where(ids == 2, length // 3 + 2, np.where(ids == 4, 3, 0))
    return Segments.from_ids(ids, np.where(ids > 0, np.arange(length) - origin, 0))


def formula(q, k, v, embeddings):
    q, k, v, embeddings = (np.asarray(x, np.float64) for x in (q, k, v, embeddings))
    y, last = np.zeros((*q.shape[:3], V)), len(embeddings) - 1
    for b, t, h in np.ndindex(*q.shape[:3]):
        logits, position = np.zeros(t + 1), 0.0
        for s in range(t, -1, -1):
            logits[s] = q[b, t, h] @ k[b, s, h // 2] / np.sqrt(K)
            position = min(position + 1 / (1 + np.exp(-logits[s])), last)
            n = int(position)
            embedding = (1 - position + n) * embeddings[n] + (position - n) * embeddings[min(n + 1, last)]
            logits[s] += q[b, t, h] @ embedding
        weights = np.exp(logits - logits.max())
        y[b, t, h] = weights @ v[b, : t + 1, h // 2] / weights.sum()
    return y


def attend(form, q, k, v, embeddings, segments):
    return COPE((q,), (k, v), (embeddings,), segments, form=form, chunk=16).y


def run(form, arrays, segments):
    *arrays, cotangent = arrays

    def loss(*arrays):
        y = attend(form, *arrays, segments)
        return jnp.vdot(y.astype(jnp.float32), cotangent), y

    gradients, y = jax.jit(jax.grad(loss, range(4), has_aux=True))(*arrays)
    return y, *gradients


def close(found, expected, tolerance=1e-4):
    """Outputs to `tolerance` of their largest entry, gradients to five times that."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=0, atol=(5 if i else 1) * tolerance * float(jnp.abs(b).max()))


@every_form
@pytest.mark.parametrize("embeddings", [N, 1])
def test_formula(form, embeddings):
    """Positions past the last embedding among others. Seen to fail: gates summed from the first key on."""
    *arrays, _ = inputs(50, embeddings=embeddings)
    row = Segments.single(B, 50)
    np.testing.assert_allclose(attend(form, *arrays, row), formula(*arrays), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("length", "pack"), [(7, False), (75, True)])
def test_fast_form_is_the_definition(length, pack):
    """Outputs and all gradients.

    Seen to fail: padding or other documents counted; the sum of gates not passed on from block to block; gates without
    gradient.
    """
    segments = packed(length) if pack else Segments.single(B, length)
    expected = run("definition", inputs(length), segments)
    close(run("chunked", inputs(length), segments), expected)
    assert not np.any(np.where(segments.valid[..., None, None], 0, expected[0]))


@every_form
@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_extremes(form, scale):
    """Inputs of 0 and of 1,000: finite, gradients included."""
    *arrays, cotangent = inputs(40)
    found = run(form, (*(scale * x for x in arrays), cotangent), packed(40))
    assert all(np.isfinite(x).all() for x in found)


@every_form
def test_bfloat16(form):
    """Only inputs and output are rounded."""
    *arrays, cotangent = [x.astype(jnp.bfloat16) for x in inputs(75)]
    y = run(form, (*arrays, cotangent.astype(jnp.float32)), packed(75))[0]
    assert y.dtype == jnp.bfloat16
    exact = attend("definition", *(x.astype(jnp.float32) for x in arrays), packed(75))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-3)


def test_memory_is_linear():
    """Temporary memory of forward and backward at T and 4T. Seen to fail: the definition in place of the fast form."""

    def bytes_at(length):
        arrays = [jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype) for x in inputs(8)]
        arrays[3] = jax.ShapeDtypeStruct((N, K), jnp.float32)
        row = Segments.single(B, length)

        def loss(*arrays):
            return jnp.vdot(attend("chunked", *arrays[:4], row), arrays[4])

        compiled = jax.jit(jax.grad(loss, range(4))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_at(4096) <= 4.6 * bytes_at(1024)
