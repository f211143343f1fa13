"""The laws of one layer run one after another, so that they share what is compiled of it (spans.py)."""

import pathlib

from laws.cases import LAYERS

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    own = [at for at, item in enumerate(items) if item.path.parent == HERE]
    order = {name: number for number, name in enumerate(LAYERS)}
    laws = [items[at] for at in own]
    laws.sort(key=lambda item: order.get(getattr(item, "callspec", None) and item.callspec.params.get("name"), -1))
    for at, item in zip(own, laws, strict=True):
        items[at] = item
