"""benchmarks/capability.py runs no cell twice, and tables the rate that is best on validation rows."""

import argparse
import importlib.util
import pathlib
import sys

import chex
import numpy as np
import pytest
from flax import nnx

from longctx.training import loop, workdir

pytestmark = pytest.mark.system

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location("capability", BENCHMARKS / "capability.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def capability(script, monkeypatch):
    """The script, whose cells are made up: the higher the rate the better, until it diverges at 4e-3."""
    ran = []

    class Runner:
        def __init__(self, experiment):
            self._kind = experiment.data.kind

        def run(self, rate, seed):
            ran.append((self._kind, rate, seed))
            if rate == 4e-3:
                return {"diverged": "loss nan, gradient norm nan at step 3"}
            return {
                "validation": {"accuracy": 0.5, "loss": 1 - 100 * rate},
                "accuracy": {"16": 0.25 + 0.5 * seed, "32": 0.5},
                "parameters": 1000,
                "state_bytes": 64,
                "bounded": True,
                "training_seconds": 1.0,
                "seconds": 2.0,
            }

    monkeypatch.setattr(script, "Runner", Runner)
    script.ran = ran
    return script


def test_cells_are_run_once_and_tabled(capability, tmp_path):
    given = argparse.Namespace(
        size="smoke",
        rates=[1e-3, 2e-3, 4e-3],
        seeds=2,
        tasks=["mqar"],
        mixers=["gla", "gated_delta:heads=2"],
        cells=tmp_path / "cells.jsonl",
    )
    for mixer in given.mixers:
        capability.measure({}, "mqar", mixer, given)
    expected = [("mqar", 1e-3, 0), ("mqar", 2e-3, 0), ("mqar", 4e-3, 0), ("mqar", 2e-3, 1)]
    assert capability.ran == 2 * expected
    cells = capability.read(given.cells)
    assert len(cells) == 8
    assert [capability.measure(cells, "mqar", mixer, given) for mixer in given.mixers] == [[], []]  # all were found
    assert len(capability.ran) == 8
    text = capability.report(cells, given)
    row = "50.0 ± 35.4 | 50.0 ± 0.0 | 0.002 | 2 | 1,000 | 64 | 1 |"
    assert f"| `gla` | {row}" in text
    assert f"| `gated_delta:heads=2` | {row}" in text
    assert "| mixer | 16 | **32** |" in text
    assert "--tasks=mqar --mixers=gla,gated_delta:heads=2 --rates=0.001,0.002,0.004 --seeds=2 --size=smoke" in text
    given.rates = [1e-3, 2e-3]
    assert "| 0.002* |" in capability.report(cells, given)
    assert len(capability.ran) == 8  # a report runs nothing


def test_a_stopped_sweep_keeps_its_finished_cells(capability, tmp_path, monkeypatch):
    """And is not tabled before all rates are run.

    Seen to fail: cells written when all of a mixer are finished; the best of the rates so far taken for the best.
    """
    given = argparse.Namespace(
        size="smoke", rates=[1e-3, 2e-3], seeds=2, tasks=["mqar"], mixers=["gla"], cells=tmp_path / "cells.jsonl"
    )
    run = capability.Runner.run

    def stop_at_the_second_rate(self, rate, seed):
        if rate == 2e-3:
            raise KeyboardInterrupt
        return run(self, rate, seed)

    with monkeypatch.context() as stopping:
        stopping.setattr(capability.Runner, "run", stop_at_the_second_rate)
        with pytest.raises(KeyboardInterrupt):
            capability.measure({}, "mqar", "gla", given)
    cells = capability.read(given.cells)
    assert len(cells) == 1
    assert "| `gla` |" not in capability.report(cells, given)
    new = capability.measure(cells, "mqar", "gla", given)
    assert [(cell["rate"], cell["seed"]) for cell in new] == [(2e-3, 0), (2e-3, 1)]


def test_another_experiment_is_another_cell(capability):
    keys = {
        capability.digest("mqar", mixer, size, rate, seed)
        for mixer, size, rate, seed in (
            ("gla", "smoke", 1e-3, 0),
            ("rglru", "smoke", 1e-3, 0),
            ("gla", "small", 1e-3, 0),
            ("gla", "smoke", 2e-3, 0),
            ("gla", "smoke", 1e-3, 1),
            ("gla:heads=1", "smoke", 1e-3, 0),
        )
    }
    assert len(keys) == 6


def test_a_cell_is_the_training_of_the_experiment(script, tmp_path):
    """With rate and seed as arguments the parameters come out as those of `longctx.train`, for a second cell too.

    Fails if: the rate or the seed of the first cell were used in the second, or the rows were another seed's.
    """
    runner = script.Runner(script.experiment_of("state_tracking", "rglru", "smoke", 1.0, 0))
    for rate, seed in ((1e-3, 0), (3e-3, 5)):
        params, metrics, _ = runner.train(rate, seed)
        experiment = script.experiment_of("state_tracking", "rglru", "smoke", rate, seed)
        loop.train(experiment, tmp_path / str(seed), experiment.data)
        model, _ = workdir.load_model(workdir.open_run(tmp_path / str(seed)))
        expected = nnx.as_pure(nnx.split(model, nnx.Param)[1])
        chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-6)
        assert metrics.shape == (4, 2)


def test_a_loss_that_is_not_finite_is_told(script, monkeypatch):
    """Its cell has no accuracy, and the table leaves it out."""
    runner = script.Runner(script.experiment_of("state_tracking", "rglru", "smoke", 1.0, 0))
    monkeypatch.setattr(runner, "train", lambda *_: ({}, np.array([[2.0, 1.0], [2.0, np.inf], [np.nan, 1.0]]), 1.0))
    assert runner.run(1e-3, 0) == {"diverged": "loss 2.0, gradient norm inf at step 2"}
