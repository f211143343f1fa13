"""What the path of a working directory may be, checked before anything is written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from longctx.errors import UsageError

PATTERN = "*?[\\"  # what Orbax, which looks for its files by patterns, does not find again
NAME = 255  # bytes of a name in a path at most
LONGEST = 4096  # bytes of a path, on Linux and macOS alike at most
ADDED = 256  # of them for what is in the folder: checkpoints/<step>.orbax-checkpoint-tmp-<time>/params/...
LEAST_FREE = 2**20  # bytes: room for a run's files without its checkpoints


def given(text: str) -> Path:
    """The folder that `--workdir` names, with `~` spelt out.

    Raises:
      UsageError: see `check`; or it begins with the home folder of an unknown user.
    """
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise UsageError(
            f"--workdir={text}: {text.split('/')[0]} is no user's home folder; give ./{text} if it is meant."
        )
    check(expanded)
    return Path(expanded)


def check(workdir: str | os.PathLike, flag: str = "--workdir") -> None:
    """Whether a run can be read and written back under this path, permissions aside.

    Args:
      workdir: the path.
      flag: what gave it, for messages.

    Raises:
      UsageError: it is remote, no folder, too long, or holds characters that Orbax cannot find again.
    """
    text = os.fspath(workdir)
    path = Path(text).absolute()
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise UsageError(
            f"{flag}={text} is not on a file system of this machine; give a folder there (a mounted bucket is one) "
            "and copy it when the run is done."
        )
    try:
        length = len(str(path).encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag}={text!a} is not UTF-8; name a folder whose whole path is.") from error
    if "\0" in text:
        raise UsageError(f"{flag}={text!r} holds a NUL, which no path can.")
    if found := sorted(set(PATTERN) & set(str(path))):
        raise UsageError(
            f"{flag}={text} has {' and '.join(found)} in its path {path}, so that its checkpoints could not be read "
            f"back; name, or rename, the folder without any of {' '.join(PATTERN)}."
        )
    if length + ADDED > LONGEST:
        raise UsageError(
            f"{flag}={_short(text)} is a path of {length:,} bytes; give one of at most {LONGEST - ADDED:,}, since "
            "checkpoints have longer ones."
        )
    if (longest := max(len(os.fsencode(part)) for part in path.parts)) > NAME:
        raise UsageError(f"{flag}={_short(text)} has a name of {longest} bytes in it; give names of at most {NAME}.")
    try:
        os.stat(path)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise UsageError(f"{flag}={_short(text)} cannot be a folder ({error.strerror}); name another.") from error
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                raise UsageError(
                    f"{flag}={text}: {place} is a link to {os.readlink(place)}, which is not there; make that first."
                ) from error
        return
    if not path.is_dir():
        raise UsageError(f"{flag}={text} is a file; name a folder, which training makes if need be.")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UsageError(f"{flag}={text} may not be read by you; change its permissions, or name another folder.")


def writable(workdir: str | os.PathLike, needed: int = LEAST_FREE) -> None:
    """Whether files can be written in the folder, or the folder be made.

    Args:
      workdir: one that passes `check`.
      needed: bytes that must be free there.

    Raises:
      UsageError: it is of the system, may not be written, or its disk is full.
    """
    path = Path(workdir).absolute()
    there = path.resolve()
    if there.parts[1:2] in [("proc",), ("sys",), ("dev",)] and there.parts[1:3] != ("dev", "shm"):
        raise UsageError(
            f"--workdir={workdir} is among the system's own files in /{there.parts[1]}; name another folder."
        )
    folder = next(place for place in (path, *path.parents) if place.exists())
    if not os.access(folder, os.W_OK | os.X_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise UsageError(
            f"--workdir={workdir} cannot be written: {folder} may not be changed by you; name another folder."
        )
    usage = shutil.disk_usage(folder)
    if usage.total > 0 and usage.free < needed:  # a file system that does not report its size has 0
        raise UsageError(
            f"--workdir={workdir} is on a disk with {usage.free / 2**20:,.1f} MiB free, and {needed / 2**20:,.1f} MiB "
            "are needed to save anything; make room, or name a folder elsewhere."
        )


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:60]}...{text[-40:]}"
