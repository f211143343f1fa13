"""Python files and modules of the user's that register layers, position schemes or tasks of their own.

A run records which ones it needs (`config.Experiment.plugins`), so that whoever reads its config finds them again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import os
import site
import sys
import sysconfig
import traceback
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longctx.errors import UsageError
from longctx.schema import cut, show


def run(file: str) -> types.ModuleType:
    """Runs a Python file as a module, found in `sys.modules` from then on.

    Raises:
      UsageError: it cannot be read, or raises something; with the line.
    """
    if not os.path.isfile(file):
        raise UsageError("there is no such file.")
    name = f"longctx_file_{hashlib.sha256(os.path.abspath(file).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, os.path.abspath(file)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as dataclasses look there for the meaning of annotations
    try:
        called(file, spec.loader.exec_module, module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def called(file: str, function, *arguments):
    """What a function from a user's file returns; whatever it raises is reported as a UsageError, with the line."""
    try:
        return function(*arguments)
    except KeyboardInterrupt:
        raise
    except UsageError:
        raise
    except BaseException as error:  # SystemExit too
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(file)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f"line {line}: " if line and type(error) is not ValueError else ""
        name = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UsageError(f"{where}{name}{cut(str(error), 300)}") from error


def load(names: Iterable[str]) -> tuple[str, ...]:
    """Imports modules by their name and files by their path, each once; returns the names, with paths made absolute.

    Raises:
      UsageError: one of them cannot be imported.
    """
    names = tuple(os.path.abspath(name) if name.endswith(".py") else name for name in names)
    for name in names:
        if any(name in (known, getattr(module, "__file__", None)) for known, module in [*sys.modules.items()]):
            continue
        try:
            if name.endswith(".py"):
                run(name)
            else:
                called("", importlib.import_module, name)
        except UsageError as error:
            raise UsageError(
                f"plugins names {show(name)}, where layers are that this experiment needs, and it cannot be imported "
                f"({error}); bring it back, or write in plugins where it is now."
            ) from error
    return names


def apart(names: Any, folder: Path) -> None:
    """Refuses plugins that are in `folder`: a workdir from elsewhere must not bring the code that opening it runs.

    Args:
      names: what a config has as plugins, whatever it is.
      folder: the workdir.

    Raises:
      UsageError: one of them is in the folder.
    """
    inside = os.path.realpath(folder)
    for name in names if isinstance(names, list | tuple) else ():
        if not isinstance(name, str):
            continue
        files = [Path(name)]
        if not name.endswith(".py"):
            top = name.split(".")[0]
            files = [Path(entry, f"{top}{ending}") for entry in sys.path for ending in ("", ".py")]
        if any(Path(os.path.realpath(file)).is_relative_to(inside) for file in files if os.path.exists(file)):
            raise UsageError(
                f"plugins names {show(name)}, which is in the workdir itself, and a workdir brings no code. Look at "
                "it, and if you trust it, move it elsewhere and write in plugins where it is then."
            )


def of(options: Any) -> set[str]:
    """The plugins that these options, and those within them, come from."""
    if isinstance(options, Mapping):
        return set().union(*map(of, options.values()))
    if isinstance(options, tuple):
        return set().union(*map(of, options))
    if not dataclasses.is_dataclass(options):
        return set()
    modules = {name for name in getattr(type(options), "modules", ()) if name.split(".")[0] != "longctx"}
    own = {_name_of(sys.modules[name]) for name in modules if name in sys.modules}
    return own.union(*(of(getattr(options, field.name)) for field in dataclasses.fields(options)))


def _name_of(module: types.ModuleType) -> str:
    """How another process finds a module: an installed one, or one of a package, by its name."""
    file = getattr(module, "__file__", None) or ""
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if not file.endswith(".py") or "." in module.__name__:
        return module.__name__
    return module.__name__ if any(Path(file).is_relative_to(each) for each in installed) else os.path.abspath(file)
