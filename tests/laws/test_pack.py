"""The law of pack: a packed row is its documents."""

import itertools

import jax
import numpy as np
from flax import nnx
from laws.cases import ROWS, T, inputs, layers, make, packed
from laws.compare import OUTPUT_TOLERANCE, close
from laws.spans import span


def documents():
    """`(row, start, length)` of every document of the rows."""
    for row, lengths in enumerate(ROWS):
        at = 0
        for length in lengths:
            if length > 0:
                yield row, at, length
            at += abs(length)


@layers
def test_pack(name):
    """A packed row = its documents, each alone in a row; padding gives what it may, documents do not see it.

    Seen to fail: document starts dropped from `Segments`; positions counted wrongly within the document.
    """
    x = np.asarray(inputs(T))
    y = span(name, x, packed(ROWS, T)).y
    found = list(documents())
    for pair in itertools.zip_longest(found[::2], found[1::2], fillvalue=found[0]):
        rows, segments = np.array(x), packed([[length, length - T] for _, _, length in pair], T)
        for i, (row, at, length) in enumerate(pair):
            rows[i, :length] = x[row, at : at + length]
        alone = span(name, rows, segments).y
        for i, (row, at, length) in enumerate(pair):
            where = f"row {row}, document at {at}: "
            close(y[row, at : at + length], alone[i, :length], OUTPUT_TOLERANCE, where)


@layers
def test_without_segments(name):
    """Documents in rows of their own, without segments, are what they are in a packed row: of 30 tokens, and of one.

    Seen to fail: without segments, a document whose first token is not its start.
    """
    graph, params = make(name)
    x = np.asarray(inputs(T))
    y = span(name, x, packed(ROWS, T)).y
    at = {size: [(row, at) for row, at, length in documents() if length == size] for size in (30, 1)}

    @jax.jit
    def alone(params, *given):
        layer = nnx.merge(graph, params)
        return [layer(x)[0] for x in given]

    def cut(x, size):
        return np.stack([x[row, start : start + size] for row, start in at[size]])

    close(alone(params, cut(x, 30), cut(x, 1)), [cut(y, 30), cut(y, 1)], OUTPUT_TOLERANCE, "documents of 30 and 1: ")
