"""Compiled programs are kept from one command to the next, in the user's cache folder.

JAX knows what a program was compiled from and for, but of a CPU not which instructions it has: each kind of CPU has a
folder of its own. Any number of processes may share one. An entry that a kill cut short is compiled again, with a
warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

_CPU = ("model name", "flags", "Features", "CPU implementer", "CPU part")  # of Linux, on x86 and on Arm
SECONDS = 0.1  # what compiles faster is not kept


def keep() -> None:
    """Keeps what is compiled from now on. `JAX_COMPILATION_CACHE_DIR`, if set, says where instead, and "" nowhere."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "longctx", "compiled", _machine())
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none that can be written in: nothing is kept
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def _machine() -> str:
    """A name for this kind of CPU."""
    lines = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        lines += [line for line in text.splitlines() if line.startswith(_CPU)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
