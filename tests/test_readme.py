"""The README is short, its layer runs as it stands there, links lead somewhere."""

import pathlib
import re

import pytest

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


def test_files():
    """That a page names are there, but for the one that a page makes. Seen to fail: a file renamed."""
    for page in PAGES:
        if page.name == "adding_a_layer.md":
            continue
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:longctx/)?[a-z]+/[\w/]+\.(?:py|md|txt|sh|yaml|ipynb))`", text):
            assert (ROOT / name).exists() or (ROOT / "longctx" / name).exists(), f"{page.name} names {name}"


def test_the_layer_of_the_readme():
    """It asserts what it shows, over all devices too. Seen to fail: the second span without the state."""
    exec(code("README.md"), {})
