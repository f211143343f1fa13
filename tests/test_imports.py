"""Imports run one way: typing ← ops ← parallel ← folder, memory ← layers ← models ← training ... ← commands."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import longctx

ROOT = pathlib.Path(longctx.__file__).parent
# A module may import from lower ranks and from its own package, never from a sibling of the same rank.
RANK = {
    "errors": 0,
    "progress": 0,
    "provenance": 0,
    "typing": 0,
    "schema": 1,
    "architecture": 1.5,
    "plugins": 1.5,
    "config": 2,
    "ops": 3,
    "data": 3,
    "parallel": 4,
    "folder": 5,
    "memory": 5,
    "layers": 6,
    "models": 7,
    "training": 8,
    "evals": 8,
    "inference": 8,
    "overrides": 8.5,
    "compilation": 0,
    "commands": 9,
    "planning": 9,
    "train": 10,
    "evaluate": 10,
    "generate": 10,
    "options": 9,
    "plan": 10,
    "compare": 10,
}


def part_of(module):
    """`longctx.ops.attention` is of the part `ops`; the package itself, which imports nothing, of none."""
    return module.split(".")[1] if "." in module else None


def imported(path):
    """The modules of longctx that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("longctx"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "longctx":
            if node.module == "longctx":
                yield from (f"longctx.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    """Seen to fail: `from longctx.layers import MIXERS` in ops/linear_scan.py."""
    here = part_of(".".join(("longctx", *path.relative_to(ROOT).with_suffix("").parts)))
    for module in imported(path):
        there = part_of(module)
        if there is None or here == "__init__":
            continue
        assert there == here or RANK[there] < RANK[here], f"{here} imports {module}, which stands beside or above it"


def test_experiments_import_only_config():
    """An experiment file is data and imports nothing of the package. Seen to fail: `import longctx` in one of them."""
    for path in (ROOT.parent / "experiments").glob("*.py"):
        assert not list(imported(path)), f"{path.name} imports longctx"


def test_the_package_alone_is_light():
    """`longctx.load` imports what it needs when it is called."""
    program = "import sys, longctx; assert longctx.load and 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT.parent)}, check=True)
