"""The log of steps: what is no row of it is set aside and said, and stops nothing."""

import json
import logging
import os

import pytest

from longctx import config
from longctx.folder import files, rows
from longctx.training.metrics import Metrics, summarise

TRAINING = config.Training((config.Stage(9, 2, 8),), log_every=3)


def row(step):
    return {
        "step": step,
        "stage": 0,
        "loss": 5 - step / 8,
        "hits": 1.0,
        "answers": 2.0,
        "retrieval_accuracy": 0.5,
        "gradient_norm": 0.1,
        "learning_rate": 1e-3,
        "tokens": 16,
        "seconds": 0.5,
    }


LINES = [rows.line(row(step)).encode() for step in range(1, 7)]


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, logger="longctx")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("longctx")]


def changed(**fields):
    return rows.line(row(4) | fields).encode()


WRONG = {
    "empty": b"\n",
    "object": b"{}\n",
    "null": b"null\n",
    "number": b"3\n",
    "list": b"[1]\n",
    "half": LINES[3][:40] + b"\n",
    "text": b"\xff\xfe\x00 not text\n",
    "nul": b"\0" * 90 + b"\n",
    "utf-16": LINES[3].decode().encode("utf-16"),
    "two in one": LINES[3][:40] + LINES[4],
    "deep": b"[" * 100_000 + b"]" * 100_000 + b"\n",
    "digits": LINES[3].replace(b"16", b"9" * 5000),
    "nan": LINES[3].replace(b"0.1", b"NaN"),
    "infinity": LINES[3].replace(b"0.1", b"1e999"),
    "large": changed(tokens=2**63),
    "step is text": changed(step="4"),
    "step is true": changed(step=True),
    "step is a part": changed(step=4.5),
    "step 0": changed(step=0),
    "loss is none": changed(loss=None),
    "loss is text": changed(loss="5"),
    "negative": changed(seconds=-3.0),
    "stage is none": changed(stage=None),
    "other is a list": changed(heldout_loss=[1]),
    "bit": LINES[3].replace(b'"loss"', b'"lors"'),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_line_that_is_no_row(tmp_path, warned, wrong):
    """Readers leave it out and move nothing; a run that goes on keeps the file as it was beside its own."""
    content = b"".join([*LINES[:3], WRONG[wrong], *LINES[4:]])
    (tmp_path / rows.FILE).write_bytes(content)
    expected = [row(step) for step in (1, 2, 3, 5, 6)]
    if wrong == "utf-16":  # whose end is two bytes
        expected = [found for found in expected if found["step"] != 5]
    assert rows.read(tmp_path) == expected
    assert len(warned()) == 1
    assert "has lines that are no rows of a step (" in warned()[0]
    assert "line 4 first); the other steps are read" in warned()[0]
    assert [path.name for path in tmp_path.iterdir()] == [rows.FILE]
    assert summarise(tmp_path, TRAINING)["steps"] == 6
    with Metrics(tmp_path, TRAINING, 5, chief=True) as metrics:
        metrics.record(row(6))
    assert (tmp_path / f"{rows.FILE}.damaged-1").read_bytes() == content
    assert "kept as metrics.jsonl.damaged-1" in warned()[-1]
    assert [found["step"] for found in rows.read(tmp_path)] == [found["step"] for found in expected]
    assert all(json.loads(text) for text in (tmp_path / rows.FILE).read_text().splitlines())


def test_what_a_kill_leaves_is_not_told(tmp_path, warned):
    (tmp_path / rows.FILE).write_bytes(b"".join(LINES) + LINES[0][:30])
    assert rows.keep(tmp_path, 4) == [row(step) for step in (1, 2, 3, 4)]
    assert not warned()
    assert [path.name for path in tmp_path.iterdir()] == [rows.FILE]


def test_a_step_that_is_there_twice(tmp_path):
    """As two runs at once left it: by step, the later."""
    again = rows.line(row(2) | {"loss": 1.0}).encode()
    (tmp_path / rows.FILE).write_bytes(LINES[0] + LINES[2] + LINES[1] + again)
    assert [(found["step"], found["loss"]) for found in rows.read(tmp_path)] == [(1, 4.875), (2, 1.0), (3, 4.625)]


def folder(path):
    path.mkdir()
    (path / "inside").touch()


@pytest.mark.parametrize("form", [folder, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_something_else_in_a_files_place(tmp_path, warned, form):
    """Of the log and of TensorBoard's folder: read as if it were not there, set aside once a run goes on."""
    form(tmp_path / rows.FILE)
    (tmp_path / "logs").touch()
    assert rows.read(tmp_path) == []
    assert "metrics.jsonl is no file" in warned()[0]
    with Metrics(tmp_path, TRAINING, 5, chief=True) as metrics:
        metrics.record(row(6))
    assert rows.read(tmp_path) == [row(6)]
    assert {"metrics.jsonl.damaged-1", "logs.damaged-1"} < {path.name for path in tmp_path.iterdir()}


def test_a_file_that_may_not_be_read(tmp_path, warned, monkeypatch):
    (tmp_path / rows.FILE).write_bytes(LINES[0])

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert rows.read(tmp_path) == []
    assert "cannot be read (Permission denied)" in warned()[0]


def test_numbers_that_are_not_finite_are_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        rows.line(row(1) | {"gradient_norm": float("nan")})


def test_set_aside_takes_the_first_free_name(tmp_path):
    for number in (1, 2):
        (tmp_path / "x").write_text(str(number))
        assert files.set_aside(tmp_path / "x", "is damaged").name == f"x.damaged-{number}"
    assert (tmp_path / "x.damaged-1").read_text() == "1"


def test_replacing_leaves_the_old_one_where_the_disk_is_full(tmp_path, monkeypatch):
    files.replace(tmp_path / "x", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.replace(tmp_path / "x", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]
