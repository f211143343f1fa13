"""The retrieval metric gives 1 to a model that looks the fact up and 0 to one that names another fact's value."""

import numpy as np
import pytest

from longctx.evals import needle
from longctx.evals.scorer import Scorer


@pytest.mark.parametrize(("broken", "expected"), [(False, 1.0), (True, 0.0)])
def test_oracle_and_its_opposite(oracle, corpus, broken, expected):
    """Fails if a wrong token of the row is scored, or the rows' order is mixed up."""
    scorer = Scorer(oracle(corpus.tokenizer, broken), tokens_per_batch=256)
    where = needle.depths(3)
    hits, rows = needle.grid(scorer, corpus, [64, 128], samples=5, facts=4, where=where, tail=16, seed=0)
    np.testing.assert_array_equal(hits, np.full((2, 3, 5), bool(expected)))
    assert len(set(rows)) == 2
    found = needle.summarise(hits, [64, 128], where, facts=4)
    assert found["accuracy"] == {"64": expected, "128": expected}
    assert found["guessing"] == 0.25


def test_model_without_memory_is_at_chance(bigram, corpus):
    """Fails if the metric finds an answer where none was learnt: 48 rows, 260 tokens to choose from."""
    scorer = Scorer(bigram, tokens_per_batch=1024)
    hits, _ = needle.grid(scorer, corpus, [64], samples=16, facts=4, where=needle.depths(3), tail=16, seed=0)
    assert hits.mean() < 0.15


def test_accuracy_is_told_per_depth():
    right = np.array([[4, 2, 0], [1, 1, 1]])  # of four
    found = needle.summarise(np.arange(4) < right[..., None], [64, 128], needle.depths(3), facts=8)
    assert found["accuracy"] == {"64": 0.5, "128": 0.25}
    assert found["grid"] == {"64": [1.0, 0.5, 0.0], "128": [0.25, 0.25, 0.25]}
    assert found["interval"]["64"] == pytest.approx([0.2538, 0.7462], abs=5e-5)
    assert found["asked"] == 12
    assert found["depths"] == [0, 0.5, 1]
