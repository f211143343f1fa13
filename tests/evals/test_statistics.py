"""Intervals that hold at the edges, and errors of means whose parts hang together."""

import numpy as np
import pytest

from longctx.evals.statistics import clustered, independent, wilson


@pytest.mark.parametrize(
    ("share", "trials", "expected"),
    [
        (1.0, 80, [0.9542, 1.0]),  # "± 0.0 %" before
        (0.0, 16, [0.0, 0.1936]),
        (0.5, 10, [0.2366, 0.7634]),
        (81 / 263, 263, [0.2553, 0.3662]),  # Newcombe 1998, table I
        (1 / 29, 29, [0.0061, 0.1718]),  # the same
    ],
)
def test_wilson(share, trials, expected):
    assert wilson(share, trials) == pytest.approx(expected, abs=5e-5)


def test_answers_of_a_row_are_not_independent():
    """Rows that are all right or all wrong are one trial each, however many answers they hold."""
    alike = np.repeat([0.0, 1.0], [3, 7])
    assert independent(alike, 1000) == pytest.approx(10)
    draws = np.random.default_rng(0)
    free = draws.binomial(100, 0.3, size=200) / 100
    assert 15_000 < independent(free, 20_000) <= 20_000
    assert independent(np.ones(4), 400) == 4
    assert independent(np.full(4, 0.5), 400) == 400


def test_clustered_error_is_of_documents():
    """Windows of one document that say the same are one observation; seen to fail with the error over windows."""
    of_documents = np.array([0.1, 0.4, 0.2, 0.9, 0.6])
    once = clustered(of_documents, range(5))
    assert once == pytest.approx((0.44, of_documents.std(ddof=1) / 5**0.5))
    assert clustered(np.repeat(of_documents, 10), np.repeat(range(5), 10)) == pytest.approx(once)
    assert clustered(of_documents, "aaaaa") == (pytest.approx(0.44), None)
    weights = np.array([1.0, 2, 3, 4, 5])
    mean, error = clustered(of_documents, range(5), weights)
    assert mean == pytest.approx(np.average(of_documents, weights=weights))
    assert error == pytest.approx(np.sqrt(5 / 4 * np.sum((weights * (of_documents - mean)) ** 2)) / 15)


def test_error_is_that_of_repeated_draws():
    """The clustered error against the spread of the mean over 400 draws of documents."""
    rng = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(400):
        names = np.repeat(range(20), rng.integers(1, 6, size=20))
        values = rng.normal(size=20)[names] + 0.3 * rng.normal(size=len(names))
        mean, error = clustered(values, names)
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
