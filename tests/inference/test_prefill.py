"""Reading in spans, the last one padded, ends in the logits and the state of the whole prompt."""

import jax
import numpy as np
import pytest

from longctx.inference import Prefill
from longctx.inference.prefill import capacity_for, span_for
from longctx.typing import Segments

TOKENS = np.random.default_rng(0).integers(4, 260, (2, 37)).astype(np.int32)


@pytest.mark.parametrize(("length", "span"), [(37, 16), (37, 64), (32, 16)])
def test_spans_and_padding_change_nothing(model, length, span):
    """Fails if padding changes a state, or positions start anew with each span."""
    tokens = TOKENS[:, :length]
    logits, state = Prefill(model)(tokens, capacity=64, span=span)
    hidden, whole = jax.jit(lambda *span: model(*span))(tokens, Segments.single(2, length), model.init_state(2, 64))
    np.testing.assert_allclose(logits, model.logits(hidden)[:, -1], rtol=1e-4, atol=1e-4)
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_sizes():
    assert [span_for(length) for length in (1, 2, 3, 1000, 1024, 100_000)] == [1, 2, 4, 1024, 1024, 1024]
    assert [capacity_for(length) for length in (1, 256, 257, 2049, 5000, 9000)] == [256, 256, 512, 2560, 5120, 10240]


def test_prompt_must_fit(model):
    with pytest.raises(ValueError, match="room for 36"):
        Prefill(model)(TOKENS, capacity=36)
