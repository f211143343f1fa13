"""What training measures: one line a step in WORKDIR/metrics.jsonl, TensorBoard scalars, a progress bar."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterable
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.scalar.summary import scalar_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.summary.writer.record_writer import RecordWriter

from longctx import config
from longctx.folder import files
from longctx.folder.rows import FILE, Row, keep, line, read
from longctx.progress import Progress


class Metrics:
    """Where the rows of a run go, one per step; a context manager.

    A row has `step` (from 1), `stage`, `loss`, `retrieval_accuracy`, which is `hits` of `answers` (None without any),
    `gradient_norm`, `learning_rate`, and `tokens` and `seconds` of the step alone; `heldout_loss` and
    `heldout_bits_per_byte` where they were measured after the step. Reading gives the same bits.

    The points past `step` are taken out of TensorBoard's files as well, so that a run that was interrupted has the
    curves of one that was not.

    Args:
      workdir: of the run; lines past `step`, from before an interruption, are removed from its file.
      training: for the number of steps, and how often scalars are logged.
      step: steps already done.
      chief: whether this process writes; the others only take part.
    """

    def __init__(self, workdir: Path, training: config.Training, step: int, chief: bool):
        self._training = training
        self._window: list[Row] = []
        self._chief = chief
        if chief:
            kept = keep(workdir, step)
            self._window = [row for row in kept if row["step"] > step - step % training.log_every]
            self._file = (workdir / FILE).open("a", encoding="utf-8")
            _forget(workdir / "logs", step)
            self._events = EventFileWriter(str(workdir / "logs"))
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))  # for a TensorBoard that is open
        self._bar = Progress("training", "step", training.steps, done=step, shown=chief)

    def record(self, row: Row) -> None:
        """Writes the row of the next step."""
        if not self._chief:
            return
        self._file.write(line(row))
        self._file.flush()
        for name in (name for name in row if name.startswith("heldout_")):
            self._add(row["step"], summary=scalar_pb(name.replace("_", "/", 1), row[name]))
        self._window.append(row)
        means = mean(self._window)
        if row["step"] % self._training.log_every == 0 or row["step"] == self._training.steps:
            for name, value in means.items():
                if value is not None:
                    self._add(row["step"], summary=scalar_pb(f"train/{name}", value))
            self._events.flush()
            self._window = []
        found = means["retrieval_accuracy"]
        retrieval = "none asked" if found is None else f"{found:.0%}"
        speed = f"{means['tokens_per_second']:,.0f} tokens/s"
        self._bar.add(note=f"loss {means['loss']:.3f}, retrieval {retrieval}, {speed}")

    def say(self, message: str) -> None:
        """A line above the bar."""
        self._bar.say(message)

    def _add(self, step: int, **what) -> None:
        """An event for TensorBoard."""
        self._events.add_event(Event(wall_time=time.time(), step=step, **what))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        # A full disk stops these as well; the first error is the one to report.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._bar.close()
            if self._chief:
                self._file.close()
                self._events.close()


def mean(rows: Iterable[Row]) -> Row:
    """Means over steps, of what layers record too; retrieval accuracy over all answers (None where there were none)."""
    rows = list(rows)
    answers = sum(row["answers"] for row in rows)
    steps = ("loss", "gradient_norm", *(name for name in rows[-1] if name.startswith("layers_")))
    return {name: sum(row[name] for row in rows) / len(rows) for name in steps} | {
        "retrieval_accuracy": sum(row["hits"] for row in rows) / answers if answers else None,
        "learning_rate": rows[-1]["learning_rate"],
        "tokens_per_second": sum(row["tokens"] for row in rows) / max(sum(row["seconds"] for row in rows), 1e-9),
    }


def summarise(workdir: Path, training: config.Training, done: int | None = None) -> Row:
    """The summary of a run: totals, the mean of the last `log_every` steps, whether it is finished.

    Args:
      workdir: of the run.
      training: for the number of steps, and how many are averaged.
      done: the steps that are asked about, those of a checkpoint; by default all that are logged.

    Returns:
      Among the rest `missing`, how many of these steps are not in the log; the totals are of the others.
    """
    rows = [row for row in read(workdir) if done is None or row["step"] <= done]
    done = max((row["step"] for row in rows), default=0) if done is None else done
    found = {"finished": done == training.steps, "steps": done, "missing": done - len(rows)}
    seconds, tokens = sum(row["seconds"] for row in rows), sum(row["tokens"] for row in rows)
    found |= {"tokens": tokens, "seconds": seconds}
    if not rows:
        return found
    last = mean(rows[-training.log_every :])
    return found | {
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "loss": last["loss"],
        "retrieval_accuracy": last["retrieval_accuracy"],
    }


def _forget(folder: Path, step: int) -> None:
    """Takes the points past `step` out of TensorBoard's files."""
    if os.path.lexists(folder) and not folder.is_dir():
        files.set_aside(folder, "is no folder")
    for file in folder.glob("events.out.tfevents.*"):
        events = list(RawEventFileLoader(str(file)).Load()) if file.is_file() else []
        kept = [event for event in events if Event.FromString(event).step <= step]
        if len(kept) < len(events):
            content = io.BytesIO()
            for event in kept:
                RecordWriter(content).write(event)
            files.replace(file, content.getvalue())
