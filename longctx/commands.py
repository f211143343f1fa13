"""What every command shares: flags, quiet logs, and errors told in a sentence.

A command ends with code 0, or 2 when what it was given cannot be used (nothing is written then), or 1 when training
met a loss that is not finite, a full disk, or a process that was lost (jax or its watchman may end it by a signal
then). Of several processes, each has written its name in WORKDIR/processes before anything is refused.
`python -m longctx.<command> --help` lists its flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import os
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from longctx import config, schema
from longctx.data import TASKS
from longctx.errors import RunError, UsageError
from longctx.folder import path as paths
from longctx.layers import MIXERS, MLPS
from longctx.parallel import processes


def define_config() -> None:
    """Defines `--config=FILE.py[:ARGUMENT]` and its overrides, `--config.a.b=VALUE`."""
    config_flags.DEFINE_config_file("config", None, "The experiment file, as FILE.py or FILE.py:ARGUMENT.")
    flags.FLAGS["config"].parser = _ExperimentParser(name="config")


def define_workdir() -> None:
    """Defines `--workdir`."""
    flags.DEFINE_string("workdir", None, "The folder that a run writes and reads everything in.")


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
      UsageError: none is given, or it cannot be; with everything that is wrong.
    """
    if flags.FLAGS.config is None:
        raise UsageError("--config is missing; give an experiment file, such as --config=experiments/quickstart.py.")
    return config.parse(flags.FLAGS.config, MIXERS, MLPS, TASKS)


def workdir() -> Path:
    """The folder that `--workdir` names.

    Raises:
      UsageError: none is given, or it can be none; see `folder.path`.
    """
    if not flags.FLAGS.workdir:
        raise UsageError("--workdir is missing; give a folder for the run, such as --workdir=runs/first.")
    return paths.given(flags.FLAGS.workdir)


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main`, and exits with what it returns or raises."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides XLA's notes
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of consoles that cannot show every character
    app.run(lambda _: _guarded(main), flags_parser=_parse)


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
    """The exit code of `main`, after telling its error if that can be told in a sentence."""
    try:
        return main()
    except UsageError as error:
        return _tell(error, 2)
    except (RunError, FloatingPointError) as error:
        return _tell(error, 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return _tell(f"{error.filename or 'a file'} cannot be written: {error.strerror}. Make room and go on.", 1)
    except KeyboardInterrupt:
        return _tell("interrupted", 130)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _tell(error: object, code: int) -> int:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


def _parse(arguments: Sequence[str]) -> Sequence[str]:
    """The flags parser of `app.run`: what is wrong is told as a UsageError is, where absl shows a traceback."""
    try:
        rest = flags.FLAGS(arguments)
    except (flags.Error, ValueError) as error:
        text = re.sub(r"invalid literal for int\(\).*", "expected a whole number", str(error).removeprefix("flag "))
        text = re.sub(r"could not convert string to float.*", "expected a number", text)
        sys.exit(_tell(text, 2))
    if len(rest) > 1:
        sys.exit(_tell(f"'{rest[1]}' is not a flag; flags are written --name=value.", 2))
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl would tell every library's progress
    logging.get_absl_handler().setFormatter(None)
    return rest


class _ExperimentParser(config_flags.config_flags.ConfigFileFlagParser):
    """Loads an experiment file, and makes every field that an experiment can have open to overrides."""

    def parse(self, path: str) -> ConfigDict:
        name, *argument = path.split(":", 1)
        experiment = _load(name, argument)
        with experiment.unlocked():
            if "data" not in experiment:
                experiment.data = ConfigDict()
            _fill(experiment, config.Experiment)
            if isinstance(experiment.data, ConfigDict):
                kind = experiment.data.kind = experiment.data.get("kind", config.Data.kind)
                if kind in (config.Data.kind, *TASKS):
                    _fill(experiment.data, TASKS.get(kind, config.Data))
            for block in _dicts(experiment.get("model", {}).get("blocks", {})):
                for part, registry in (("mixer", MIXERS), ("mlp", MLPS)):
                    options = block.get(part)
                    if isinstance(options, ConfigDict) and options.get("kind") in registry:
                        _fill(options, registry[options.kind].Config)
        for override in self._overrides():
            _find(experiment, override)
        return experiment.lock()

    def _overrides(self) -> Iterator[str]:
        """The names a.b of all --config.a.b on the command line."""
        for argument in sys.argv[1:]:
            if found := re.match(r"--?(?:no)?config\.([^=]+)", argument):
                yield found[1]


def _load(name: str, argument: list[str]) -> ConfigDict:
    """What `get_config` of an experiment file returns."""
    if not Path(name).is_file():
        raise UsageError("there is no such file.")
    try:
        found = runpy.run_path(name)
        if "get_config" not in found:
            raise UsageError("the file defines no function get_config().")
        experiment = found["get_config"](*argument)
    except ValueError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f"line {line}: " if line else ""
        raise UsageError(f"{where}{type(error).__name__}: {error}") from error
    if not isinstance(experiment, ConfigDict):
        raise UsageError(f"get_config() returned a {type(experiment).__name__}; it must return a ConfigDict.")
    return experiment


def _fill(tree: ConfigDict, cls: type) -> None:
    """Sets what `tree` leaves to the defaults of the dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            if field.name not in tree:
                tree[field.name] = ConfigDict()
            if isinstance(tree[field.name], ConfigDict):
                _fill(tree[field.name], hints[field.name])
        elif field.name not in tree and field.default not in (None, dataclasses.MISSING):
            tree[field.name] = field.default


def _find(tree: ConfigDict, name: str) -> None:
    """Raises UsageError if `tree` has no field of this dotted name."""
    path = ""
    for part in name.split("."):
        if not isinstance(tree, ConfigDict) or part not in tree:
            known = list(tree) if isinstance(tree, ConfigDict) else []
            close = difflib.get_close_matches(part, known, n=1)
            advice = f"did you mean '{path}{close[0]}'?" if close else f"the fields there are {', '.join(known)}"
            raise UsageError(f"'{path}{part}' is not a field; {advice if known else f'{path[:-1]} has none'}")
        tree, path = tree[part], f"{path}{part}."


def _dicts(tree: ConfigDict) -> list[ConfigDict]:
    return [value for value in tree.values() if isinstance(value, ConfigDict)]
