"""Progress is few whole lines where nobody watches, and a bar where somebody does."""

import io

import pytest

from longctx import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second at each unit."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_log_gets_a_line_in_thirty_seconds(monkeypatch, clock):
    """An hour of steps is some 120 whole lines; guards against tqdm, which returns the carriage instead."""
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with progress.Progress("training", "step", 3700, done=100) as bar:
        bar.say("compiling")
        for step in range(3600):
            clock[0] += 1
            bar.add(note=f"loss {step}")
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert lines[0] == "compiling"
    assert len(lines) == 1 + 3600 // 30
    assert lines[1] == "training:   4% 130/3700 [00:30<59:30,  1.00step/s, loss 29]"
    assert lines[-1].startswith("training: 100% 3700/3700 [1:00:00<00:00")


def test_quick_jobs_say_their_end_or_nothing(monkeypatch, clock):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with progress.Progress("reading", "token", 9, stays=False) as bar:
        bar.add(9)
    assert log.getvalue() == ""
    with progress.Progress("evaluating", "token", large=True) as bar:
        bar.begin(2000)
        clock[0] += 1
        bar.add(2000)
    assert log.getvalue() == "evaluating: 100% 2.00k/2.00k [00:01<00:00, 2.00ktoken/s]\n"
    with progress.Progress("evaluating", "token", 5, shown=False) as bar:
        bar.say("nothing of this")
        clock[0] += 99
        bar.add(5)
    assert log.getvalue().count("\n") == 1


def test_terminal_gets_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with progress.Progress("training", "step", 3) as bar:
        for _ in range(3):
            bar.add(note="loss 1")
        bar.say("saved")
    assert "\rtraining:" in screen.getvalue()
    assert "saved\n" in screen.getvalue()
