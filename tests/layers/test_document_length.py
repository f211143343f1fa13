"""Attention of every position kind depends on the document alone: not on padding, neighbours, devices, a cache's room.

The documents are longer than the trained length of every scheme that has one.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import config
from longctx.layers.attention import Attention
from longctx.layers.positions import Positions
from longctx.ops import positions, rotary
from longctx.parallel import mesh as meshes
from longctx.typing import Segments

WIDTH, TRAINED, LENGTH, ROW = 16, 16, 40, 64
OPTIONS = {"factor": 4.0, "trained": TRAINED, "local": 4, "group": 3, "window": 7, "span": 4096}
BY_LENGTH = ("dynamic_ntk", "longrope", "random")
SHIFT = 11  # tokens before the document in its row: padding, and another document


def make(kind, **options):
    """Attention with positions of this kind, their options as far as the kind has them."""
    cls = Positions.kinds[kind]
    scheme = cls(**{name: value for name, value in OPTIONS.items() if name in cls.__dataclass_fields__})
    options = Attention.Config(heads=2, kv_heads=1, head_width=8, positions=scheme, **options)
    return Attention(WIDTH, options, nnx.Rngs(0))


@functools.cache
def tokens(length=ROW):
    return jax.random.normal(jax.random.key(1), (1, length, WIDTH))


def packed(rows):
    """Segments of rows, each given as `(documents, ...)` of `(first, length)`."""
    ids, places = np.zeros((2, len(rows), ROW), np.int32)
    for row, documents in enumerate(rows):
        for number, (first, length) in enumerate(documents, 1):
            ids[row, first : first + length], places[row, first : first + length] = number, np.arange(length)
    return Segments.from_ids(ids, places)


@pytest.mark.parametrize("kind", sorted(Positions.kinds))
def test_the_document_alone_counts(kind):
    """Alone; in rows with padding before, between and after, and other documents; the same on 4 devices; and read
    into caches of other sizes. Seen to fail for `BY_LENGTH`: lengths of the row in place of the document's.
    """
    layer = make(kind)
    x = tokens()
    run = jax.jit(lambda x, segments, state=None: layer(x, segments, state)[0])
    document = x[:, SHIFT : SHIFT + LENGTH]

    @jax.jit
    def documents(x, segments):
        return [layer(x, segments, state)[0][0] for state in (None, layer.init_state(1, 256))]

    alone, cached = map(np.asarray, documents(document, Segments.single(1, LENGTH)))
    np.testing.assert_allclose(cached, alone, rtol=0, atol=3e-6)

    segments = packed([[(3, 5), (SHIFT, LENGTH), (54, 10)], [(SHIFT, LENGTH)]])
    rows = jnp.concatenate([x, x])
    whole = run(rows, segments)
    last = run(rows, packed([[(54, 10)], []]))[0, 54:]
    with jax.set_mesh(meshes.make(config.Mesh(1, 4, 1))):
        place = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, "context"))
        split = jax.device_get(run(*jax.device_put((rows, segments), place)))
    for found in (whole, split):
        np.testing.assert_allclose(found[0, SHIFT : SHIFT + LENGTH], alone, rtol=0, atol=3e-6)
        np.testing.assert_allclose(found[1, SHIFT : SHIFT + LENGTH], alone, rtol=0, atol=3e-6)
        np.testing.assert_allclose(found[0, 54:], last, rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", BY_LENGTH)
@pytest.mark.parametrize("pattern", ["Causal()", "Window(9) | Sinks(2)"])
def test_the_last_span_sees_the_length_so_far(kind, pattern):
    """Spans of any size, the last of one token or several, padded: what the last one gives is what the whole gives.

    Seen to fail: cached keys that keep the rotation of the length at which they came.
    """
    layer = make(kind, pattern=pattern)
    x = tokens()[:, :LENGTH]
    run = jax.jit(lambda x, segments, state: layer(x, segments, state))
    whole = run(x, Segments.single(1, LENGTH), layer.init_state(1, ROW))[0]
    for cuts in ((0, 13, 39, 40), (0, 20, 33, 40)):
        state = layer.init_state(1, ROW)
        for start, stop in itertools.pairwise(cuts):
            width = 1 if stop - start == 1 else 26
            ids, places = jnp.arange(width) < stop - start, start + jnp.arange(width)
            span = jnp.pad(x[:, start:stop], ((0, 0), (0, width - stop + start), (0, 0)))
            y, state = run(span, Segments.from_ids(ids[None], places[None]), state)
        np.testing.assert_allclose(y[:, : stop - start], whole[:, start:], rtol=0, atol=3e-6)


def test_lengths_of_documents():
    """Seen to fail: padding within a row taken for the end of the last document."""
    rows = packed([[(3, 5), (11, 40), (54, 10)], [], [(0, 64)]])
    expected = np.zeros((3, ROW), int)
    for row, first, length in ((0, 3, 5), (0, 11, 40), (0, 54, 10), (2, 0, 64)):
        expected[row, first : first + length] = length
    np.testing.assert_array_equal(rows.lengths, expected)
    np.testing.assert_array_equal(Segments.single(2, 5, 7).lengths, np.full((2, 5), 12))


@pytest.mark.parametrize("length", [TRAINED, 100, 100_000])
def test_rotation_by_an_array_of_lengths(length):
    """The rotation of `ops.positions.dynamic_ntk` at that length; angles between tokens hold at far positions."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 8, 1, 16)), jnp.float32)
    near = jnp.arange(8)[None]
    options = (16, 10_000.0, 2.0, TRAINED)
    expected = rotary.rotate(x, near, positions.dynamic_ntk(*options, length))
    found = positions.rotate_dynamic_ntk(x, near, jnp.full((1, 8), length), *options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    far = positions.rotate_dynamic_ntk(x, near + 10_000_000, jnp.full((1, 8), length), *options)[0, :, 0]
    found = found[0, :, 0]
    np.testing.assert_allclose(far @ far.T, found @ found.T, rtol=0, atol=2e-5)
