"""The README's table of layers says what is there: every registered kind, its files, and the bytes of its state."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from longctx.layers import MIXERS, MLPS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in README.splitlines()
    if line.startswith("| `") and line.count("|") == 8
]


@pytest.mark.parametrize("name", [*MIXERS, *MLPS])
def test_a_layer_and_its_state(name):
    """Seen to fail: a layer's row removed; a state of twice the size."""
    cells = next((row for row in ROWS if name in re.findall(r"`(\w+)`", row[0])), None)
    assert cells is not None, f"the table has no row for '{name}'"
    cls = MIXERS.get(name) or MLPS[name]

    def state():
        return cls(64, cls.Config(), nnx.Rngs(params=0)).init_state(1, 1024, jnp.float32)

    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(state)))
    assert cells[5] == f"{size:,}"


def test_files_exist():
    """Seen to fail: a file renamed."""
    files = {file for row in ROWS for file in re.findall(r"`(\w+/\w+\.py)`", row[3])}
    assert files
    assert not [file for file in files if not (ROOT / "longctx" / file).exists()]
