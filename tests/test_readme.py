"""The README is short, its layer runs as it stands there, links lead somewhere; CONTRIBUTING's layer is one."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.layers.basic import Linear
from longctx.ops import linear_scan
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def code(page: str, block: int = 0) -> str:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)[block]


def test_short():
    assert (ROOT / "README.md").stat().st_size <= 8 * 1024


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """To files, and to headings of them. Seen to fail: a page renamed; a heading renamed."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page.name} links to {target}"


def test_the_layer_of_the_readme():
    """It asserts what it shows, over all devices too. Seen to fail: the second span without the state."""
    exec(code("README.md"), {})


def test_the_layer_of_the_contributing_page():
    """Run as it stands there: two spans are one, and its parameters say what they are."""
    names = {"dataclasses": dataclasses, "jax": jax, "jnp": jnp, "nnx": nnx, "Linear": Linear, "Options": Options}
    names |= {"sequence": sequence, "linear_scan": linear_scan, "Segments": Segments}
    exec(code("CONTRIBUTING.md"), names)
    cls = names["DecayedSum"]
    layer = cls(8, cls.Config(hidden=6), nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(0), (2, 7, 8))

    @jax.jit
    def run(x):
        y, state = layer(x[:, :4], state=layer.init_state(2, 7))
        return layer(x)[0], jnp.concatenate([y, layer(x[:, 4:], state=state)[0]], axis=1)

    np.testing.assert_allclose(*run(x), atol=1e-5)
    assert [v.get_metadata().get("decays", False) for v in (layer.value.weight, layer.rate)] == [True, False]
