"""Errors that are reported in a sentence, without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UsageError(ValueError):
    """A config, file, checkpoint or request that cannot be used.

    The message names what was given, what was expected and what to do. The commands print it on one line and
    exit with code 2, before anything is written.
    """


class RunError(RuntimeError):
    """What ended a run from outside: a disk that is full, a process that was lost.

    The message says what is left and how to go on. The commands print it on one line and exit with code 1.
    """


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Reports what a layer refuses while it is traced (a ValueError) as a UsageError that begins with `what`.

    Args:
      what: what was traced, and of which size, such as "training.stages[0], rows of 64 tokens".
    """
    try:
        yield
    except UsageError:
        raise
    except (ValueError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{what}: {lines[0]}") from error
