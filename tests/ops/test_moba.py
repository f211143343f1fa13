"""MoBA: the fast form against the definition, and the definition against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.moba import MOBA
from longctx.typing import Segments

BLOCK, COUNT = 8, 3
OPTIONS = {"block": BLOCK, "count": COUNT}


def inputs(length, keys=None):
    rng = np.random.default_rng(0)
    shapes = (2, length, 4, 8), (2, keys or length, 2, 8), (2, keys or length, 2, 6), (2, length, 4, 6)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def packed(length):
    """A document, padding, a document that ends with the row; and one document with padding at both ends."""
    ids = np.zeros((2, length), int)
    ids[0, : length // 3], ids[0, length // 3 + 2 :] = 1, 2
    ids[1, 3 : length - 5] = 4
    positions = np.where(ids > 0, np.arange(length) - np.array([[0], [3]]), 0)
    positions[0, length // 3 + 2 :] -= length // 3 + 2
    return Segments.from_ids(ids, positions)


def test_definition_is_the_formula():
    """Query by query. Seen to fail: one block more than `count` chosen."""
    length = 45
    q, k, v, _ = inputs(length)
    found = MOBA((q,), (k, v), segments=Segments.single(2, length), form="definition", **OPTIONS).y
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, t, h in np.ndindex(2, length, 4):
        own = t // BLOCK
        means = [k[b, c * BLOCK : (c + 1) * BLOCK, h // 2].mean(0) for c in range(own)]
        best = sorted(range(own), key=lambda c: -(means[c] @ q[b, t, h]))[: COUNT - 1]
        seen = [s for c in (*best, own) for s in range(c * BLOCK, (c + 1) * BLOCK) if s <= t]
        weights = np.exp(k[b, seen, h // 2] @ q[b, t, h] / np.sqrt(8))
        np.testing.assert_allclose(found[b, t, h], weights @ v[b, seen, h // 2] / weights.sum(), atol=1e-5)


@pytest.mark.parametrize(("length", "pack"), [(7, False), (70, True)])
def test_fast_form_is_the_definition(length, pack):
    """Outputs and gradients, and 0 for padding.

    Seen to fail: blocks of other documents chosen, or the own one once more; heads put together in another order; a
    block's first key in place of the mean.
    """
    *arrays, cotangent = inputs(length)
    segments = packed(length) if pack else Segments.single(2, length)

    def run(form):
        def loss(q, k, v):
            y = MOBA((q,), (k, v), segments=segments, form=form, **OPTIONS).y
            return jnp.vdot(y, cotangent), y

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    (gradients, y), (expected_gradients, expected) = run("chunked"), run("definition")
    for a, b in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    assert (np.asarray(y)[np.asarray(segments.ids) == 0] == 0).all()


def test_the_first_of_equal_blocks():
    """Keys that are all alike: the first blocks and the own are seen, all tokens alike. Seen to fail: the last ones."""
    length, row = 45, Segments.single(2, 45)
    q, _, v, _ = inputs(length)
    k = jnp.ones((2, length, 2, 8))
    for form in ("chunked", "definition"):
        found = MOBA((q,), (k, v), segments=row, form=form, **OPTIONS).y
        for t in (20, 44):
            seen = [*range(2 * BLOCK), *range(t // BLOCK * BLOCK, t + 1)]
            np.testing.assert_allclose(found[:, t], v[:, seen].mean(1).repeat(2, axis=1), atol=1e-5)
