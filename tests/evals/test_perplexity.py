"""The final block is the same for every context, and the sums over it are right."""

import numpy as np
import pytest

from longctx import data
from longctx.evals import perplexity
from longctx.evals.scorer import Scores


class Recorder:
    """Takes rows as `Scorer` does and keeps them; the loss of a token is its id / 100."""

    def __init__(self):
        self.rows = {}

    def __call__(self, rows, length, tail):
        assert all(len(row) <= length + 1 for row in rows)
        self.rows[len(rows[0])] = rows
        losses = np.stack([row[-tail:] for row in rows]) / 100
        return Scores(losses, losses > 0)


def store(lengths):
    offsets = np.cumsum([0, *lengths])
    return data.TokenStore(
        np.arange(offsets[-1] + 1, dtype=np.int32),
        offsets,
        ("",) * len(lengths),
        np.array(lengths),
        ("",) * len(lengths),
    )


def test_final_block_is_the_same_for_every_context():
    """Fails if windows are cut from their start, so that a longer context moves the block."""
    documents = store((500, 100, 330))
    cut = perplexity.windows(documents.lengths, context=256, block=32, count=6)
    scorer = Recorder()
    shapes = {64: 128, 128: 200, 256: 287}
    blocks, whole = perplexity.final_block(scorer, documents, cut, block=32, shapes=shapes)
    assert set(scorer.rows) == {96, 160, 288}
    for context in shapes:
        for i, row in enumerate(scorer.rows[context + 32]):
            longest = scorer.rows[288][i]
            np.testing.assert_array_equal(row, longest[-len(row) :])  # less context, and nothing else differs
        np.testing.assert_array_equal(blocks[context], blocks[256])
    assert whole.shape == (6, 287)


@pytest.mark.parametrize("count", [1, 3, 7, 100])
def test_windows_fit_and_do_not_overlap(count):
    """Fails if two windows of a document share tokens of their final blocks."""
    lengths, context, block = np.array([500, 90, 287, 288, 420]), 256, 32
    found = perplexity.windows(lengths, context, block, count)
    room = 1 + (500 - 288) // 32 + 1 + 1 + (420 - 288) // 32
    assert len(found) == min(count, room)
    taken = {(w.document, token) for w in found for token in range(w.end - block, w.end)}
    assert len(taken) == len(found) * block
    assert all(context + block <= w.end <= lengths[w.document] for w in found)
    if count == 3:
        assert sorted(w.document for w in found) == [0, 3, 4]  # shared out before any document has two


def test_contexts():
    assert perplexity.contexts(4096) == [64, 128, 256, 512, 1024, 2048, 4096]
    assert perplexity.contexts(600) == [64, 128, 256, 512, 600]
    assert perplexity.contexts(64) == [64]
    assert perplexity.contexts(50) == [50]


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [
        ((5000, 30), 4096),  # one document is enough for what is wanted
        ((4000, 3000, 1300, 1200, 100), 1024),  # four have room for 1024 and a block of 128
        ((4000, 700), 512),
        ((150, 150, 150, 150), 0),
        ((), 0),
    ],
)
def test_longest_context_that_documents_allow(lengths, longest):
    assert perplexity.longest_context(np.array(lengths, int), wanted=4096, block=128) == longest


def test_summary_of_known_losses():
    """Fails if the errors of the gain are not of pairs: the windows differ far more than the gain does."""
    rng = np.random.default_rng(0)
    base = rng.normal(3.0, 1.0, size=(20, 1)) + rng.normal(0, 0.1, size=(20, 16))
    found = perplexity.summarise({64: base + 0.4, 256: base, 1024: base - 0.2}, range(20))
    assert found["final_block"]["256"] == pytest.approx(np.exp(base.mean()))
    assert found["final_block"]["64"] == pytest.approx(np.exp(base.mean() + 0.4))
    assert (found["gain"]["from"], found["gain"]["to"]) == (256, 1024)
    assert found["gain"]["fraction"] == pytest.approx(1 - np.exp(-0.2))
    assert found["gain"]["standard_error"] < 1e-6
    spread = np.exp(base.mean()) * base.mean(axis=1).std(ddof=1) / np.sqrt(20)
    assert found["standard_error"]["256"] == pytest.approx(spread)


def test_errors_are_over_documents():
    """Ten windows of each of two documents are not twenty observations; one document gives no error at all."""
    losses = np.repeat([2.0, 3.0], 10)[:, None] * np.ones((20, 4))
    found = perplexity.summarise({64: losses}, np.repeat([0, 1], 10).tolist())
    assert found["standard_error"]["64"] == pytest.approx(np.exp(2.5) * 0.5)
    alone = perplexity.summarise({64: losses}, [0] * 20)
    assert alone["standard_error"]["64"] is None
    assert alone["gain"]["standard_error"] is None
    assert perplexity.by_position(losses, [0] * 20)[0]["standard_error"] is None


def test_what_no_float_holds_is_not_finite():
    found = perplexity.summarise({64: np.full((2, 4), 800.0), 128: np.full((2, 4), np.nan)}, [0, 1])
    assert found["final_block"]["64"] == np.inf
    assert np.isnan(found["final_block"]["128"])


def test_loss_by_position():
    """Every scored token is in one bucket; the last takes in what would be a short one."""
    losses = np.tile(np.arange(1.0, 70.0), (3, 1))  # column j is the token at position j + 1
    buckets = perplexity.by_position(losses, range(3))
    assert [(b["from"], b["to"]) for b in buckets] == [(1, 15), (16, 31), (32, 69)]
    assert [b["loss"] for b in buckets] == [8, 23.5, 50.5]
