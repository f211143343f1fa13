"""Keeps two commands that write the same files of a working directory apart.

WORKDIR/training.lock is held by the training of a run, WORKDIR/evaluating.lock by what writes a report, so that a run
can be evaluated while it trains; reading takes no lock. Who holds one is its content, and since when its time. The
kernel, or the server of the files, lets go of it however the holder ends: what a killed command left blocks nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax

from longctx.errors import UsageError
from longctx.folder import files
from longctx.training import watchman
from longctx.training.processes import from_first

TRIES, BETWEEN = 5, 0.1  # who only looks holds a lock for a moment

_log = logging.getLogger(__name__)


def check(workdir: Path, doing: str) -> None:
    """Whether WORKDIR/doing.lock is free now; nothing is written. Process 0 asks for all, since it will hold it.

    Raises:
      UsageError: it is held, by whom.
    """
    file = Path(workdir) / f"{doing}.lock"
    if jax.process_index() == 0 and file.is_file():
        with file.open(encoding="utf-8", errors="replace") as own:
            try:
                fcntl.flock(own, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(_taken(file)) from None
            except OSError:  # reported when it is to be held
                pass


@contextlib.contextmanager
def held(workdir: Path, doing: str) -> Iterator[None]:
    """Holds WORKDIR/doing.lock, which is removed at the end; process 0 holds it for all. Makes the folder if need be.

    Where the file system has no locks, a warning says so.

    Raises:
      UsageError: it is held by another command, or cannot be written.
    """
    file = Path(workdir) / f"{doing}.lock"
    own, problem = _take(file) if jax.process_index() == 0 else (None, None)
    if not from_first(problem is None):
        raise UsageError(problem or f"process 0 cannot hold {file}; see what it says.")
    try:
        yield
    finally:
        if own is not None:
            file.unlink(missing_ok=True)  # before it is free: so a command that waits for it finds it gone
            own.close()


def _take(file: Path) -> tuple[IO[str] | None, str | None]:
    """The lock, or the problem; neither where there are no locks."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(file) and not file.is_file():
            files.set_aside(file, "is no file")
        for attempt in range(TRIES):
            time.sleep(BETWEEN if attempt else 0)
            try:
                own = watchman.hold(file)
            except BlockingIOError:
                continue
            if file.exists() and os.path.samestat(os.fstat(own.fileno()), file.stat()):
                watchman.write(own, watchman.name_of(os.getpid()))
                return own, None
            own.close()  # its last holder has removed it
    except OSError as error:
        if error.filename is not None:
            return None, f"--workdir={file.parent} cannot be written ({error.strerror}); name another folder."
        file.unlink(missing_ok=True)  # it was opened, and then not locked
        _log.warning(
            "%s is on a file system without locks (%s), so two commands at once in it would not be noticed.",
            file.parent,
            error.strerror,
        )
        return None, None
    return None, _taken(file)


def _taken(file: Path) -> str:
    return (
        f"--workdir={file.parent} is in use by another run: its {watchman.holder(file)} is {file.stem} there; wait for "
        "it to end, or name another folder."
    )
