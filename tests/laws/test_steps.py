"""The law of step: decoding is the full pass."""

import numpy as np
from laws.cases import ROWS, T, inputs, layers, packed, part
from laws.compare import OUTPUT_TOLERANCE, close
from laws.spans import PART, span


@layers
def test_step(name):
    """Token by token from a prefilled state = the full pass, across documents' starts.

    Seen to fail: the cache's ring one slot short of its window.
    """
    x, segments = np.asarray(inputs(T)), packed(ROWS, T)
    full = span(name, x, segments).y
    outputs, state = [], None
    for start, stop in [(0, PART), *((t, t + 1) for t in range(PART, T))]:
        y, state, _ = span(name, x[:, start:stop], part(segments, start, stop), state)
        outputs.append(y)
    valid = np.asarray(segments.valid)[..., None]
    close(np.concatenate(outputs, axis=1) * valid, full * valid, OUTPUT_TOLERANCE, "output")
