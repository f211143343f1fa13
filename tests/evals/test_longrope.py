"""LongRoPE's search on losses whose best factors are known."""

import numpy as np
import pytest

from longctx.evals import longrope
from longctx.ops import positions

WIDTH, BASE, FACTOR, TRAINED = 32, 10_000.0, 8.0, 2048
SMALL = {"population": 16, "parents": 8, "mutations": 4, "crossings": 4, "iterations": 10}
TARGET = np.array([1, 1, 1, 1.1, 1.1, 1.4, 2, 2.3, 3, 3.5, 4.4, 6, 7, 8.5, 9, 9.6])


class Loss:
    """Squared distance of logarithms, and all that was asked for."""

    def __init__(self, target=TARGET):
        self.asked, self.target = [], target

    def __call__(self, factors):
        self.asked.append(tuple(factors))
        return float(np.sum(np.log(factors / self.target) ** 2))


def search(loss, **options):
    return longrope.search(loss, WIDTH, BASE, FACTOR, TRAINED, **options)


def test_finds_better_factors_than_it_began_with():
    """A fiftieth of the loss of the schemes it begins with, and less. Seen to fail: the worst taken for parents."""
    loss = Loss()
    found = search(loss)
    theta = positions.rope(WIDTH, BASE).frequencies
    schemes = positions.linear(WIDTH, BASE, FACTOR), positions.yarn(WIDTH, BASE, FACTOR, TRAINED)
    assert found.loss < 0.02 * min(Loss()(theta / scheme.frequencies) for scheme in schemes)
    assert found.loss == loss(found.factors) == found.history[-1]
    assert len(found.history) == 41
    assert (np.diff(found.history) <= 0).all()


def test_every_individual_is_in_order_and_asked_for_once():
    """Within bounds, non-decreasing, on the grid. Seen to fail: crossings not tested; no memory of losses."""
    loss = Loss()
    search(loss)
    assert len(set(loss.asked)) == len(loss.asked) <= 64 + 40 * 32
    asked = np.array(loss.asked)
    assert (np.diff(asked, axis=1) >= 0).all()
    assert asked.min() >= 1
    assert asked.max() <= 1.25 * FACTOR + 1e-9
    np.testing.assert_allclose(asked * 100, np.rint(asked * 100), atol=1e-6)


def test_begins_with_the_known_schemes():
    """PI, NTK and YaRN to the step, and then others. Seen to fail: λ inverted."""
    loss = Loss()
    search(loss, **SMALL | {"iterations": 0})
    assert len(loss.asked) == 16
    theta = positions.rope(WIDTH, BASE).frequencies
    np.testing.assert_allclose(loss.asked[0], FACTOR, atol=0.006)
    np.testing.assert_allclose(loss.asked[1], FACTOR ** (np.arange(16) / 15), atol=0.006)
    yarn = positions.yarn(WIDTH, BASE, FACTOR, TRAINED).frequencies
    np.testing.assert_allclose(loss.asked[2], theta / yarn, atol=0.006)


def test_seed():
    one, same, other = (search(Loss(), seed=seed, **SMALL) for seed in (0, 0, 1))
    assert (one.factors == same.factors).all()
    assert one.history == same.history != other.history


def test_all_there_are():
    """A single pair of channels has 26 factors: the search asks for each and ends, and the best is exact."""
    loss = Loss(np.array([1.17]))
    found = longrope.search(loss, 2, BASE, 1.0, TRAINED, **SMALL)
    assert sorted(x for (x,) in loss.asked) == pytest.approx(1 + 0.01 * np.arange(26))
    assert found.factors == pytest.approx([1.17])


def test_losses_that_are_not_finite():
    """NaN is the worst, never the best. Seen to fail: NaN as it comes."""

    def loss(factors):
        return float("nan") if factors[0] > 1 else -factors[-1]

    found = search(loss, **SMALL)
    assert np.isfinite(found.loss)
    assert found.factors[0] == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"parents": 1}, "parents is 1; expected at least 2"),
        ({"population": 20}, "population is 20; expected at least 32"),
        ({"probability": 0.0}, r"probability is 0\.0, step is 0\.01; expected 0 < probability <= 1 and step > 0"),
    ],
)
def test_refusals(options, told):
    with pytest.raises(ValueError, match=told):
        search(Loss(), **options)
    with pytest.raises(ValueError, match=r"factor is 0\.5; expected the length to reach over the trained length"):
        longrope.search(Loss(), WIDTH, BASE, 0.5, TRAINED)
