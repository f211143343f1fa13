"""A run that starts from a checkpoint of another, and one that goes on with more stages."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from longctx.errors import UsageError
from longctx.training import checkpoints, loop, metrics, origin
from longctx.training import workdir as workdirs
from longctx.training.step import Program


@pytest.fixture(scope="module")
def other(tmp_path_factory, parse, corpus, cache):
    """The workdir of a run of nine steps, with checkpoints at 8 and 9."""
    workdir = tmp_path_factory.mktemp("other")
    loop.train(parse(), workdir, corpus)
    return workdir


def program_of(experiment, corpus):
    return Program.make(experiment, corpus.vocab_size, loop.make_mesh(experiment))


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_parameters_or_everything(other, parse, corpus):
    """Fails if the optimiser's state comes along unasked, or the new run's schedule begins at the other's step."""
    program = program_of(parse(), corpus)
    with jax.set_mesh(program.mesh):
        saved = checkpoints.load_state(other, program.abstract, 8)
        begun, restarted = (origin.load(f"{other}@8{part}", program) for part in ("", ":all"))
    equal(begun.params, saved.params)
    equal(begun.optimizer, program.init().optimizer)
    equal(restarted.params, saved.params)
    equal(restarted.optimizer, saved.optimizer)
    assert (int(saved.step), int(begun.step), int(restarted.step)) == (8, 0, 0)


def test_a_run_of_its_own(other, tmp_path, parse, corpus, cache):
    """Recorded with the step it started from; the same command goes on, and another origin is refused."""
    given = dataclasses.replace(parse(stages=((2, 2, 64),), learning_rate=1e-4), init_from=str(other))
    summary = loop.train(given, tmp_path / "run", corpus)
    assert summary["finished"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == f"{other}@9"
    first = metrics.read(other)[0]["loss"]
    assert metrics.read(tmp_path / "run")[0]["loss"] < first - 0.1
    assert loop.train(given, tmp_path / "run", corpus)["steps"] == 2
    for init_from in ("", f"{other}@8", f"{other}:all"):
        with pytest.raises(UsageError, match=r"init_from: '.*@9' in the workdir"):
            loop.train(dataclasses.replace(given, init_from=init_from), tmp_path / "run", corpus)


def test_the_advice_after_a_loss_that_is_not_finite(tmp_path, parse, corpus, cache, monkeypatch):
    """Is followed as it is written: another workdir, a lower rate, and the flag that the message has."""
    spread, taken = loop._spread, []

    def poisoned(batch, *args):
        taken.append(None)
        return spread(batch | {"weights": batch["weights"] * (np.nan if len(taken) == 6 else 1)}, *args)

    monkeypatch.setattr(loop, "_spread", poisoned)
    with pytest.raises(FloatingPointError) as error:
        loop.train(parse(), tmp_path / "first", corpus)
    advised = re.search(r"another --workdir, which goes on from there with --init_from=(\S+)\.$", str(error.value))[1]
    assert advised == f"{tmp_path / 'first'}@4"
    lower = dataclasses.replace(parse(learning_rate=1e-3), init_from=advised)
    assert loop.train(lower, tmp_path / "second", corpus)["finished"]


@pytest.mark.parametrize(
    ("mixer", "told"),
    [
        (
            {"kind": "attention", "heads": 2, "kv_heads": 2, "head_width": 16},
            r"blocks.0.mixer.key.weight: \[1, 16, 16\] there, \[1, 16, 32\] here; .*give the model that .*config.json",
        ),
        ({"kind": "gla", "heads": 2, "key_width": 8, "value_width": 8}, r"nothing there, \[.*\] here"),
    ],
)
def test_another_model(other, tmp_path, parse, corpus, mixer, told):
    """Told with the parameters that differ; nothing is written."""
    given = dataclasses.replace(parse(mixer), init_from=str(other))
    with pytest.raises(UsageError, match=told):
        loop.train(given, tmp_path / "run", corpus)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{other}@7", r"has no checkpoint of step 7; there are those of steps 8, 9"),
        ("{other}/none", "holds no checkpoint; give the folder of a trained run"),
        ("{other}/none@3:all", "holds no checkpoint"),
    ],
)
def test_no_such_checkpoint(other, tmp_path, parse, corpus, text, told):
    given = dataclasses.replace(parse(), init_from=text.format(other=other))
    with pytest.raises(UsageError, match=told):
        loop.train(given, tmp_path / "run", corpus)
    assert not (tmp_path / "run").exists()


def test_more_stages(other, tmp_path, parse, corpus, cache):
    """Of a finished run: its steps and their rates stay, and the appended ones have the final rate."""
    workdir = tmp_path / "run"
    loop.train(parse(), workdir, corpus)
    more = parse(stages=((4, 4, 32), (5, 2, 64), (2, 2, 64)))
    for _ in range(2):  # the second time it is left as it is
        assert loop.train(more, workdir, corpus)["steps"] == 11
    rows = metrics.read(workdir)
    assert [row["loss"] for row in rows[:9]] == [row["loss"] for row in metrics.read(other)]
    np.testing.assert_allclose([row["learning_rate"] for row in rows[9:]], [3e-4] * 2, rtol=1e-6)
    assert json.loads((workdir / "config.json").read_text())["training"]["schedule_steps"] == 9


STAGES = ((4, 4, 32), (5, 2, 64))


@pytest.mark.parametrize(
    ("done", "training", "allowed"),
    [
        (6, {"stages": (*STAGES, (7, 1, 128))}, True),
        (6, {"stages": ((4, 4, 32), (50, 2, 64))}, True),
        (6, {"stages": ((4, 4, 32), (2, 2, 64))}, True),
        (6, {"log_every": 1}, True),
        (4, {"stages": ((4, 4, 32), (5, 4, 32))}, True),  # not begun
        (0, {"stages": ((9, 2, 64),), "schedule_steps": 5}, True),
        (6, {"stages": ((4, 4, 32), (1, 2, 64))}, False),  # fewer than are done
        (6, {"stages": ((4, 4, 32), (5, 4, 64))}, False),
        (6, {"stages": ((3, 4, 32), (6, 2, 64))}, False),
        (6, {"schedule_steps": 20}, False),
        (6, {"learning_rate": 1e-3}, False),
    ],
)
def test_what_leaves_the_steps_done_as_they_were(tmp_path, parse, corpus, done, training, allowed):
    """Guards against a fall of the rate that follows the stages: appended ones would give the steps done another."""
    workdirs.start(tmp_path, parse(), corpus)
    if done:
        (tmp_path / "checkpoints" / str(done)).mkdir(parents=True)
    given = workdirs.settled(tmp_path, parse(**training))
    if not allowed:
        with pytest.raises(UsageError, match="was started with another experiment"):
            workdirs.check(tmp_path, given)
        return
    workdirs.check(tmp_path, given)
    before, after = (program_of(experiment, corpus) for experiment in (parse(), given))
    assert [before.rate(step) for step in range(done)] == [after.rate(step) for step in range(done)]
    workdirs.start(tmp_path, given, corpus)
    assert workdirs.settled(tmp_path, parse(**training)) == given


def test_an_origin_is_written_as_it_is_read(tmp_path):
    for text in ("/a", "/a@3", "/a:all", "/a@3:all", "/a@b@3", "/a:b:all"):
        assert str(origin.Origin.parse(text)) == text
    assert origin.names("/a", "/a@3")
    assert not origin.names("/a:all", "/a@3")
    assert not origin.names("/a@2", "/a@3")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("runs/[a]@3", r"--init_from=.*runs/\[a\] has \[ in its path"),
        ("runs/a@" + "9" * 5000, "is a path of 5,[0-9]+ bytes"),
        ("~nobody-of-this-name/run", "holds no checkpoint"),
        ("a\0b", "holds a NUL"),
    ],
)
def test_no_such_path(text, told):
    with pytest.raises(UsageError, match=told):
        origin.pinned(text)
