"""Working directories that were harmed in any way: they are used, or refused in a sentence and left as they are.

A seeded generator makes them of one run: some by default, hundreds with `-m slow`. What a command does with a workdir
is done, but for the steps of training and the measurements themselves.
"""

import dataclasses
import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.errors import RunError, UsageError
from longctx.folder import rows
from longctx.training import lock, loop, metrics
from longctx.training import workdir as workdirs
from longctx.training.checkpoints import Checkpoints
from longctx.training.step import Program

JUNK = [None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "x", "\0", [], [1], {}, {"a": 1}, [[[]]] * 3]
FOREIGN = [
    *("0999", "٣", "9" * 250, "7", "-1", "damaged-9", "damaged-8", "12.orbax-checkpoint-tmp", "SHA256SUMS"),
    *("config.part", "data.part", "metrics.part", "report", ".report.partial", ".report.old", "logs", "processes"),
    *("training.lock", "evaluating.lock", "metrics.jsonl.damaged-1", "start.json", "events.out.tfevents.9", "x" * 255),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory, parse, corpus):
    """The workdir of a finished run of 9 steps, its program, and the step's own state instead of a trained one."""
    workdir, experiment = tmp_path_factory.mktemp("sound"), parse()
    mesh = loop.make_mesh(experiment)
    with jax.set_mesh(mesh):
        program = Program.make(experiment, corpus.vocab_size, mesh)
    workdirs.start(workdir, experiment, corpus)
    checkpoints = Checkpoints(workdir, keep=2)
    for step in (8, 9):
        state = jax.tree.map(
            lambda leaf: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding), program.abstract
        )
        checkpoints.save(step, state._replace(step=jnp.uint32(step)))
    checkpoints.wait()
    with metrics.Metrics(workdir, experiment.training, 0, chief=True) as log:
        for step in range(1, 10):
            numbers = dict.fromkeys((*rows.NUMBERS, *rows.COUNTS), 1.0)
            log.record({"step": step, "stage": step // 5, **numbers, "retrieval_accuracy": None})
    (workdir / "report").mkdir()
    (workdir / "report" / "summary.json").write_text("{}")
    return workdir, program


@pytest.fixture
def commands(monkeypatch, parse, corpus, sound):
    """`train(workdir)` and `evaluate(workdir)`, without steps and measurements."""
    program = sound[1]
    monkeypatch.setattr(loop.Program, "make", lambda *_: program)
    monkeypatch.setattr(loop.Program, "trace", lambda *_: None)
    monkeypatch.setattr(loop, "_batches", lambda *_: None)
    monkeypatch.setattr(loop, "set_next_index", lambda *_: None)
    monkeypatch.setattr(loop._Run, "steps", lambda _, step, *__: step)
    monkeypatch.setattr(workdirs, "abstract_model", lambda *_: (program.graphdef, program.abstract.params))
    monkeypatch.setattr(workdirs, "placed", lambda params, _: params)

    def train(workdir):
        workdirs.check(workdir, parse())
        lock.check(workdir, "training")
        loop.train(parse(), workdir, corpus)

    def evaluate(workdir):
        run = workdirs.open_run(workdir)
        with lock.held(workdir, "evaluating"):
            workdirs.load_model(run)
            workdirs.compare_source(workdir, corpus, trained=False)
            metrics.summarise(workdir, run.experiment.training)

    return train, evaluate


def everything(workdir):
    """What is there, byte for byte."""

    def what(path):
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else path.is_dir()

    return {path.relative_to(workdir): what(path) for path in workdir.rglob("*")}


def harm(workdir, rng):
    """Does one thing to one path; says what."""
    paths = sorted(workdir.rglob("*"))
    if rng.random() < 0.5:  # those that commands read, more often
        paths = [path for path in paths if len(path.relative_to(workdir).parts) < 3] or paths
    if not paths:
        return "nothing is left"
    path = paths[rng.integers(len(paths))]
    kind = rng.choice(["delete", "truncate", "flip", "form", "json", "line", "foreign", "rename", "random", "append"])
    if kind == "json" and path.suffix != ".json":
        path = workdir / "config.json"
    if kind == "line":
        path = workdir / "metrics.jsonl"
    if kind in ("truncate", "flip", "json", "line", "random", "append") and not (
        path.is_file() and path.stat().st_size
    ):
        kind = "delete"
    told = f"{kind} {path.relative_to(workdir)}"
    match kind:
        case "delete" | "form":
            form = rng.choice(["file", "folder", "full folder", "link to nothing", "loop", "pipe"])
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if kind == "delete" or not path.parent.is_dir():
                return told
            told += f" into {form}"
            match form:
                case "file":
                    path.write_bytes(rng.bytes(rng.integers(100)))
                case "folder":
                    path.mkdir()
                case "full folder":
                    path.mkdir()
                    (path / "inside").write_text("x")
                case "pipe":
                    os.mkfifo(path)
                case _:
                    path.symlink_to("nowhere" if form == "link to nothing" else path)
        case "truncate":
            path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])
        case "flip":
            content = bytearray(path.read_bytes())
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            path.write_bytes(content)
        case "random":
            path.write_bytes(rng.bytes(rng.integers(1, 1000)))
        case "append":
            path.write_bytes(path.read_bytes() + rng.bytes(rng.integers(1, 100)))
        case "json":
            try:
                tree = json.loads(path.read_text())
            except ValueError:
                return told
            told += f": {replace(tree, rng)}"
            path.write_text(json.dumps(tree))
        case "line":
            lines = path.read_bytes().split(b"\n")
            at = rng.integers(len(lines))
            lines[at] = json.dumps(JUNK[rng.integers(len(JUNK))]).encode() if rng.random() < 0.5 else lines[at][:-9]
            path.write_bytes(b"\n".join(lines))
        case "foreign" | "rename":
            folder = path if path.is_dir() else path.parent
            to = folder / rng.choice(FOREIGN)
            if os.path.lexists(to) or (path == folder and kind == "rename"):
                return told
            told += f" to {to.name[:20]}"
            if kind == "rename":
                path.rename(to)
            elif path.is_file():
                shutil.copy(path, to)
            else:
                to.mkdir()
    return told


def replace(tree, rng):
    """Puts junk at a place of a nested value, in place; says where."""
    if not isinstance(tree, dict | list) or not tree:
        return "a scalar"
    key = rng.choice(list(tree)) if isinstance(tree, dict) else int(rng.integers(len(tree)))
    if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.7:
        return f"{key}.{replace(tree[key], rng)}"
    if isinstance(tree, dict) and rng.random() < 0.2:
        del tree[key]
        return f"{key} gone"
    tree[key] = JUNK[rng.integers(len(JUNK))]
    return f"{key} = {tree[key]!r}"


def outcome(command, workdir):
    """The sentence that refused, if one did."""
    try:
        command(workdir)
    except (UsageError, RunError) as error:
        return str(error)
    return ""


def tried(seed, sound, commands, folder):
    """One harmed workdir, tried by both commands, in one order or the other."""
    rng = np.random.default_rng(seed)
    workdir = folder / f"run-{seed}"
    shutil.copytree(sound[0], workdir)
    told = [harm(workdir, rng) for _ in range(rng.integers(1, 4))]
    try:
        for command in rng.permutation(np.array(commands, object)):
            before = everything(workdir)
            if refusal := outcome(command, workdir):
                after = everything(workdir)
                assert 10 < len(refusal) < 2000
                assert after.keys() == before.keys(), "a refused command left or removed something"
                assert after == before, "a refused command changed something"
        if not outcome(commands[0], workdir):  # what was mended stays mended
            assert all(json.loads(line) for line in (workdir / rows.FILE).read_text().splitlines())
            before = everything(workdir).keys()
            assert not outcome(commands[0], workdir)
            assert before <= everything(workdir).keys()
    except BaseException as error:
        error.add_note(f"seed {seed}: {'; '.join(told)}")
        raise
    shutil.rmtree(workdir)


def test_the_sound_one(sound, commands, tmp_path):
    """Otherwise the rest would say nothing."""
    shutil.copytree(sound[0], tmp_path / "run")
    assert [outcome(command, tmp_path / "run") for command in commands] == ["", ""]


def unusable(workdir):
    for step in ("8", "9"):
        (workdir / "checkpoints" / step / "SHA256SUMS").write_text("?")


def renamed(workdir):
    (workdir / "checkpoints" / "9").rename(workdir / "checkpoints" / "7")
    (workdir / "checkpoints" / "8").rename(workdir / "checkpoints" / "9")


@pytest.mark.parametrize(
    ("change", "told"),
    [(unusable, "no checkpoint is usable"), (renamed, "9 holds the state after 8 steps, which is not its name")],
)
def test_what_is_refused_late_changes_nothing(sound, commands, tmp_path, parse, change, told):
    """Though the experiment differs in what may, which config.json would follow. Seen to fail with it written first."""
    shutil.copytree(sound[0], tmp_path / "run")
    change(tmp_path / "run")
    tree = json.loads((tmp_path / "run" / "config.json").read_text())
    tree["evaluation"]["samples"] += 1
    (tmp_path / "run" / "config.json").write_text(json.dumps(tree))
    before = everything(tmp_path / "run")
    assert told in outcome(commands[0], tmp_path / "run")
    assert everything(tmp_path / "run") == before


def test_a_run_in_use_and_a_full_disk_are_refused(sound, commands, tmp_path, monkeypatch, parse, corpus):
    """Of the first start as well, which leaves no folder behind."""
    shutil.copytree(sound[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "9")  # a step is left
    with lock.held(tmp_path / "run", "training"):
        before = everything(tmp_path / "run")
        for train in (commands[0], lambda workdir: loop.train(parse(), workdir, corpus)):
            assert "is in use by another run: its pid" in outcome(train, tmp_path / "run")
        assert not outcome(commands[1], tmp_path / "run")
        assert everything(tmp_path / "run") == before
    before = everything(tmp_path / "run")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20 + 1))
    large = sound[1].abstract._replace(params=jax.ShapeDtypeStruct((2**20,), jnp.float32))
    monkeypatch.setattr(loop.Program, "make", lambda *_: dataclasses.replace(sound[1], abstract=large))
    assert " MiB are needed to save" in outcome(commands[0], tmp_path / "run")
    assert everything(tmp_path / "run") == before
    assert " MiB are needed to save" in outcome(commands[0], tmp_path / "new")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20 - 1))
    assert "1.0 MiB are needed to save" in outcome(commands[0], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("seed", range(0, 40, 10))
def test_harmed(seed, sound, commands, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    for each in range(seed, seed + 10):
        tried(each, sound, commands, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1000, 2000, 100))
def test_hundreds_harmed(seed, sound, commands, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    for each in range(seed, seed + 100):
        tried(each, sound, commands, tmp_path)
