"""Errors that are told in a sentence, without a traceback."""


class UsageError(ValueError):
    """A config, file, checkpoint or request that cannot be used.

    The message names what was given, what was expected and what to do. The commands print it on one line and
    exit with code 2, before anything is written.
    """


class RunError(RuntimeError):
    """What ended a run from outside: a disk that is full, a process that was lost.

    The message says what is left and how to go on. The commands print it on one line and exit with code 1.
    """
