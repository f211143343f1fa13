"""A run that is stopped, killed or harmed goes on bit for bit; one that diverges stops and says where."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longctx
from longctx import config
from longctx.data.synthetic import SelectiveCopying
from longctx.errors import RunError, UsageError
from longctx.parallel import mesh as meshes
from longctx.training import checkpoints, loop, metrics, start
from longctx.training import workdir as workdirs
from longctx.training.step import Program
from longctx.typing import Segments

HEADS = {"kind": "attention", "heads": 2, "kv_heads": 2, "head_width": 8, "context_parallel": "heads"}
STEPS = 9  # 4 of stage 0, 5 of stage 1; checkpoints after every second and the last


def losses(workdir):
    """The bits of every step's loss and gradient norm, in order; one line a step."""
    rows = metrics.read(workdir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"].hex(), row["gradient_norm"].hex(), row["answers"]) for row in rows]


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def straight(tmp_path_factory, parse, corpus, cache):
    """The workdir of a run that nothing interrupted, and what `train` returned."""
    workdir = tmp_path_factory.mktemp("straight")
    experiment = parse()
    measured = dataclasses.replace(experiment.evaluation, every=4)
    return workdir, loop.train(
        dataclasses.replace(experiment, evaluation=measured), workdir, corpus, lambda *given: HeldOut(given)
    )


class HeldOut:
    """In place of `evals.HeldOut`: the sum of the embedding, and a second of time."""

    def __init__(self, given):
        assert [type(each).__name__ for each in given] == ["GraphDef", "Experiment", "Corpus"]

    def __call__(self, params):
        time.sleep(1)
        self.found = float(np.abs(params["embedding"]).sum())
        return self

    def scalars(self):
        return {"heldout_loss": self.found, "heldout_bits_per_byte": 2.0}


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, act)`: calls `act` when the batch of step n has been taken."""

    def install(step, act):
        describe, taken = loop.data.describe, []

        def counted(*args):
            taken.append(None)
            if len(taken) == step:
                act()
            return describe(*args)

        monkeypatch.setattr(loop.data, "describe", counted)

    return install


def test_a_run(straight):
    workdir, summary = straight
    assert summary["finished"]
    assert summary["steps"] == STEPS
    assert summary["tokens"] == 4 * 4 * 32 + 5 * 2 * 64
    assert steps(workdir) == [8, 9]
    assert [row["stage"] for row in metrics.read(workdir)] == [0] * 4 + [1] * 5
    assert sum(row["answers"] for row in metrics.read(workdir)) > 0
    assert json.loads((workdir / "config.json").read_text())["training"]["log_every"] == 3


def test_held_out_loss_is_of_the_step_that_it_follows(straight, tmp_path, parse, corpus):
    """After steps 4 and 8, of the parameters that a stop right after step 4 saves, and in nobody's time."""
    rows = metrics.read(straight[0])
    assert [row["step"] for row in rows if "heldout_loss" in row] == [4, 8]
    assert all(row["seconds"] < 0.9 for row in rows)
    assert rows[3]["heldout_bits_per_byte"] == 2.0
    run = workdirs.open_run(straight[0])
    shapes = loop.Program.make(run.experiment, run.tokenizer.vocab_size, loop.make_mesh(run.experiment)).abstract.params
    saved, _ = checkpoints.load_params(straight[0], shapes)
    assert rows[7]["heldout_loss"] != pytest.approx(float(np.abs(saved["embedding"]).sum()), rel=1e-6)  # of step 9
    (tmp_path / "run").mkdir()
    shutil.copytree(straight[0] / "checkpoints" / "8", tmp_path / "run" / "checkpoints" / "8")
    saved, _ = checkpoints.load_params(tmp_path / "run", shapes)
    assert rows[7]["heldout_loss"] == pytest.approx(float(np.abs(saved["embedding"]).sum()), rel=1e-6)


def test_a_start_says_what_the_run_is(straight, parse, corpus):
    """Parameters, devices, memory, corpus and epochs, in start.json and in lines."""
    found = json.loads((straight[0] / "start.json").read_text())
    assert found["run"]["name"] == straight[0].name
    assert found["parameters"] == straight[1]["parameters"]
    assert found["devices"] == 1
    assert found["mesh"] == {"data": 1, "context": 1, "model": 1}
    assert found["state_bytes"] == pytest.approx(3 * 4 * found["parameters"], rel=0.01)  # and two moments
    assert found["corpus"]["training_tokens"] == corpus.train.size
    assert found["corpus"]["heldout_documents"] == len(corpus.heldout)
    assert found["epochs"] == pytest.approx(straight[1]["tokens"] / corpus.train.size)
    text = "\n".join(start.lines(found))
    assert f"{found['parameters']:,} parameters" in text
    assert f"{found['epochs']:.3g} epochs" in text
    del found["corpus"], found["epochs"]
    assert "made anew" in "\n".join(start.lines(found))


def test_a_finished_run_is_left_as_it_is(straight, parse, corpus, monkeypatch):
    workdir, summary = straight
    monkeypatch.setattr(Program, "compile", lambda *_: pytest.fail("trained again"))
    assert loop.train(parse(), workdir, corpus) == summary


def test_the_trained_model_is_loaded(straight):
    run = workdirs.open_run(straight[0])
    model, step = workdirs.load_model(run)
    assert step == STEPS
    assert len(model.embedding[...].devices()) == 1
    initial = loop.Program.make(run.experiment, run.tokenizer.vocab_size, loop.make_mesh(run.experiment)).init()
    assert not np.array_equal(model.embedding[...], initial.params["embedding"])


def test_longctx_load(straight):
    """On the first device, or over the ambient mesh."""
    model, tokenizer = longctx.load(straight[0])
    tokens = tokenizer.encode("a bad cab")[None]
    hidden, _ = model(tokens, Segments.single(*tokens.shape))
    assert model.logits(hidden).shape == (1, 9, tokenizer.vocab_size)
    with jax.set_mesh(meshes.make(config.Mesh(2, 2, 2))):
        split, _ = longctx.load(str(straight[0]))
        assert len(split.embedding[...].devices()) == 8
    np.testing.assert_array_equal(split.embedding[...], model.embedding[...])


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_asked_to_stop(straight, tmp_path, parse, corpus, at_step, step):
    """SIGTERM in the first stage, at its last step, and in the second: the step is finished and saved.

    Guards against an iterator that is saved a batch late, or not restored within its stage.
    """
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not loop.train(parse(), tmp_path, corpus)["finished"]
    assert steps(tmp_path)[-1] == step
    assert losses(tmp_path) == losses(straight[0])[:step]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert loop.train(parse(), tmp_path, corpus)["finished"]
    assert losses(tmp_path) == losses(straight[0])


def test_a_synthetic_task_asked_to_stop(tmp_path, parse, cache, at_step):
    """In the second of two stages; fails if the rows after it are those of the first stage, or of the start."""
    task = SelectiveCopying(items=4, lengths=(32,))
    experiment = dataclasses.replace(parse(stages=((2, 4, 16), (3, 4, 16))), data=task)
    assert loop.train(experiment, tmp_path / "straight", task)["finished"]
    assert all(answers == 4 * 4 for _, _, answers in losses(tmp_path / "straight"))
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not loop.train(experiment, tmp_path / "stopped", task)["finished"]
    assert loop.train(experiment, tmp_path / "stopped", task)["finished"]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert longctx.load(tmp_path / "stopped")[1] is None  # its tokens are numbers


def test_killed(straight, tmp_path, parse, documents, corpus, cache):
    """kill -9 in a process of its own, in the second stage, past a checkpoint that may or may not be written."""
    program = """
import json, os, signal, sys
from longctx import config, data
from longctx.layers import MIXERS, MLPS
from longctx.training import loop

experiment, documents, workdir = json.load(sys.stdin)
describe, taken = data.describe, []

def counted(*args):
    taken.append(None)
    if len(taken) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return describe(*args)

data.describe = counted
loop.train(config.parse(experiment, MIXERS, MLPS), workdir, data.prepare(config.Data(**documents), 0))
"""
    given = config.to_dict(parse()), {"path": documents.path, "tokenizer": documents.tokenizer}, str(tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(Path(longctx.__file__).parents[1]),
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    ended = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(given), text=True, env=environment, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert steps(tmp_path)[-1] in (4, 6)
    loop.train(parse(), tmp_path, corpus)
    assert losses(tmp_path) == losses(straight[0])


def test_the_newest_checkpoint_is_harmed(straight, tmp_path, parse, corpus, at_step, caplog):
    """Stopped at step 7, whose checkpoint is then damaged: goes on from step 6, and step 7 is saved again."""
    at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    loop.train(parse(), tmp_path, corpus)
    file = max((tmp_path / "checkpoints" / "7").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    file.write_bytes(file.read_bytes()[:-1])
    loop.train(parse(), tmp_path, corpus)
    assert "Step 6 is used instead" in caplog.text
    assert losses(tmp_path) == losses(straight[0])


def test_the_disk_is_full(straight, tmp_path, parse, corpus, at_step):
    """From step 5 on no large file can be written: told in a sentence, step 4 is whole, and with room it goes on.

    A limit on the size of files stands for the full disk: it needs no rights. Seen to fail when `save` writes in place.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        end = time.monotonic() + 60
        while not (tmp_path / "checkpoints" / "4" / "SHA256SUMS").exists() and time.monotonic() < end:
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, limits[1]))

    at_step(5, fill)
    try:
        with pytest.raises(RunError, match="the checkpoint of step 6 cannot be written") as error:
            loop.train(parse(), tmp_path, corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path / 'checkpoints' / '4'} is the last good checkpoint" in str(error.value)
    assert steps(tmp_path) == [2, 4]
    assert loop.train(parse(), tmp_path, corpus)["finished"]
    assert losses(tmp_path) == losses(straight[0])


def test_on_another_mesh(straight, tmp_path, parse, corpus, at_step):
    """Saved on one device, gone on with on eight. Tolerance 1e-4 of losses near 5: the sums' order differs."""
    at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    loop.train(parse(), tmp_path, corpus)
    loop.train(dataclasses.replace(parse(), mesh=config.Mesh(2, 2, 2)), tmp_path, corpus)
    found, expected = ([row["loss"] for row in metrics.read(workdir)] for workdir in (tmp_path, straight[0]))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(("step", "rows", "good"), [(1, "0 to 3", None), (6, "2 to 3", 4)])
def test_a_loss_that_is_not_finite(tmp_path, parse, corpus, cache, monkeypatch, step, rows, good):
    """Told with the step, the rows and the last good checkpoint; nothing is saved after it, though step 6 is due.

    Guards against saving before the step's own metrics are read.
    """
    spread, taken = loop._spread, []

    def poisoned(batch, *args):
        taken.append(None)
        return spread(batch | {"weights": batch["weights"] * (np.nan if len(taken) == step else 1)}, *args)

    monkeypatch.setattr(loop, "_spread", poisoned)
    with pytest.raises(FloatingPointError) as error:
        loop.train(parse(), tmp_path, corpus)
    stage = 0 if step < 5 else 1
    assert f"the loss is nan at step {step}, on batch {step - 1 - 4 * stage} of stage {stage} " in str(error.value)
    assert f"(its rows {rows})" in str(error.value)
    assert len(metrics.read(tmp_path)) == step - 1
    if good is None:
        assert "nothing is saved" in str(error.value)
    else:
        assert steps(tmp_path)[-1] == good
        assert f"{tmp_path / 'checkpoints' / str(good)} is the last good checkpoint" in str(error.value)


@pytest.mark.parametrize("part", ["params", "optimizer"])
def test_a_state_that_is_not_finite(tmp_path, parse, corpus, cache, monkeypatch, part):
    """One number after step 6, whose loss and gradient are finite: nothing is saved after step 4."""
    compile_ = Program.compile

    def poisoned(program, stage):
        compiled = compile_(program, stage)

        def step(*given):
            state, metrics = compiled(*given)
            if state.step == 6:
                leaves, tree = jax.tree.flatten(getattr(state, part))
                index = max(i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating))
                leaves[index] = leaves[index].at[(0,) * leaves[index].ndim].set(jnp.inf)
                state = state._replace(**{part: jax.tree.unflatten(tree, leaves)})
            return state, metrics

        step.memory_analysis = compiled.memory_analysis
        return step

    monkeypatch.setattr(Program, "compile", poisoned)
    with pytest.raises(FloatingPointError, match="the state after the update is not finite at step 6, on batch 1 of"):
        loop.train(parse(), tmp_path, corpus)
    assert steps(tmp_path) == [2, 4]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mesh": config.Mesh(16, 1, 1)}, "needs 16 devices and there are 8"),
        ({"mesh": config.Mesh(4, 1, 1)}, r"stages\[1\] has 2 rows in a micro-batch, which the 4 devices"),
        ({"training": {"stages": ((1, 1, 10**6),)}}, "training tokens"),
        (
            {"mesh": config.Mesh(1, 8, 1), "mixer": HEADS},
            r"stages\[0\], 4 rows of 32 tokens: context_parallel is 'heads', and 8 devices along context cannot",
        ),
        (
            {
                "mixer": {"kind": "attention", "positions": {"kind": "xpos", "scale_base": 0.5}},
                "training": {"stages": ((1, 1, 16), (1, 1, 64))},
            },
            r"stages\[1\], 1 rows of 64 tokens: a span of 64 tokens is more than xpos can scale",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, parse, corpus, change, told):
    """Guards against steps that are traced only after `workdirs.start` has written."""
    experiment = parse(change.get("mixer"), **change.get("training", {}))
    experiment = dataclasses.replace(experiment, mesh=change.get("mesh", config.Mesh(1, 1, 1)))
    with pytest.raises(UsageError, match=told):
        loop.train(experiment, tmp_path / "run", corpus)
    assert not (tmp_path / "run").exists()


def test_what_a_check_refuses_is_refused_and_nothing_is_written(tmp_path, parse, corpus):
    def check(*_):
        raise UsageError("no room for this")

    with pytest.raises(UsageError, match="no room for this"):
        loop.train(parse(), tmp_path / "run", corpus, check=check)
    assert not (tmp_path / "run").exists()
