"""How far a job is: a bar on a terminal; elsewhere whole lines, few of them, so that a log stays a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

SECONDS = 30.0  # between two lines, where standard error is no terminal


class Progress:
    """A job's progress on standard error; a context manager.

    On a terminal it is a bar, drawn anew in place. Elsewhere, in a file or a pipe, a line is written at most every
    `SECONDS`, and one at the end of a job whose bar would stay.

    Args:
      name: of the job, such as "training".
      unit: of what is counted.
      total: units in all; None if that is not known.
      done: units before this.
      large: whether counts are shown in thousands and millions.
      stays: whether the end is shown once the job is done.
      shown: False shows nothing, as in all processes but the first.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        total: int | None = None,
        *,
        done: int = 0,
        large: bool = False,
        stays: bool = True,
        shown: bool = True,
    ):
        self.total, self.done = total, done
        self._stream: TextIO = sys.stderr
        self._look = {"prefix": name, "unit": unit, "unit_scale": large}
        self._stays, self._shown, self._note = stays, shown, ""
        self._start, self._first, self._said = time.monotonic(), done, -1
        self._last = self._start
        self._bar = None
        if shown and self._stream.isatty():
            look = {"desc": name, "unit": unit, "unit_scale": large, "leave": stays, "dynamic_ncols": True}
            self._bar = tqdm(total=total, initial=done, mininterval=0.5, file=self._stream, **look)

    def begin(self, total: int) -> None:
        """Counts anew from 0, to `total`."""
        self.total, self.done, self._first = total, 0, 0
        if self._bar is not None:
            self._bar.reset(total)

    def add(self, units: int = 1, note: str = "") -> None:
        """`units` more are done; `note` stands after the counts from now on."""
        self.done += units
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._last >= SECONDS:
            self._line()

    def say(self, message: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        elif self._shown:
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends it; to be called once."""
        if self._bar is not None:
            self._bar.close()
        elif self._stays and self.done != self._said:
            self._line()

    def _line(self) -> None:
        self._last, self._said = time.monotonic(), self.done
        if self._shown:
            seconds = self._last - self._start
            rate = (self.done - self._first) / seconds if seconds > 0 else None
            look = self._look | {"rate": rate, "postfix": self._note or None, "initial": self._first}
            line = tqdm.format_meter(self.done, self.total, seconds, ncols=0, **look)
            print(line, file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()
