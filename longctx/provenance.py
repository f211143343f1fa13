"""Where what is measured comes from: the run, the command, the code, the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("longctx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def run(workdir: Path) -> dict[str, Any]:
    """The name and folder of a run, the command that measures it, when, and the commit of the code (None without)."""
    folder = workdir.absolute()
    return {
        "name": folder.name,
        "workdir": str(folder),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
    }


def command() -> str:
    """As it was given, the interpreter by its name alone."""
    interpreter, *arguments = sys.orig_argv
    return shlex.join([Path(interpreter).name, *arguments])


def commit(package: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout that `package` is part of, "+" behind it where files differ; None if of none."""

    def git(*arguments: str) -> str | None:
        try:
            found = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    # A package that is installed in a folder of somebody's checkout is not part of it.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return None if head is None else head + ("+" if changed else "")


def device() -> dict[str, Any]:
    """What is computed on."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "host": platform.platform(),
        "cores": os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that results may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from its folder, not installed
            found[name] = "not installed"
    return found
