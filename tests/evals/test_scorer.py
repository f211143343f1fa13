"""Scores are those of each row alone, whatever it is padded to and batched with, on one device or several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import config
from longctx.evals.scorer import Scorer
from longctx.parallel import mesh as meshes
from longctx.typing import Segments

ROWS = [np.random.default_rng(i).integers(4, 260, size) for i, size in enumerate((65, 18, 40, 65, 17))]


@pytest.fixture(scope="module")
def expected(model):
    """Losses and hits `[5, 16]` of the last 16 tokens of the rows, from the logits of one row by itself."""
    logits_of = jax.jit(lambda tokens: model.logits(model(tokens, Segments.single(1, 64))[0])[0])
    losses, correct = [], []
    for row in ROWS:
        read, targets = len(row) - 1, row[-16:]
        # Causal: zeros after the row change nothing before them, and one program serves all.
        logits = logits_of(jnp.pad(jnp.asarray(row[:-1]), (0, 64 - read))[None])[read - 16 : read]
        losses.append(-jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0])
        correct.append(logits.argmax(axis=1) == targets)
    return np.stack(losses), np.stack(correct)


def check(scorer, expected):
    scores = scorer(ROWS, length=64, tail=16)
    np.testing.assert_allclose(scores.losses, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(scores.correct, expected[1])


def test_scores_of_rows_of_several_lengths(model, expected):
    """Fails if padding is read as text, or rows are padded at the end instead of the front."""
    seen = []
    scorer = Scorer(model, tokens_per_batch=128, progress=seen.append)
    check(scorer, expected)
    assert scorer.batch(64) == 2
    assert seen == [128, 128, 64]


def test_scores_on_a_mesh(model, expected):
    """Fails if a device scores its part of a row from an empty state."""
    with jax.set_mesh(meshes.make(config.Mesh(2, 2, 1), jax.devices()[:4])):
        scorer = Scorer(model, tokens_per_batch=128)
        assert scorer.batch(64) == 2
        assert scorer.arrays(ROWS[1:2], 63, 16)[0].shape == (2, 64)  # both devices of a row have equal shares
        check(scorer, expected)


@pytest.mark.parametrize("size", [16, 66])
def test_rows_that_do_not_fit_are_refused(bigram, size):
    with pytest.raises(ValueError, match=f"A row has {size} tokens"):
        Scorer(bigram, 128).arrays([np.ones(size, np.int32)], length=64, tail=16)


def test_programs_are_shared_by_length(bigram):
    """One program serves all rows of a length, which is what keeps compilation short."""
    scorer = Scorer(bigram, tokens_per_batch=64)
    assert scorer.program(64, 16) is scorer.program(64, 16)
    assert scorer.program(64, 16) is not scorer.program(32, 16)
