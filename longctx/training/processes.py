"""Several processes as one: joining, agreeing on values and stops, and ending when one of them is lost.

Every process runs the same program on its own devices (`jax.distributed`). What each decides for itself must not
depend on where it runs; what does (a signal, what is found on a disk) is agreed on: `from_first`, `Votes`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from longctx.errors import RunError, UsageError
from longctx.training import watchman

AUTO = "auto"
HEARTBEAT = 30  # seconds after which jax takes a silent process for dead, where the file system has no locks


@contextlib.contextmanager
def joined(coordinator: str | None, count: int | None, index: int | None, workdir: Path) -> Iterator[None]:
    """Joins the other processes, to be entered before anything asks jax for devices.

    Args:
      coordinator: "HOST:PORT" of process 0; "auto" where jax finds the three itself (SLURM, Kubernetes, Open MPI, TPU
        pods); None for one process alone.
      count: of processes.
      index: of this one, from 0 up.
      workdir: of the run, a folder that all processes share; WORKDIR/processes says who is there.

    Raises:
      UsageError: the three do not fit together, no cluster is found, the workdir is not shared, or another run is in
        it.
    """
    if coordinator is None:
        if (count, index) != (None, None):
            raise UsageError(
                "--num_processes and --process_id say which process this is of how many, but not where process 0 is; "
                "give --coordinator=HOST:PORT as well, or none of the three."
            )
        yield
        return
    _initialize(coordinator, count, index)
    if jax.process_index():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # one log: that of process 0
    watch = _Watch(workdir / "processes") if jax.process_count() > 1 else None
    try:
        yield
    except BaseException as error:
        if watch is not None and watch.leave(_words(error)) == watchman.LOST:
            raise RunError("training cannot go on without the process named above.") from error
        raise
    if watch is not None:
        watch.leave("done")


def from_first(value: int) -> int:
    """What process 0 gives, in every process."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class Votes:
    """True at the same step of every process once any process is asked to stop.

    Several processes learn it a step late: each step's vote is counted on the devices, behind the step's own work, and
    read when the next one is cast.

    Args:
      asked: true once this process is asked to.
      mesh: of the devices of all processes.
    """

    def __init__(self, asked: object, mesh: jax.sharding.Mesh):
        self._asked = asked
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._sum = jax.jit(lambda votes: votes.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._cast: jax.Array | None = None

    def __bool__(self) -> bool:
        if jax.process_count() == 1:
            return bool(self._asked)
        mine = np.full(jax.local_device_count(), bool(self._asked), np.int32)
        before, votes = self._cast, jax.make_array_from_process_local_data(self._split, mine)
        self._cast = self._sum(votes)
        return before is not None and bool(before)


def _initialize(coordinator: str, count: int | None, index: int | None) -> None:
    # Its handler of SIGTERM would swallow the signal: stops are agreed on by Votes.
    jax.config.update("jax_enable_preemption_service", False)
    if coordinator == AUTO:
        if (count, index) != (None, None):
            raise UsageError("--coordinator=auto finds how many processes there are; leave the other two flags out.")
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        except (ValueError, RuntimeError) as error:
            raise UsageError(
                f"--coordinator=auto found no cluster ({str(error).splitlines()[0]}); give --coordinator=HOST:PORT "
                "--num_processes=N --process_id=I, with I from 0 to N - 1."
            ) from error
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or count is None or index is None or not 0 <= index < count:
        raise UsageError(
            f"--coordinator={coordinator} --num_processes={count} --process_id={index} name no process; give "
            "--coordinator=HOST:PORT of process 0, N processes, and each its number from 0 to N - 1."
        )
    if index == 0:
        _listen(int(port))
        # Said before they are waited for: when five minutes are over, jax aborts.
        print(f"waiting for {count} processes at {coordinator} ...", file=sys.stderr, flush=True)
    jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT)


def _listen(port: int) -> None:
    """Makes sure that the port can be had, for want of which jax crashes."""
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"process 0 cannot listen at port {port} ({error}); give --coordinator a free one.") from error


def _words(error: BaseException) -> str:
    """What the others report of an error."""
    known = isinstance(error, UsageError | RunError | FloatingPointError)
    return f"ended {' '.join(str(error).split())}" if known else "failed"


class _Watch:
    """This process's watchman.

    Args:
      folder: WORKDIR/processes.

    Raises:
      UsageError: the folder is not shared, or taken.
    """

    def __init__(self, folder: Path):
        index, count = jax.process_index(), jax.process_count()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{folder}, where processes write their names, cannot be made ({error.strerror}); remove what is "
                "there, or name another --workdir."
            ) from error
        self._process = subprocess.Popen(
            [sys.executable, "-S", watchman.__file__, str(folder), str(index), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        answers = (watchman.HELD, watchman.TAKEN, watchman.NO_LOCKS)
        found = answers.index(self._process.stdout.readline().strip())
        all_found = [answers[i] for i in multihost_utils.process_allgather(np.int32(found))]
        if watchman.TAKEN in all_found:
            other = all_found.index(watchman.TAKEN)
            self.leave("done")
            raise UsageError(
                f"--workdir={folder.parent} is in use by another run: its {watchman.holder(folder / str(other))}; "
                "wait for it to end, or name another folder."
            )
        held = [other for other in range(count) if all_found[other] == watchman.HELD]
        missing = [other for other in held if not (folder / str(other)).exists()]
        if multihost_utils.process_allgather(np.int32(len(missing))).any():
            self.leave("done")
            raise UsageError(
                f"what processes write in {folder} is not visible to all, so --workdir={folder.parent} is not a folder "
                "that they share; name one on a shared file system."
            )
        if len(held) == count:
            self._say("watch\n")

    def leave(self, words: str) -> int:
        """Reports how this process ends; returns the watchman's exit code."""
        self._say(words)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        return self._process.wait()

    def _say(self, words: str) -> None:
        with contextlib.suppress(OSError):  # it is not there where the file system has no locks
            self._process.stdin.write(words)
            self._process.stdin.flush()
