"""What every command shares: flags, quiet logs, and errors in a sentence.

A command ends with code 0, or 2 when what it was given cannot be used (nothing is written then), or 1 when training
met a loss that is not finite, a full disk, or a process that was lost (jax or its watchman may end it by a signal
then). Of several processes, each has written its name in WORKDIR/processes before anything is refused.
`python -m longctx.<command> --help` lists its flags.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from longctx import compilation, config, schema
from longctx.data import TASKS
from longctx.errors import RunError, UsageError
from longctx.folder import path as paths
from longctx.layers import MIXERS, MLPS
from longctx.models import checks
from longctx.overrides import ExperimentParser, RunParser
from longctx.training import processes

_CONFIG = (
    "The experiment file, as FILE.py or FILE.py:ARGUMENT; --config.a.b=VALUE overrides a field of it, or sets one that "
    "it leaves out. `python -m longctx.options` lists them."
)
_OF_RUN = "--config.a.b=VALUE overrides a field of the run's config.json, of its evaluation and data.path alone."
_WORKDIR = re.compile(r"--?workdir(=|$)")
flags.disclaim_key_flags()  # so that `--help` of a command lists the flags that it has from here


def define_config() -> None:
    """Defines `--config=FILE.py[:ARGUMENT]` and its overrides, `--config.a.b=VALUE`."""
    config_flags.DEFINE_config_file("config", None, _CONFIG)
    flags.FLAGS["config"].parser = ExperimentParser(name="config")


def define_workdir() -> None:
    """Defines `--workdir`."""
    flags.DEFINE_string("workdir", None, "The folder that a run writes and reads everything in.")


def define_run() -> None:
    """Defines `--workdir`, and `--config.a.b=VALUE` for every field of the config.json of the run there."""
    define_workdir()
    config_flags.DEFINE_config_file("config", None, _OF_RUN)
    flags.FLAGS["config"].parser = RunParser(name="config")
    given = iter(sys.argv[1:])
    values = (word.split("=", 1)[1] if "=" in word else next(given, "") for word in given if _WORKDIR.match(word))
    sys.argv[1:1] = [f"--config={value}" for value in values][:1]  # before its overrides, as the flag wants it


def define_mesh(default: str) -> None:
    """Defines `--mesh`; `default` says what it is without."""
    flags.DEFINE_list("mesh", None, f"Devices as DATA,CONTEXT,MODEL; by default {default}.")


def mesh() -> config.Mesh | None:
    """What `--mesh` gives, or None.

    Raises:
      UsageError: it is no mesh.
    """
    given = flags.FLAGS.mesh
    if given is None:
        return None
    try:
        split_batch, split_sequence, split_heads = map(int, given)
    except ValueError:
        text = ",".join(given)
        raise UsageError(f"--mesh={text} is not three whole numbers; give --mesh=DATA,CONTEXT,MODEL.") from None
    try:
        return config.Mesh(split_batch, split_sequence, split_heads)
    except schema.Refused as error:
        raise UsageError(f"--mesh: {'; '.join(error.problems)}") from None


def define_processes() -> None:
    """Defines `--coordinator`, `--num_processes` and `--process_id`."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0; 'auto' on SLURM, Kubernetes and TPU pods, without the next two."
    )
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def joined() -> contextlib.AbstractContextManager[None]:
    """This process as one of those that the flags name; see `processes.joined`."""
    given = flags.FLAGS
    return processes.joined(given.coordinator, given.num_processes, given.process_id, workdir())


def experiment() -> config.Experiment:
    """The experiment that `--config` and its overrides describe.

    Raises:
      UsageError: none is given, or it is wrong; the message lists all that is wrong.
    """
    if flags.FLAGS.config is None:
        raise UsageError("--config is missing; give an experiment file, such as --config=experiments/quickstart.py.")
    found = config.parse(flags.FLAGS.config, MIXERS, MLPS, TASKS)
    checks.check(found.model)
    return found


def workdir() -> Path:
    """The folder that `--workdir` names.

    Raises:
      UsageError: none is given, or it can be none; see `folder.path`.
    """
    if not flags.FLAGS.workdir:
        raise UsageError("--workdir is missing; give a folder for the run, such as --workdir=runs/first.")
    return paths.given(flags.FLAGS.workdir)


_words: list[str] = []


def words() -> list[str]:
    """The words of the command line that are no flags, for a command that takes them."""
    return list(_words)


def run(main: Callable[[], int | None], words: bool = False) -> None:
    """Parses the flags, calls `main`, and exits with what it returns or raises.

    Args:
      main: the command.
      words: whether it takes words beside flags, which are refused otherwise.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides XLA's notes
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is another, and shows every character
            stream.reconfigure(errors="backslashreplace")
    compilation.keep()
    app.run(lambda _: _guarded(main), flags_parser=functools.partial(_parse, words))


def _guarded(main: Callable[[], int | None]) -> int | None:
    try:
        code = _ended(main)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if code and jax.distributed.is_initialized():  # jax would wait for processes that may be lost
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _ended(main: Callable[[], int | None]) -> int | None:
    """The exit code of `main`, after reporting its error where a sentence can."""
    try:
        return main()
    except UsageError as error:
        return _report(error, 2)
    except (RunError, FloatingPointError) as error:
        return _report(error, 1)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        name = error.filename or "a file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _report(f"{name} cannot be written: {error.strerror}. Make room and go on.", 1)
        return _report(f"{name} cannot be read or written: {error.strerror or error}.", 1)
    except KeyboardInterrupt:
        return _report("interrupted", 130)


def _report(error: object, code: int) -> int:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


def _parse(words: bool, arguments: Sequence[str]) -> Sequence[str]:
    """The flags parser of `app.run`: what is wrong is reported as a UsageError is, where absl shows a traceback."""
    try:
        rest = flags.FLAGS(arguments)
    except SystemExit:  # the help was asked for, and has been written
        sys.exit(0)
    except Exception as error:  # absl and ml_collections raise whatever a value met on its way
        text = re.sub(r"invalid literal for int\(\).*|Exceeds the limit.*", "expected a whole number", str(error))
        text = re.sub(r"could not convert string to float.*", "expected a number", text.removeprefix("flag "))
        text = re.sub(r"(\S{80})\S{40,}", r"\1...", text) or type(error).__name__
        sys.exit(_report(text, 2))
    _words[:] = rest[1:]
    if _words and not words:
        sys.exit(_report(f"'{rest[1]}' is not a flag; flags are written --name=value.", 2))
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl would log every library's progress
    logging.get_absl_handler().setFormatter(None)
    return rest
