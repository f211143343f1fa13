"""Files of a working directory: written in one move, or set aside where they are not what they should be."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


def replace(file: Path, content: str | bytes) -> None:
    """Writes a file so that readers find the old one or the new one, whole; text is UTF-8.

    A folder in its place is set aside.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    if file.is_dir() and not file.is_symlink():
        set_aside(file, "is no file")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def set_aside(path: Path, why: str) -> Path:
    """Renames what stands in the way to the first free `NAME.damaged-N`, and says so in a warning.

    Returns:
      Where it is now.
    """
    numbered = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    aside = next(place for place in numbered if not os.path.lexists(place))
    path.rename(aside)
    _log.warning("%s %s; it is kept as %s.", path, why, aside.name)
    return aside
