"""What the benchmarks share: timing by turns, and what the machine is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def best(*calls: Callable[[], object], repeats: int = 5, limit: float = float("inf")) -> list[float]:
    """The least seconds of each call; they take turns, after one call each to warm up.

    No round begins after `limit` seconds. A first round that takes longer is the only one, and counts.
    """
    begin, rounds = time.perf_counter(), []
    while len(rounds) <= repeats and (not rounds or time.perf_counter() - begin < limit):
        rounds.append([seconds(call) for call in calls])
    return [min(times) for times in zip(*(rounds[1:] or rounds), strict=True)]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compiled(function: Callable, *arguments) -> Callable[[], object]:
    """A call of the compiled function that waits for its result."""
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def peak() -> float:
    """Operations a second of a large float32 matrix product."""
    a = jnp.asarray(normal(0, 2048, 2048))
    (seconds,) = best(compiled(jnp.matmul, a, a))
    return 2 * 2048**3 / seconds


def machine() -> str:
    """Processor, system, versions, the peers' among them where they are installed, and the C library's settings."""
    versions = [f"Python {platform.python_version()}", f"jax {jax.__version__}"]
    if importlib.util.find_spec("torch"):
        import torch

        versions.append(f"torch {torch.__version__} ({torch.get_num_threads()} threads)")
    if importlib.util.find_spec("transformers"):
        versions.append(f"transformers {importlib.metadata.version('transformers')}")
    if settings := os.environ.get("GLIBC_TUNABLES"):
        versions.append(f"GLIBC_TUNABLES={settings}")
    return f"{os.cpu_count()} cores of {processor()}, {platform.system()}, {', '.join(versions)}"


def require_peers() -> None:
    """Ends the script, before it has measured anything, where the peers are not installed."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        sys.exit(f"error: not installed to measure against: {', '.join(missing)}; pip install -e '.[bench]'")


def processor() -> str:
    """The processor's name, where the system tells."""
    file = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
