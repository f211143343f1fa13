"""CoPE: the definition against the formula in float64, and the fast form against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import cope
from longctx.typing import Segments

B, H, G, K, V, N = 2, 4, 2, 8, 6, 9

FORMS = {"recurrent": cope.recurrent, "chunked": functools.partial(cope.chunked, chunk=16)}
every_form = pytest.mark.parametrize("form", FORMS)


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


def run(form, arrays, segments, held=None):
    *arrays, cotangent = arrays

    def loss(*arrays):
        y = FORMS[form](*arrays, segments, segments if held is None else held)
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
    np.testing.assert_allclose(FORMS[form](*arrays, row, row), formula(*arrays), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("length", "pack"), [(1, False), (7, False), (64, True), (75, True)])
def test_fast_form_is_the_definition(length, pack):
    """Outputs and all gradients.

    Seen to fail: padding or other documents counted; the sum of gates not handed on from block to block; gates without
    gradient.
    """
    segments = packed(length) if pack else Segments.single(B, length)
    expected = run("recurrent", inputs(length), segments)
    close(run("chunked", inputs(length), segments), expected)
    assert not np.any(np.where(segments.valid[..., None, None], 0, expected[0]))


@every_form
def test_a_span_sees_what_came_before(form):
    """A cache with empty slots, then the span's own keys; gradients of the keys in the cache included."""
    length, cut, empty = 60, 41, 5
    q, k, v, embeddings, cotangent = inputs(length)
    whole = run(form, (q, k, v, embeddings, cotangent.at[:, :cut].set(0)), Segments.single(B, length))
    pad = ((0, 0), (0, empty), (0, 0), (0, 0))
    keys, values = (jnp.concatenate([jnp.pad(x[:, :cut], pad, constant_values=9.0), x[:, cut:]], 1) for x in (k, v))
    place = np.r_[:cut, np.zeros(empty, int), cut:length]
    ids = np.r_[np.ones(cut, int), np.zeros(empty, int), np.ones(length - cut, int)]
    held = Segments.from_ids(*(np.tile(x, (B, 1)) for x in (ids, place)))
    arrays = q[:, cut:], keys, values, embeddings, cotangent[:, cut:]
    y, dq, dk, dv, de = run(form, arrays, Segments.single(B, length - cut, offset=cut), held)
    dk, dv = (x[:, np.flatnonzero(ids)] for x in (dk, dv))
    expected = whole[0][:, cut:], whole[1][:, cut:], *whole[2:]
    close((y, dq, dk, dv, de), expected)


def test_later_keys_first():
    """Keys in two parts, the later one first, are all keys at once. Seen to fail: the sum of gates begun anew."""
    *arrays, cotangent = inputs(60)
    row = Segments.single(B, 60)
    earlier, later = (jax.tree.map(lambda x, part=part: x[:, part], row) for part in (slice(23), slice(23, None)))

    def parts(q, k, v, embeddings):
        visited = cope.attend(q, k[:, 23:], v[:, 23:], embeddings, row, later, chunk=16)
        return cope.attend(q, k[:, :23], v[:, :23], embeddings, row, earlier, visited, chunk=16).partial.output

    y, pull = jax.vjp(jax.jit(parts), *arrays)
    close((y, *pull(cotangent)), run("recurrent", (*arrays, cotangent), row))


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
    exact = cope.recurrent(*(x.astype(jnp.float32) for x in arrays), packed(75), packed(75))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-3)


def test_memory_is_linear():
    """Temporary memory of forward and backward at T and 4T. Seen to fail: the definition in place of the fast form."""

    def bytes_at(length):
        arrays = [jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype) for x in inputs(8)]
        arrays[3] = jax.ShapeDtypeStruct((N, K), jnp.float32)
        row = Segments.single(B, length)

        def loss(*arrays):
            return jnp.vdot(cope.chunked(*arrays[:4], row, row), arrays[4])

        compiled = jax.jit(jax.grad(loss, range(4))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_at(4096) <= 4.6 * bytes_at(1024)
