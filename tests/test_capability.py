"""benchmarks/capability.py runs no cell twice, and tables the rate that is best on validation rows."""

import argparse
import importlib.util
import json
import pathlib
import sys

import pytest

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
    module = script
    module.ran = []

    def run(experiment):
        rate, seed = experiment.training.learning_rate, experiment.seed
        module.ran.append((experiment.data.kind, rate, seed))
        if rate == 4e-3:
            return {"diverged": "the loss is nan at step 3"}
        return {
            "validation": {"accuracy": 0.5, "loss": 1 - 100 * rate},
            "accuracy": {"16": 0.25 + 0.5 * seed, "32": 0.5},
            "parameters": 1000,
            "state_bytes": 64,
            "bounded": True,
            "training_seconds": 1.0,
            "seconds": 2.0,
        }

    monkeypatch.setattr(module, "run", run)
    return module


def test_cells_are_run_once_and_tabled(capability, tmp_path):
    given = argparse.Namespace(
        size="smoke",
        rates=[1e-3, 2e-3, 4e-3],
        seeds=2,
        tasks=["mqar"],
        mixers=["gla", "gated_delta:heads=2"],
        cells=tmp_path / "cells.jsonl",
    )
    file = given.cells
    for mixer in given.mixers:
        capability.sweep(capability.Cells(file), "mqar", mixer, given)
    expected = [("mqar", 1e-3, 0), ("mqar", 2e-3, 0), ("mqar", 4e-3, 0), ("mqar", 2e-3, 1)]
    assert capability.ran == 2 * expected
    assert len({json.loads(line)["experiment"] for line in file.read_text().splitlines()}) == 8

    cells = capability.Cells(file)
    for mixer in given.mixers:
        capability.sweep(cells, "mqar", mixer, given)
    assert len(capability.ran) == 8  # all were found
    text = capability.report(cells, given)
    row = "50.0 ± 35.4 | 50.0 ± 0.0 | 0.002 | 2 | 1,000 | 64 | 1 |"
    assert f"| `gla` | {row}" in text
    assert f"| `gated_delta:heads=2` | {row}" in text
    assert "| mixer | 16 | **32** |" in text
    assert "--tasks=mqar --mixers=gla,gated_delta:heads=2 --rates=0.001,0.002,0.004 --seeds=2 --size=smoke" in text
    given.rates = [1e-3, 2e-3]
    assert "| 0.002* |" in capability.report(cells, given)
    assert len(capability.ran) == 8  # a report runs nothing


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


def test_a_stopped_training_is_no_cell(script, monkeypatch, tmp_path):
    """Recorded, it would stand in the table for a layer that cannot learn the task."""
    monkeypatch.setattr(script.loop, "train", lambda *_: {"finished": False, "seconds": 1.0})
    with pytest.raises(SystemExit, match="stopped"):
        script.Cells(tmp_path / "cells.jsonl")("mqar", "gla", "smoke", 1e-3, 0)
    assert not (tmp_path / "cells.jsonl").exists()
