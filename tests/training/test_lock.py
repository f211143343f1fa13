"""Two commands that write the same are kept apart, and nothing else is."""

import contextlib
import errno
import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from longctx.errors import UsageError
from longctx.training import lock, processes

HOLD = """
import fcntl, sys, time
from pathlib import Path
from longctx.training import watchman
own = watchman.hold(Path(sys.argv[1]))
watchman.write(own, "pid 77 on elsewhere")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of a training run."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "training.lock")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_and_the_first_is_named(tmp_path, other):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    for enter in (lock.held(tmp_path, "training"), contextlib.nullcontext(lock.check)):
        with pytest.raises(UsageError) as error, enter as check:
            check(tmp_path, "training")
        told = (
            r"is in use by another run: its pid 77 on elsewhere since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d is training there"
        )
        assert re.search(told, str(error.value))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    with lock.held(tmp_path, "evaluating"):  # another matter
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with lock.held(tmp_path, "training"):  # what it left says nothing
        assert (tmp_path / "training.lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(UsageError, match=f"its pid {os.getpid()} on"), lock.held(tmp_path, "training"):
            pass  # in one process too
    assert not list(tmp_path.iterdir())


def test_the_folder_is_made_and_an_error_lets_go(tmp_path):
    workdir = tmp_path / "a" / "b"
    with pytest.raises(ZeroDivisionError), lock.held(workdir, "training"):
        raise ZeroDivisionError
    lock.check(workdir, "training")
    with lock.held(workdir, "training"):
        assert (workdir / "training.lock").exists()


def test_who_waits_while_the_holder_leaves_holds_the_file_that_others_see(tmp_path, monkeypatch):
    """The file that it opened was removed before it had the lock. Seen to fail without a look at what is there."""
    first = lock.held(tmp_path, "training")
    first.__enter__()
    taken = fcntl.flock

    def late(own, how):
        if first is not None:
            leave()
        taken(own, how)

    def leave():
        nonlocal first
        first.__exit__(None, None, None)
        first = None

    monkeypatch.setattr(lock.watchman.fcntl, "flock", late)
    with lock.held(tmp_path, "training"):
        assert (tmp_path / "training.lock").exists()
        with pytest.raises(UsageError), lock.held(tmp_path, "training"):
            pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(lock.watchman.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, logger="longctx"), lock.held(tmp_path, "training"):
        lock.check(tmp_path, "training")
    assert "without locks (Operation not supported), so two commands at once" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_something_else_in_its_place(tmp_path, form):
    form(tmp_path / "training.lock")
    lock.check(tmp_path, "training")
    with lock.held(tmp_path, "training"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["training.lock.damaged-1"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"), lock.held(tmp_path / "file" / "run", "training"):
        pass


def test_processes_that_cannot_write_their_names(tmp_path):
    (tmp_path / "processes").touch()
    with pytest.raises(
        UsageError, match=r"processes, where processes write their names, cannot be made \(File exists\)"
    ):
        processes._Watch(tmp_path / "processes")
