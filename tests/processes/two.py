"""Two processes, and what they leave behind."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from longctx.training import metrics

LIMIT = 120  # seconds that the processes of one run have to end by themselves


class Processes:
    """The processes of one run, which are ended at the end of the test.

    Args:
      folder: where they run.
      environment: of each.
      commands: one for each, after `python`; "{port}" in them is replaced by a free one.
      prepare: from its number to what a shell does in each process before it begins.
    """

    def __init__(self, folder, environment, commands, prepare=lambda index: ":"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        self._each = [
            subprocess.Popen(
                ["sh", "-c", f'{prepare(index)} && exec "$@"', "sh", sys.executable]
                + [word.replace("{port}", port) for word in command],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index, command in enumerate(commands)
        ]

    def signal(self, number, *indices):
        for index in indices or range(len(self._each)):
            self._each[index].send_signal(number)

    def ended(self):
        """`(exit code, stdout, stderr)` of each; of its watchman as well, which may be the last to speak."""
        end = time.monotonic() + LIMIT
        try:
            told = [process.communicate(timeout=max(1, end - time.monotonic())) for process in self._each]
        finally:
            self.kill()
        return [(process.returncode, *texts) for process, texts in zip(self._each, told, strict=True)]

    def kill(self):
        self.signal(signal.SIGKILL)

    def wait_for(self, step, workdir):
        """Returns once a step of the run in `workdir` is done."""
        end = time.monotonic() + LIMIT
        while not (rows := metrics.read(workdir)) or rows[-1]["step"] < step:
            assert time.monotonic() < end, f"step {step} was never reached"
            if any(process.poll() is not None for process in self._each):
                pytest.fail(f"ended before step {step}: {self.ended()}")
            time.sleep(0.05)


def losses(workdir):
    """Of every step, which must follow one another from the first on."""
    rows = metrics.read(workdir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]
