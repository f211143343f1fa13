"""One line a step, the same bits, none twice; scalars that TensorBoard reads."""

import json
import math

import numpy as np
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from longctx import config
from longctx.training.metrics import Metrics, mean, read, summarise

TRAINING = config.Training((config.Stage(7, 2, 8),), log_every=3)


def row(step, answers=2.0):
    loss = float(np.float32(math.pi) / np.float32(step))
    return {
        "step": step,
        "stage": 0,
        "loss": loss,
        "hits": 1.0,
        "answers": answers,
        "gradient_norm": 0.1,
        "learning_rate": 1e-3,
        "tokens": 16,
        "seconds": 0.5,
    }


def write(workdir, first, last):
    with Metrics(workdir, TRAINING, first - 1, chief=True) as metrics:
        for step in range(first, last + 1):
            metrics.record(row(step))


def test_rows_come_back_with_the_same_bits(tmp_path):
    write(tmp_path, 1, 7)
    assert read(tmp_path) == [row(step) for step in range(1, 8)]


def test_rows_past_the_checkpoint_are_removed(tmp_path):
    """Killed after step 6, with a line half-written, and going on from step 4."""
    write(tmp_path, 1, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    write(tmp_path, 5, 7)
    assert [found["step"] for found in read(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_means_count_answers_not_steps():
    found = mean([row(1, answers=1.0), row(2, answers=3.0)])
    assert found["retrieval_accuracy"] == 0.5
    assert found["tokens_per_second"] == 32
    assert mean([row(1, answers=0.0) | {"hits": 0.0}])["retrieval_accuracy"] is None


def test_tensorboard_reads_the_means(tmp_path):
    """At steps 3 and 6, and at the last, 7."""
    write(tmp_path, 1, 7)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    tensors = events.Tensors("train/loss")
    assert [event.step for event in tensors] == [3, 6, 7]
    expected = [np.mean([row(step)["loss"] for step in steps]) for steps in ((1, 2, 3), (4, 5, 6), (7,))]
    np.testing.assert_allclose([event.tensor_proto.float_val[0] for event in tensors], expected, rtol=1e-6)


def test_summary(tmp_path):
    write(tmp_path, 1, 4)
    found = summarise(tmp_path, TRAINING)
    assert (found["finished"], found["steps"], found["tokens"], found["seconds"]) == (False, 4, 64, 2.0)
    assert found["loss"] == mean([row(2), row(3), row(4)])["loss"]
    write(tmp_path, 5, 7)
    assert summarise(tmp_path, TRAINING)["finished"]
    assert not summarise(tmp_path / "nothing", TRAINING)["finished"]


def test_summary_of_a_checkpoint(tmp_path):
    """Rows past it are not of it; the log may lack some, or be lost."""
    write(tmp_path, 1, 6)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:1] + lines[2:]))
    found = summarise(tmp_path, TRAINING, 5)
    assert (found["finished"], found["steps"], found["missing"], found["tokens"]) == (False, 5, 1, 64)
    (tmp_path / "metrics.jsonl").unlink()
    found = summarise(tmp_path, TRAINING, 7)
    assert (found["finished"], found["steps"], found["missing"], found["tokens"]) == (True, 7, 7, 0)


def test_held_out_loss_is_logged_where_it_was_measured(tmp_path):
    with Metrics(tmp_path, TRAINING, 0, chief=True) as metrics:
        for step in range(1, 6):
            measured = {"heldout_loss": 2.0 + step, "heldout_bits_per_byte": 1.5} if step == 4 else {}
            metrics.record(row(step) | measured)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    for name, value in (("heldout/loss", 6.0), ("heldout/bits_per_byte", 1.5)):
        assert [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(name)] == [(4, value)]
    assert read(tmp_path)[3]["heldout_loss"] == 6.0


def test_tensorboard_shows_an_interrupted_run_as_one_that_was_not(tmp_path, monkeypatch):
    """Killed after step 7, gone on with from 2 with other values, and again from 4: no point twice, none moved.

    As a TensorBoard shows it that was open all along, and as one does that is opened then.
    """

    def curve(events):
        return [(event.step, event.tensor_proto.float_val[0]) for event in events.Reload().Tensors("train/loss")]

    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = EventAccumulator(str(tmp_path / "straight" / "logs"))
    killed = plugin_event_accumulator.EventAccumulator(str(tmp_path / "killed" / "logs"))
    write(tmp_path / "straight", 1, 7)
    with Metrics(tmp_path / "killed", TRAINING, 0, chief=True) as metrics:
        for step in range(1, 8):
            metrics.record(row(step) | ({"loss": 99.0} if step > 2 else {}))
    assert [step for step, _ in curve(killed)] == [3, 6, 7]
    for second, (first, last) in enumerate([(3, 4), (5, 7)]):
        monkeypatch.setattr(event_file_writer.time, "time", lambda second=second: 2e9 + second)  # orders its files
        write(tmp_path / "killed", first, last)
    expected = curve(straight)
    assert [step for step, _ in expected] == [3, 6, 7]
    assert curve(killed) == expected
    assert curve(EventAccumulator(str(tmp_path / "killed" / "logs"))) == expected


def test_what_is_no_event_file_hinders_nothing(tmp_path):
    write(tmp_path, 1, 4)
    (file,) = (tmp_path / "logs").iterdir()
    (tmp_path / "logs" / "events.out.tfevents.1").mkdir()
    (tmp_path / "logs" / "events.out.tfevents.2").write_bytes(b"")
    (tmp_path / "logs" / "events.out.tfevents.3").write_bytes(bytes(range(256)))
    file.write_bytes(file.read_bytes()[:-3])
    write(tmp_path, 3, 7)
