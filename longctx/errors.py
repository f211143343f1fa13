"""The one error that is the user's to mend, told in a sentence and without a traceback."""


class UsageError(ValueError):
    """A config, file, checkpoint or request that cannot be used.

    The message names what was given, what was expected and what to do. The commands print it on one line and
    exit with code 2, before anything is written.
    """
