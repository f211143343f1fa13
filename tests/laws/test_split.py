"""The law of split: a span is its parts, one after another; and what a state knows of the tokens before it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws.cases import COUNTING, ROWS, T, grow, inputs, layers, make, packed, part, shapes, slow
from laws.compare import OUTPUT_TOLERANCE, close, compare
from laws.spans import PART, span, weights

from longctx.layers import MIXERS, MLPS
from longctx.typing import Segments


@layers
def test_split(name):
    """`f(x, s) = f(x[:k], s) ++ f(x[k:], s_k)`, again and again, on packed rows, gradients through the state included.

    Seen to fail: the causal convolution's tail taken one token early; a document start ignored when the cache is
    appended to.
    """
    x, segments, state = np.asarray(inputs(T)), packed(ROWS, T), None
    dy = weights(x)
    whole = span(name, x, segments, dy=dy, losses=1)
    cuts = list(itertools.pairwise((0, 1, *range(1 + PART, T + 1, PART))))
    before, outputs = [], []
    for start, stop in cuts:
        before.append(state)
        y, state, _ = span(name, x[:, start:stop], part(segments, start, stop), state)
        outputs.append(y)
    of_params, of_x, of_state = [], [], None
    for (start, stop), state in zip(reversed(cuts), reversed(before), strict=True):
        pulled = span(name, x[:, start:stop], part(segments, start, stop), state, dy[:, start:stop], of_state, 1)
        params, along, of_state = pulled.gradients
        of_params.append(params)
        of_x.append(along)
    gradients = jax.tree.map(lambda *leaves: sum(leaves), *of_params), np.concatenate(of_x[::-1], axis=1)
    compare((np.concatenate(outputs, axis=1), gradients), (whole.y, whole.gradients[:2]))


GOING_ON = [name for name in (*MIXERS, *MLPS) if name not in COUNTING]


@pytest.mark.parametrize("name", ["attention", *slow(*(name for name in GOING_ON if name != "attention"))])
def test_without_segments_the_document_goes_on(name):
    """A span without segments goes on with the state's document. That all of a document needs none, `test_pack` says.

    Seen to fail: the document begun anew; positions counted from the span's start.
    """
    layer = nnx.merge(*make(name))
    x = inputs(24)

    @jax.jit
    def run(x):
        y, state = layer(x[:, :13], Segments.single(2, 13), layer.init_state(2, 24, x.dtype))
        return layer(x)[0], jnp.concatenate([y, layer(x[:, 13:], None, state)[0]], axis=1)

    whole, parts = run(x)
    close(parts, whole, OUTPUT_TOLERANCE, "output")


@pytest.mark.parametrize("name", sorted(COUNTING))
def test_who_cannot_know_where_a_span_stands_says_so(name):
    graph, params = shapes(name)

    def run(params, x):
        layer = nnx.merge(graph, params)
        return layer(x, None, layer.init_state(2, 24, x.dtype))

    with pytest.raises(ValueError, match=r"how many tokens of the document came before.*offset"):
        jax.eval_shape(run, params, inputs(24))


@layers
def test_padding_leaves_the_state(name):
    """A span padded on the right leaves the state that the span alone leaves: the next tokens come out the same.

    Seen to fail: the decay of padding left at its gate's value; padding written to the cache.
    """
    x, length = np.asarray(inputs(T)), 13
    ids = np.broadcast_to(np.arange(PART) < length, (2, PART)).astype(np.int32)
    padded = span(name, x[:, :PART], Segments.from_ids(ids, ids * np.arange(PART, dtype=np.int32))).state
    alone = None
    for t in range(length):
        alone = span(name, x[:, t : t + 1], Segments.single(2, 1, t), alone).state
    after, following = grow(None, np.full(2, length), PART), x[:, PART : 2 * PART]
    actual, expected = (span(name, following, after, state).y for state in (padded, alone))
    close(actual, expected, OUTPUT_TOLERANCE, "output")
