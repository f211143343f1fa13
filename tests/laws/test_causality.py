"""The law of causality: an output depends on its own document's tokens up to its own, and on nothing else."""

import numpy as np
import pytest
from laws.cases import ROWS, T, inputs, layers, packed
from laws.spans import span, weights


@layers
def test_causality(name):
    """The gradient of output t with respect to inputs after t, and to other documents, is exactly zero.

    The message names the row, both tokens and their documents. Seen to fail: Causal showing one token ahead.
    """
    x, segments = np.asarray(inputs(T)), packed(ROWS, T)
    ids, every = np.asarray(segments.ids), weights(x)
    for t in (0, 4, 5, 23, 24, 40, 53, 59):
        pulled = span(name, x, segments, dy=np.where(np.arange(T)[:, None] == t, every, 0))
        gradient = np.abs(pulled.gradients[1]).sum(-1)
        document = (np.arange(T) <= t) & (ids == ids[:, t : t + 1]) & (ids[:, t : t + 1] > 0)
        allowed = document | (np.arange(T) == t)  # what padding gives is nobody's business, if it reads itself alone
        for row, at in np.argwhere((gradient != 0) & ~allowed)[:1]:
            pytest.fail(f"output {t} of row {row}, {_what(ids[row, t])}, depends on input {at}, {_what(ids[row, at])}")
        for row in np.flatnonzero((gradient[:, t] == 0) & (ids[:, t] > 0)):
            pytest.fail(f"output {t} of row {row} does not depend on its own input")


def _what(document):
    return f"of document {document}" if document else "padding"
