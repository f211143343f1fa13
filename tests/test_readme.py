"""The README's table of layers says what is there: every registered kind, its files, and the bytes of its state; and
CONTRIBUTING's layer is one."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.layers import MIXERS, MLPS
from longctx.layers.basic import Linear
from longctx.ops import linear_scan
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments

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


def test_the_layer_of_the_contributing_page():
    """Run as it stands there: two spans are one, and its parameters say what they are."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    names = {"dataclasses": dataclasses, "jax": jax, "jnp": jnp, "nnx": nnx, "Linear": Linear, "Options": Options}
    names |= {"sequence": sequence, "linear_scan": linear_scan, "Segments": Segments}
    exec(code, names)
    cls = names["DecayedSum"]
    layer = cls(8, cls.Config(hidden=6), nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(0), (2, 7, 8))

    @jax.jit
    def run(x):
        y, state = layer(x[:, :4], state=layer.init_state(2, 7))
        return layer(x)[0], jnp.concatenate([y, layer(x[:, 4:], state=state)[0]], axis=1)

    np.testing.assert_allclose(*run(x), atol=1e-5)
    assert [v.get_metadata().get("decays", False) for v in (layer.value.weight, layer.rate)] == [True, False]
