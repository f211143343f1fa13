"""Names the process that was lost: a small process beside each one of a run.

    python -S longctx/training/watchman.py FOLDER INDEX COUNT

jax ends a process that has lost the first one by an abort, which no code of that process survives, and one whose
collective waits for a dead process may wait for long. So what names the dead stands beside the process, needs only
the standard library, and watches the lock that each watchman holds on FOLDER/INDEX: the kernel, or the server of the
files, lets go of it however the holder ended.

FOLDER/INDEX says who holds it and, below, how it ended; it is removed at a good end. The process speaks to its watchman
through stdin:

    watch       all are there; from now on, look after the others
    done        it ends as it should
    ended TEXT  it ends with an error that it reports itself
    failed      it ends with an error that a lost process may have caused

and says nothing if it is killed. Process 0 looks after all, the others after process 0.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import IO

HELD, TAKEN, NO_LOCKS = "held", "taken", "no locks"  # what it says on stdout as it begins
LOST = 3  # its exit code when it has named a process that was lost
LOOK, GRACE = 1.0, 10.0  # seconds between looks; for its process to end by itself
FOLLOWED = "it could not go on without another"


def hold(file: Path) -> IO[str]:
    """Opens and locks a file, until it is closed or its holder ends, however that is.

    Raises:
      BlockingIOError: another holds it.
      OSError: the file system has no locks.
    """
    own = file.open("a+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        own.close()
        raise
    return own


def name_of(process: int) -> str:
    """Of a process of this machine, for others to read."""
    return f"pid {process} on {socket.gethostname()}"


def holder(file: Path) -> str:
    """Who holds a file, and since when, as it says."""
    try:
        who = file.read_text(encoding="utf-8", errors="replace").strip() or "process"
        return f"{who} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(file.stat().st_mtime))}"
    except OSError:  # it has just ended
        return "process"


def write(own: IO[str], text: str) -> None:
    """Replaces what the file says."""
    own.seek(0)
    own.truncate()
    own.write(text)
    own.flush()


def lost(folder: Path, indices: list[int]) -> list[tuple[int, str, str]]:
    """`(index, who, how it ended)` of those whose locks are free."""
    found = []
    for index in indices:
        try:
            with (folder / str(index)).open(encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                who, _, how = file.read().partition("\n")
        except OSError:  # removed at a good end, or held
            continue
        found.append((index, who, how.strip()))
    return found


def name(folder: Path, others: list[int]) -> bool:
    """Names the processes that were lost, but for those that ended because of others; whether there were any."""
    found = lost(folder, others)
    for index, who, how in [one for one in found if one[2] != FOLLOWED] or found:
        print(
            f"error: process {index} ({who}) was lost: {how or 'it was killed, or its machine is gone'}. What was "
            "saved is whole: give all the same commands again, and they go on from there.",
            file=sys.stderr,
            flush=True,
        )
    return bool(found)


def watch(folder: Path, index: int, count: int) -> int:
    """Until the process ends; returns the exit code."""
    try:
        own = hold(folder / str(index))
    except BlockingIOError:
        print(TAKEN, flush=True)
        return 0
    except OSError:
        print(NO_LOCKS, flush=True)
        return 0
    process = os.getppid()
    who = f"{name_of(process)}\n"
    write(own, who)
    print(HELD, flush=True)
    others = [other for other in range(count) if other != index]
    said, first = b"", None
    while True:
        if select.select([0], [], [], LOOK)[0]:
            words = os.read(0, 4096)
            said += words
            if not words:
                break
        elif said and lost(folder, others if index == 0 else [0]):
            first = first or time.monotonic()
            if time.monotonic() - first > GRACE:
                os.kill(process, signal.SIGKILL)
                name(folder, others)
                write(own, who + FOLLOWED)
                return LOST
    words = said.decode(errors="replace").removeprefix("watch\n")
    if words == "done":
        (folder / str(index)).unlink()
        with contextlib.suppress(OSError):  # others are there
            folder.rmdir()
        return 0
    if words.startswith("ended "):
        write(own, who + words.removeprefix("ended "))
        return 0
    # Without a word it was killed, or jax ended it for want of process 0, whose watchman does not wait.
    end = time.monotonic() + (10 if words else 3 if index else 0)
    while time.monotonic() < end:
        if name(folder, others):
            write(own, who + FOLLOWED)
            return LOST
        time.sleep(LOOK / 4)
    if not words:
        print(f"error: process {index} ({who.strip()}) was killed, or crashed.", file=sys.stderr, flush=True)
    write(own, who + ("it failed, as its own log says" if words else "it was killed, or crashed"))
    return 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for its process
        signal.signal(number, signal.SIG_IGN)
    sys.exit(watch(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
