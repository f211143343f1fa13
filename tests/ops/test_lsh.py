"""Attention within buckets: the fast form against the definition, and the definition against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.layers.lsh import LSH
from longctx.ops import lsh
from longctx.typing import Segments

BUCKETS, ROUNDS = 5, 3


def inputs(length):
    """Queries, keys, values, own values, hashes, and a cotangent; four heads in two groups."""
    rng = np.random.default_rng(0)
    shapes = (2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 6), (2, length, 4, 6)
    q, k, v, cotangent = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    numbers = (jnp.asarray(rng.integers(BUCKETS, size=(*x.shape[:3], ROUNDS)), jnp.int32) for x in (q, k))
    return q, k, v, v, *numbers, cotangent


def attend(arrays, segments, held=None, form=None, buckets=BUCKETS):
    q, k, v, own, hashes, key_hashes = arrays
    return lsh.LSH((q, own, hashes), (k, v, key_hashes), (), segments, held, form, buckets=buckets).y


def packed(length):
    """A document, padding, a document that ends with the row; and one document with padding at both ends."""
    ids = np.zeros((2, length), int)
    ids[0, : length // 3], ids[0, length // 3 + 2 :] = 1, 2
    ids[1, 3 : length - 5] = 4
    positions = np.where(ids > 0, np.arange(length) - np.array([[0], [3]]), 0)
    positions[0, length // 3 + 2 :] -= length // 3 + 2
    return Segments.from_ids(ids, positions)


def test_definition_is_the_formula():
    """Seen to fail: a key that agrees in several rounds counted once."""
    length = 23
    *arrays, _ = inputs(length)
    segments = packed(length)
    found = attend(arrays, segments, form="definition")
    q, k, v, _, q_hashes, k_hashes = (np.asarray(x, np.float64) for x in arrays)
    ids, positions = np.asarray(segments.ids), np.asarray(segments.positions)
    for b, t, h in np.ndindex(2, length, 4):
        total, out = 0.0, np.zeros(6)
        for s in range(length):
            if 0 < ids[b, t] == ids[b, s] and positions[b, s] < positions[b, t]:
                times = (q_hashes[b, t, h] == k_hashes[b, s, h // 2]).sum()
                weight = times * np.exp(q[b, t, h] @ k[b, s, h // 2] / np.sqrt(8))
                total, out = total + weight, out + weight * v[b, s, h // 2]
        alone = v[b, t, h // 2] if ids[b, t] else np.zeros(6)
        np.testing.assert_allclose(found[b, t, h], out / total if total else alone, atol=1e-5)


@pytest.mark.parametrize(("length", "pack"), [(1, False), (300, True)])
def test_fast_form_is_the_definition(length, pack):
    """Outputs and gradients, over several blocks of the longest row.

    Seen to fail: the order undone by itself in place of its inverse; keys with the documents of unsorted ones.
    """
    *arrays, cotangent = inputs(length)
    segments = packed(length) if pack else Segments.single(2, length)

    def run(form):
        def loss(q, k, v, own):
            y = attend((q, k, v, own, *arrays[4:]), segments, form=form)
            return jnp.vdot(y, cotangent), y

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays[:4])

    (gradients, y), (expected_gradients, expected) = run("chunked"), run("definition")
    for a, b in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    assert (np.asarray(y)[np.asarray(segments.ids) == 0] == 0).all()


def test_order_of_keys_is_free():
    """A span after a cache, its keys shuffled. Seen to fail: outputs put back in the order, not in its inverse."""
    q, k, v, own, q_hashes, k_hashes, _ = inputs(60)
    row = Segments.single(2, 60)
    whole = attend((q, k, v, own, q_hashes, k_hashes), row)
    order = np.random.default_rng(1).permutation(60)
    k, v, k_hashes, row = jax.tree.map(lambda x: x[:, order], (k, v, k_hashes, row))
    span = Segments.single(2, 19, offset=41)
    last = attend((q[:, 41:], k, v, own[:, 41:], q_hashes[:, 41:], k_hashes), span, row)
    np.testing.assert_allclose(last, whole[:, 41:], atol=1e-5)


def test_nearest():
    """Random vectors and their opposites: neighbours in angle agree more often than strangers; ties go to the first.

    Seen to fail: a direction and its opposite taken for one.
    """
    rng = np.random.default_rng(0)
    half = rng.standard_normal((1, 200, 2, 16))
    directions = jnp.asarray(np.concatenate([half, -half], axis=2), jnp.float32)
    x = rng.standard_normal((1, 3, 1, 16))
    x[:, 1] = x[:, 0] + 0.3 * x[:, 1]
    numbers, products = lsh.nearest(jnp.asarray(x, jnp.float32), directions)
    near, far = ((numbers[0, 0] == numbers[0, t]).mean() for t in (1, 2))
    assert near > 0.7 > 0.5 > far
    expected = np.einsum("k,rnk->rn", x[0, 0, 0], np.asarray(directions)[0])
    np.testing.assert_array_equal(numbers[0, 0, 0], expected.argmax(1))
    np.testing.assert_allclose(products[0, 0, 0], expected.max(1), rtol=1e-5)
    assert (lsh.nearest(-jnp.asarray(x, jnp.float32), directions)[0] == (numbers + 2) % 4).all()
    assert (lsh.nearest(jnp.zeros_like(x, jnp.float32), directions)[0] == 0).all()


@pytest.mark.parametrize(("buckets", "touched"), [(8, 8), (1, 36)])
def test_work_follows_the_buckets(buckets, touched, monkeypatch):
    """Of the 8 x 8 pairs of blocks of a row, those that hold a visible pair of tokens: 36 for causal attention.

    Seen to fail: rows left in the order of the tokens.
    """
    length, found = 256, []

    def count(q, k, v, pattern, mine, theirs, **options):
        seen = (mine.ids[0, :, None] == theirs.ids[0]) & pattern.mask(mine.positions[0, :, None], theirs.positions[0])
        found.append(np.asarray(seen).reshape(8, length // 8, 8, -1).any((1, 3)).sum())
        return attention_partial(q, k, v, pattern, mine, theirs, **options)

    attention_partial = lsh.attention_partial
    monkeypatch.setattr(lsh, "attention_partial", count)
    x, hashes = jnp.ones((1, length, 1, 2)), (jnp.arange(length) % buckets)[None, :, None, None]
    attend((x, x, x, x, hashes, hashes), Segments.single(1, length), buckets=buckets)
    assert found == [touched]


def test_the_layer_divides_logits_by_the_root_of_the_width():
    """By default. Seen to fail: a scale of 1."""

    def run(**options):
        layer = LSH(16, LSH.Config(heads=2, head_width=8, **options), nnx.Rngs(params=0))
        x = jax.random.normal(jax.random.key(0), (1, 20, 16))
        return layer(x, Segments.single(1, 20))[0]

    np.testing.assert_array_equal(run(), run(scale=8**-0.5))
    assert not np.allclose(run(), run(scale=1.0), atol=1e-3)
