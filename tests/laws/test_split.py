"""The law of split."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from laws.cases import COUNTING, ROWS, T, grow, inputs, layers, make, packed, part, slow
from laws.compare import OUTPUT_TOLERANCE, close, compare, with_gradients

from longctx.layers import MIXERS, MLPS
from longctx.typing import Segments


@layers
def test_split(name):
    """`f(x, s) = f(x[:k], s) ++ f(x[k:], s_k)`, again and again, on packed rows, gradients through the state included.

    Seen to fail: the causal convolution's tail taken one token early; a document start ignored when the cache is
    appended to.
    """
    graph, params = make(name)
    segments = packed(ROWS, T)

    def run(cuts, params, x):
        layer = nnx.merge(graph, params)
        state, outputs = layer.init_state(2, T, x.dtype), []
        for start, stop in itertools.pairwise(cuts):
            y, state = layer(x[:, start:stop], part(segments, start, stop), state)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)

    x = inputs(T)
    whole = with_gradients(functools.partial(run, (0, T)))(params, x)
    compare(with_gradients(functools.partial(run, (0, 1, 14, 54, T)))(params, x), whole)


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
    layer = nnx.merge(*make(name))
    with pytest.raises(ValueError, match=r"how many tokens of the document came before.*offset"):
        jax.eval_shape(lambda x: layer(x, None, layer.init_state(2, 24, x.dtype)), inputs(24))


@layers
def test_padding_leaves_the_state(name):
    """A span padded on the right leaves the state that the span alone leaves: the next tokens come out the same.

    Seen to fail: the decay of padding left at its gate's value; padding written to the cache.
    """
    graph, params = make(name)
    layer = nnx.merge(graph, params)
    x, length, padding = inputs(40), 21, 11
    after = grow(None, jnp.full(2, length), 8)

    @functools.partial(jax.jit, static_argnums=0)
    def run(padded, x):
        width = length + padded
        segments = Segments.from_ids(*(jnp.where(jnp.arange(width) < length, a, 0) for a in _ones(width)))
        _, state = layer(x[:, :width], segments, layer.init_state(2, 40, x.dtype))
        return layer(x[:, 32:], after, state)[0]

    close(run(padding, x), run(0, x), OUTPUT_TOLERANCE, "output")


def _ones(width):
    positions = jnp.broadcast_to(jnp.arange(width), (2, width))
    return jnp.ones_like(positions), positions
