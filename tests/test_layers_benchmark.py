"""benchmarks/layers.py measures its cells once, foretells what takes too long, and counts operations as they run."""

import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.system

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def layers(monkeypatch):
    """The script as a module, at tiny lengths and without peers, which need PyTorch."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location("layers_benchmark", BENCHMARKS / "layers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny = {"LENGTHS": (16, 32), "COUNTED": 32, "DECODED": (16,), "ENOUGH": 0.0, "PEERS": {}}
    for name, value in (tiny | {"machine": lambda: "a machine", "peak": lambda: 1e9}).items():
        monkeypatch.setattr(module, name, value)
    return module


def test_cells_are_measured_once_and_tabled(layers, tmp_path, monkeypatch):
    """Seen to fail: cells measured again."""
    file, names = tmp_path / "results" / "cells.jsonl", ["relu2", "retnet"]
    cells = layers.measure(names, file)
    keys = [json.loads(line)[0] for line in file.read_text().splitlines()]
    assert (
        keys
        == list(cells)
        == [
            *(f"{name} T={length}" for name in names for length in (16, 32)),
            *(f"{name} decoding=16" for name in names),
        ]
    )
    assert cells["retnet decoding=16"]["bytes"] == 4 * 4 * 64 * 64
    assert cells["relu2 T=32"]["operations"] == 32 * 2 * (2 * 256 * 512)

    monkeypatch.setattr(layers, "by_length", None)
    assert layers.measure(names, file) == cells  # all were found
    text = layers.report(names, cells)
    assert text.count("| relu2 |") == text.count("| retnet |") == 5
    assert "transformers" not in text
    cells["retnet T=32"]["both"] = None
    assert "— |" in layers.report(names, cells)


def test_what_would_take_too_long_is_foretold(layers, monkeypatch):
    """Seen to fail: the call made whatever is foretold."""

    def cell(seconds):
        return {"forward": seconds, "both": seconds and 3 * seconds}

    monkeypatch.setattr(layers, "LENGTHS", (16, 32, 64))
    cells = {"path T=16": cell(1.0)}
    assert layers.foretell(cells, "path", 32) == {"forward": 0, "both": 0}
    cells["path T=32"] = cell(4.0)
    assert layers.foretell(cells, "path", 64) == {"forward": 16, "both": 48}
    cells["path T=32"] = cell(None)
    assert layers.foretell(cells, "path", 64) == {"forward": float("inf"), "both": float("inf")}
    found = layers.by_length("relu2", 16, {"forward": 0, "both": 61})
    assert found["forward"] > 0
    assert found["both"] is None
    assert found["both bytes"] > 0


def test_operations_of_scans_count_as_often_as_they_run(layers):
    """Seen to fail: a scan's step counted once."""

    def program(x, w):
        def step(x, _):
            return jax.checkpoint(lambda x: x @ w)(x), None

        x = jax.lax.scan(step, x, length=5)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x, x)

    jaxpr = jax.make_jaxpr(program)(jnp.ones((2, 3)), jnp.ones((3, 3))).jaxpr
    assert layers.operations(jaxpr) == 7 * (2 * 2 * 3 * 3)


def test_without_peers_layers_are_measured_and_others_refused_first(layers, tmp_path, monkeypatch):
    """Neither torch nor transformers is here. Guards against an ImportError after all is measured."""
    timing = sys.modules["timing"]
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(timing.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(layers, "machine", timing.machine)
    cells = {"forward": 1.0, "both": 2.0, "forward bytes": 1, "both bytes": 2, "operations": 3}
    found = {f"cope T={length}": cells for length in (16, 32)} | {"cope decoding=16": {"microseconds": 1.0, "bytes": 2}}
    text = layers.report(["cope"], found)
    assert f"jax {jax.__version__}" in text
    assert "torch" not in text
    peer = type("Peer", (), {"layer": "swiglu", "name": "Llama"})()
    monkeypatch.setattr(layers, "PEERS", {"Llama": peer})
    monkeypatch.setattr(layers, "by_length", lambda *_: pytest.fail("measured before the peer was asked for"))
    with pytest.raises(SystemExit, match=r"not installed to measure against: torch, transformers; pip install"):
        layers.measure(["swiglu"], tmp_path / "cells.jsonl")
