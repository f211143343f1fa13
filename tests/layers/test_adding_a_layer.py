"""The layer of docs/adding_a_layer.md, as it stands there, under three of the laws."""

import importlib.util
import pathlib
import re
import sys

from laws import cases, test_form, test_pack, test_steps

from longctx.layers import MIXERS

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "adding_a_layer.md"


def test_the_layer_of_the_page(tmp_path, monkeypatch):
    """Seen to fail: `begin` without the segments; the state before the span returned."""
    file = tmp_path / "min_gru.py"
    file.write_text(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1])
    spec = importlib.util.spec_from_file_location("min_gru", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "min_gru", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(cases.LAYERS, "min_gru", ("min_gru", {}))
    MIXERS["min_gru"] = module.MinGRU
    try:
        test_pack.test_pack("min_gru")
        test_steps.test_step("min_gru")
        test_form.test_form("min_gru", test_form.AWKWARD)
    finally:
        del MIXERS["min_gru"]
