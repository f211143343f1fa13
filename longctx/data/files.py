"""Files that a user names: read whole, or refused in a sentence."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from longctx.errors import UsageError


def find(text: str, what: str) -> Path:
    """The path that `text` names, `~` spelt out, whether there is something or not.

    Args:
      text: as it was given.
      what: names it in errors, such as "data.path".

    Raises:
      UsageError: when no file can have this path, or it cannot be looked at.
    """
    shown = text if len(text) <= 120 else f"{text[:60]}...{text[-40:]}"
    try:
        path = Path(text).expanduser()
        path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise UsageError(f"{what} is '{shown}', which cannot be read ({error.strerror}); give another") from error
    except (RuntimeError, ValueError) as error:  # an unknown user's home, a NUL
        raise UsageError(f"{what} is {shown!r}, which no file can be ({error}); give another") from error
    return path


def read(path: Path, name: str, most: int | None = None) -> bytes:
    """What a regular file holds.

    Args:
      path: of the file.
      name: of the file in errors.
      most: bytes that it may have; None for any number.

    Raises:
      UsageError: when it is no regular file, which may have no end, or is too large, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{name} cannot be read (it is no regular file); give a file of text")
        if most is not None and status.st_size > most:
            raise UsageError(f"{name} has {status.st_size:,} bytes; give a file of at most {most:,}")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{name} cannot be read ({error.strerror}); give a file of text") from error


def decode(content: bytes, name: str) -> str:
    """UTF-8 text without a byte order mark.

    Raises:
      UsageError: when it is other text, or none.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte {content[error.start]:#04x} at {error.start:,}"
        raise UsageError(f"{name} is not UTF-8 text ({place}); convert it or take it away") from error
    if "\0" in text:
        raise UsageError(f"{name} is not text: it holds a NUL at character {text.index(chr(0)):,}; take it away")
    return text
