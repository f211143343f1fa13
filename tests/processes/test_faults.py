"""What happens to one process is told by the others, and nothing that was saved is lost."""

import re
import signal
import socket
import time

import pytest
from two import Processes, losses

from longctx.training import metrics
from longctx.training.checkpoints import SUMS

pytestmark = pytest.mark.system

TRAIN = ["-m", "longctx.train"]
SHORT = "--config.training.stages=((3,4,32),(6,2,64))"


def whole(workdir):
    """Steps of the checkpoints, all of which must be finished."""
    folder = workdir / "checkpoints"
    found = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    assert all((folder / str(step) / SUMS).exists() for step in found)
    return found


def wait_for_checkpoint(processes, workdir, step):
    processes.wait_for(step, workdir)
    end = time.monotonic() + 60
    while not (workdir / "checkpoints" / str(step) / SUMS).exists():
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.05)


def test_only_process_0_says_anything(start, tmp_path):
    """A run to its report: bars and table once, and nothing left of WORKDIR/processes."""
    first, second = start(TRAIN, "--config=small.py", f"--workdir={tmp_path / 'run'}", SHORT).ended()
    assert (first[0], second[0]) == (0, 0), (first[2], second[2])
    assert "the report is" in first[1]
    assert "compiled in" in first[2]
    assert second[1:] == ("", "")
    assert (tmp_path / "run" / "report" / "report.html").exists()
    assert not (tmp_path / "run" / "processes").exists()
    assert len(losses(tmp_path / "run")) == 9


def test_asked_to_stop_and_going_on(start, tmp_path):
    """SIGTERM to both, at different moments: both save the same step and exit with 0; the same command goes on.

    Seen to fail (by hanging) when each process stops at its own step.
    """
    workdir = tmp_path / "run"
    processes = start(TRAIN, "--config=small.py", f"--workdir={workdir}")
    processes.wait_for(6, workdir)
    processes.signal(signal.SIGTERM, 1)
    time.sleep(0.05)
    processes.signal(signal.SIGTERM, 0)
    for code, _, errors in processes.ended():
        assert code == 0, errors
    done = len(losses(workdir))
    assert 6 <= done < 203
    assert whole(workdir)[-1] == done
    before = losses(workdir)
    processes = start(TRAIN, "--config=small.py", f"--workdir={workdir}")
    processes.wait_for(done + 2, workdir)
    processes.signal(signal.SIGTERM, 0)  # one alone is enough
    for code, _, errors in processes.ended():
        assert code == 0, errors
    assert losses(workdir)[:done] == before


@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed(start, tmp_path, victim):
    """The other ends within a minute and names it; what is saved is whole, and the run goes on bit for bit."""
    workdir, other = tmp_path / "run", 1 - victim
    processes = start(TRAIN, "--config=small.py", f"--workdir={workdir}")
    wait_for_checkpoint(processes, workdir, 5)
    processes.signal(signal.SIGKILL, victim)
    killed = time.monotonic()
    ends = processes.ended()
    assert time.monotonic() - killed < 60
    assert ends[other][0] != 0
    assert re.search(rf"error: process {victim} \(pid \d+ on \S+\) was lost: it was killed", ends[other][2])
    assert 5 in whole(workdir) or len(whole(workdir)) == 2
    saved, before = whole(workdir)[-1], {row["step"]: row["loss"] for row in metrics.read(workdir)}
    processes = start(TRAIN, "--config=small.py", f"--workdir={workdir}")
    processes.wait_for(max(before) + 1, workdir)
    processes.signal(signal.SIGTERM)
    for code, _, errors in processes.ended():
        assert code == 0, errors
    again = losses(workdir)
    assert saved < len(again)
    assert again[: max(before)] == [before[step] for step in range(1, max(before) + 1)]


@pytest.mark.parametrize("victim", [0, 1])
def test_the_disk_is_full(start, tmp_path, victim):
    """One process can write no large file: both end, the sentence says so, and no checkpoint is half there.

    A limit on the size of files stands for the full disk: it needs no rights.
    """
    workdir = tmp_path / "run"

    def prepare(index):
        return "ulimit -f 32" if index == victim else ":"  # blocks of 512 bytes

    arguments = ["--config=small.py", f"--workdir={workdir}", "--config.model.width=64", "--config.checkpoints.every=3"]
    ends = start(TRAIN, *arguments, prepare=prepare).ended()
    assert all(code not in (0, None) for code, _, _ in ends), ends
    assert re.search(r"error: the checkpoint of step 3 cannot be written", ends[victim][2]), ends[victim][2]
    assert "nothing is saved" in ends[victim][2]
    assert re.search(rf"error: process {victim} \(.*\) was lost: the checkpoint of step 3", ends[1 - victim][2])
    assert whole(workdir) == []


def test_another_run_is_in_the_folder(start, tmp_path):
    """The second is refused, and the first goes on. Seen to fail without the lock."""
    arguments = ["--config=small.py", f"--workdir={tmp_path / 'run'}"]
    first = start(TRAIN, *arguments)
    first.wait_for(1, tmp_path / "run")
    for code, _, errors in start(TRAIN, *arguments).ended():
        assert code == 2, errors
        assert "is in use by another run: its pid" in errors
    first.wait_for(len(losses(tmp_path / "run")) + 1, tmp_path / "run")
    first.signal(signal.SIGTERM)
    assert [code for code, _, _ in first.ended()] == [0, 0]


def test_the_port_is_taken(tmp_path, folder, environment):
    """jax alone crashes."""
    with socket.create_server(("", 0)) as taken:
        flags = [f"--coordinator=localhost:{taken.getsockname()[1]}", "--num_processes=2", "--process_id=0"]
        command = [*TRAIN, "--config=small.py", f"--workdir={tmp_path / 'run'}", *flags]
        (end,) = Processes(folder, environment, [command]).ended()
    assert end[0] == 2, end
    assert "error: process 0 cannot listen at port" in end[2]
    assert not (tmp_path / "run").exists()


def test_the_folder_is_not_shared(start, tmp_path, folder):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    processes = start(
        TRAIN,
        f"--config={folder / 'small.py'}",
        "--workdir=run",
        prepare=lambda index: f"cd {tmp_path / str(index)}",
    )
    for code, _, errors in processes.ended():
        assert code == 2, errors
        assert "is not a folder that they share" in errors


def test_two_commands_in_one_workdir(tmp_path, folder, environment):
    """Of one process each: the second is refused, and names the first; what a killed one left hinders nothing."""
    workdir = tmp_path / "run"
    command = [*TRAIN, "--config=small.py", f"--workdir={workdir}", "--config.mesh.data=1"]
    started = [Processes(folder, environment, [command])]
    try:
        started[0].wait_for(1, workdir)
        started.append(Processes(folder, environment, [command]))
        ((code, _, errors),) = started[1].ended()
        assert code == 2, errors
        assert re.search(r"error: .*is in use by another run: its pid \d+ on \S+ since [-\d: ]+ is training", errors)
        before = losses(workdir)
        started[0].wait_for(max(6, len(before) + 1), workdir)
        started[0].signal(signal.SIGKILL)
        started[0].ended()
        assert (workdir / "training.lock").exists()
        before = losses(workdir)
        started.append(Processes(folder, environment, [command]))
        started[2].wait_for(len(before) + 2, workdir)
        started[2].signal(signal.SIGTERM)
        ((code, _, errors),) = started[2].ended()
        assert code == 0, errors
        assert losses(workdir)[: len(before)] == before
        assert not (workdir / "training.lock").exists()
    finally:
        for each in started:
            each.kill()
