"""WORKDIR/metrics.jsonl: the log of a run, one row a step. Lines that cannot be read are skipped."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from longctx.folder import files

FILE = "metrics.jsonl"
NUMBERS = ("loss", "gradient_norm", "learning_rate")  # that every row has
COUNTS = ("hits", "answers", "tokens", "seconds")  # the same, from 0 up

Row = dict[str, Any]

_log = logging.getLogger(__name__)


def read(workdir: Path) -> list[Row]:
    """The rows by step; of a step that is there twice, the later. Lines that are no rows are counted in a warning.

    A last line that was cut short by a kill is left out silently.
    """
    file = Path(workdir) / FILE
    rows, problem = _read(file)
    if problem:
        _warn(file, problem)
    return rows


def keep(workdir: Path, last: int) -> list[Row]:
    """Leaves the rows up to step `last` in the file, and returns them.

    A file with lines that are no rows, or what else is in its place, is set aside.
    """
    file = Path(workdir) / FILE
    rows, problem = _read(file)
    if problem:
        files.set_aside(file, problem)
    kept = [row for row in rows if row["step"] <= last]
    files.replace(file, "".join(line(row) for row in kept))
    return kept


def line(row: Row) -> str:
    """A row as text. Raises ValueError where a number is not finite."""
    return json.dumps(row, allow_nan=False) + "\n"


def _read(file: Path) -> tuple[list[Row], str | None]:
    """The rows, and what else there is, in words that follow the file's name."""
    if not file.is_file():
        return [], "is no file" if os.path.lexists(file) else None
    try:
        *lines, last = file.read_bytes().split(b"\n")
    except OSError as error:
        return [], f"cannot be read ({error.strerror})"
    found = [_row(text) for text in lines]
    rows = {row["step"]: row for row in (*found, _row(last)) if row is not None}
    bad = [number for number, row in enumerate(found, 1) if row is None]
    problem = f"has lines that are no rows of a step ({len(bad):,}, line {bad[0]:,} first)" if bad else None
    return [rows[step] for step in sorted(rows)], problem


@functools.cache  # a command reads the file more than once
def _warn(file: Path, problem: str) -> None:
    _log.warning("%s %s; the other steps are read.", file, problem)


def _row(text: bytes) -> Row | None:
    """What a line says; None where it is no row."""
    try:
        row = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 < row["step"] < 2**63:
        return None
    if not all(_number(row.get(name)) for name in NUMBERS + COUNTS) or any(row[name] < 0 for name in COUNTS):
        return None
    others = all(value is None or _number(value) for name, value in row.items() if name not in NUMBERS + COUNTS)
    return row if others and type(row.get("stage")) is int and row["stage"] >= 0 else None


def _number(value: Any) -> bool:
    """Whether it is a finite number; of a whole one, that a float can hold it."""
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float and math.isfinite(value)
