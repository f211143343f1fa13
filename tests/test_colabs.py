"""Every notebook in colabs/ runs from top to bottom, and is committed as it ran.

The cells check what their text claims, so a notebook that runs is right about the library.
"""

import os
import pathlib
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.system

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
assert NOTEBOOKS, "there are no notebooks in colabs/"
CELL_SECONDS = 150  # a minute for the whole notebook on two free cores; tests share theirs

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@notebooks
def test_runs(path, tmp_path):
    """Executed in a copy, with the tests' compiler flags. Any cell that raises fails, whatever its tags allow.

    Seen to fail: a cell of `1 / 0`, also with the tag `raises-exception`.
    """
    copy = shutil.copy(path, tmp_path)
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
    client = NotebookClient(
        nbformat.read(copy, as_version=4),
        timeout=CELL_SECONDS,
        kernel_name="python3",
        force_raise_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=environment)


@notebooks
def test_is_committed_as_it_ran(path):
    """All cells executed in order, without errors; the file small, and free of paths of the machine that ran it.

    Seen to fail: a cell not run, one out of order, an error output, a path under /root/, 700,000 characters more.
    """
    source = path.read_text(encoding="utf-8")
    assert len(source) < 700_000, f"{path.name} has {len(source)} characters; make its pictures smaller"
    assert not [place for place in ("/home/", "/root/", "/tmp/", "/Users/", str(ROOT)) if place in source]
    cells = [cell for cell in nbformat.reads(source, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
