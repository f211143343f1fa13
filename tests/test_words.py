"""Plain words: phrases that a reader stumbles over stay out of the pages and the code."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
# Say instead: no one reads, closest, need, passed on, reported or given, rotated.
COY = re.compile(r"\b(nobody asks|likest|wish for themselves|handed on|told|turned)\b", re.IGNORECASE)


def test_plain_words():
    """Seen to fail: "are turned by their positions" in a docstring."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*pages, *(ROOT / "longctx").rglob("*.py")]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if COY.search(line)
    ]
    assert not found, "\n".join(found)
