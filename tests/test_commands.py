"""The command line: what cannot be used is told in a sentence, with exit code 2, and nothing is written."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import generated
import pytest

import longctx
from longctx import commands

ROOT = Path(longctx.__file__).parents[1]
EXPERIMENT = """
from ml_collections import ConfigDict

def get_config(arg=""):
    if arg not in ("", "small"):
        raise ValueError(f"'{arg}' is not known; give 'small' or nothing")
    attention = {"kind": "attention", "heads": 2, "kv_heads": 2, "head_width": 8}
    blocks = {"only": {"mixer": attention, "mlp": {"kind": "swiglu", "hidden": 16}}}
    return ConfigDict({
        "model": {"width": 16, "pattern": ("only",), "repeats": 1, "blocks": blocks},
        "training": {"stages": ((2, 4, 32), (2, 4, 64)), "learning_rate": 1e-3},
        "data": {"path": "documents", "tokenizer": "bytes", "needles": {"rows": 0.5, "facts": 2}},
    })
"""
# One process that has everything imported, and forks for each case: importing takes most of a second's command.
FORKS = """
import json, os, sys
from longctx import commands, train

commands.define_config()
commands.define_workdir()
commands.define_processes()

def look():
    # What the command does before anything else.
    commands.experiment()
    commands.workdir()

main = train.main if sys.argv[1:] == ["train"] else look
ends = []
for case in json.load(sys.stdin):
    errors = os.open("errors", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    child = os.fork()
    if child == 0:
        os.dup2(errors, 2)
        sys.argv = ["longctx.train", *case]
        try:
            commands.run(main)
        except SystemExit as end:
            os._exit(end.code or 0)
    status = os.waitpid(child, 0)[1]
    ends.append((os.waitstatus_to_exitcode(status), open("errors").read()))
json.dump(ends, sys.stdout)
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
# A task, and a layer that is defined beside it.
TASK = """
from ml_collections import ConfigDict

from longctx.layers import MIXERS
from longctx.layers.gla import GLA

class Mine(GLA): ...

MIXERS["mine"] = Mine

def get_config():
    mixer = {"kind": "mine", "heads": 2, "key_width": 8, "value_width": 8}
    blocks = {"only": {"mixer": mixer, "mlp": {"kind": "relu2"}}}
    return ConfigDict({
        "model": {"width": 16, "pattern": ("only",), "blocks": blocks},
        "training": {"stages": ((3, 4, 16),)},
        "data": {"kind": "induction_heads", "lengths": (40,)},
        "mesh": {"data": 1},
        "evaluation": {"samples": 2},
    })
"""
HEADS = "--config.model.blocks.only.mixer.context_parallel=heads"
FILES = "experiment.py", "task.py", "experiment.py:small"
FILE, WORKDIR = "--config=experiment.py", "--workdir=run"
CASES = {
    "unknown section": (
        [FILE, WORKDIR, "--config.trainin.seed=1"],
        "'trainin' is not a field; did you mean 'training'",
    ),
    "unknown option": (
        [FILE, WORKDIR, "--config.model.blocks.only.mixer.pattrn='Causal()'"],
        "'model.blocks.only.mixer.pattrn' is not a field; did you mean 'model.blocks.only.mixer.pattern'",
    ),
    "wrong type": (
        [FILE, WORKDIR, "--config.model.repeats=abc"],
        "--config.model.repeats=abc: expected a whole number",
    ),
    "wrong stages": ([FILE, WORKDIR, "--config.training.stages=((1,2),)"], r"stages\[0\] is \(1, 2\); expected steps"),
    "wrong value": ([FILE, WORKDIR, "--config.model.dtype=f32"], "model.dtype is 'f32'; choose one of auto, float32"),
    "a field that the file leaves out": ([FILE, WORKDIR, "--config.checkpoints.every=0"], "checkpoints.every is 0"),
    "override first": (["--config.seed=1", FILE, WORKDIR], "--config.seed=1 in argv before a value for --config"),
    "no such file": (["--config=none.py", WORKDIR, "--config.seed=1"], "--config=none.py: there is no such file"),
    "not Python": (["--config=broken.py", WORKDIR], "--config=broken.py: line 2: SyntaxError"),
    "raises": (["--config=raises.py", WORKDIR], "--config=raises.py: line 2: NameError: name 'nothing' is not defined"),
    "no config": (["--config=empty.py", WORKDIR], "defines no function get_config"),
    "wrong argument": (["--config=experiment.py:large", WORKDIR], "'large' is not known; give 'small' or nothing"),
    "unknown flag": ([FILE, WORKDIR, "--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
    "no flag": ([FILE, WORKDIR, "extra"], "'extra' is not a flag"),
    "no workdir": ([FILE], "--workdir is missing"),
    "no experiment": ([WORKDIR], "--config is missing"),
    "too few devices": ([FILE, WORKDIR, "--config.mesh.data=16"], "needs 16 devices and there are 8"),
    "batch": ([FILE, WORKDIR, "--config.mesh.data=8"], r"stages\[0\] has 4 rows in a micro-batch, which the 8 devices"),
    "heads that the devices do not divide": (
        [FILE, WORKDIR, "--config.mesh.data=1", "--config.mesh.context=8", HEADS],
        r"training.stages\[0\], 4 rows of 32 tokens: context_parallel is .heads., and 8 devices .* 2 heads",
    ),
    "unknown option of a task": (
        ["--config=task.py", WORKDIR, "--config.data.vocab=8"],
        "'data.vocab' is not a field; did you mean 'data.vocab_size'",
    ),
    "a task's option that the file leaves out": (
        ["--config=task.py", WORKDIR, "--config.data.vocab_size=2"],
        "data.vocab_size is 2; the trigger and two other tokens are needed",
    ),
    "an option of another kind of data": (
        ["--config=task.py", WORKDIR, "--config.data.path=documents"],
        "'data.path' is not a field; the fields there are kind, lengths, vocab_size",
    ),
    "rows too short for the task": (
        ["--config=task.py", WORKDIR, "--config.training.stages=((1,4,2),)"],
        "rows of 2 tokens, too few for the task 'induction_heads'",
    ),
    "processes without a coordinator": ([FILE, WORKDIR, "--num_processes=2"], "but not where process 0 is"),
    "a coordinator without a port": (
        [FILE, WORKDIR, "--coordinator=localhost", "--num_processes=2", "--process_id=0"],
        "--coordinator=localhost --num_processes=2 --process_id=0 name no process",
    ),
    "a process past the last": (
        [FILE, WORKDIR, "--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
        "--process_id=2 name no process",
    ),
    "no cluster": ([FILE, WORKDIR, "--coordinator=auto"], "--coordinator=auto found no cluster"),
    "an experiment that leaves Python": (["--config=leaves.py", WORKDIR], "leaves.py: line 2: SystemExit: 3"),
    "an experiment that raises anything": (["--config=anything.py", WORKDIR], "line 4: Odd: of no known kind"),
    "a dictionary": (["--config=dictionary.py", WORKDIR], "returned a dict; it must return a ConfigDict"),
    "a folder": (["--config=documents", WORKDIR], "there is no such file"),
    "a long name": ([f"--config={'x' * 5000}.py", WORKDIR], "there is no such file"),
    "a kind that is none": (
        [FILE, WORKDIR, "--config.model.blocks.only.mixer.kind=mamba9"],
        r"--config.model.blocks.only.mixer.kind=mamba9: choose one of adaptive_span, attention",
    ),
    "an option of the kind before": (
        [FILE, WORKDIR, "--config.model.blocks.only.mixer.kind=gla", "--config.model.blocks.only.mixer.kv_heads=2"],
        "'model.blocks.only.mixer.kv_heads' is not a field",
    ),
    "an option of a nested kind": (
        [FILE, WORKDIR, "--config.model.blocks.only.mixer.positions.factor=2"],
        "'model.blocks.only.mixer.positions.factor' is not a field; the fields there are base, kind, share",
    ),
    "not a number": (
        [FILE, WORKDIR, "--config.training.learning_rate=nan"],
        "learning_rate is nan; give 0, or a number",
    ),
    "a seed of 33 bits": (
        [FILE, WORKDIR, "--config.seed=4294967296"],
        "seed is 4294967296; give a whole number from 0",
    ),
    "a width that no machine has": (
        [FILE, WORKDIR, "--config.model.width=2147483648"],
        "model.width is 2147483648; give a whole number from .* to 1,048,576",
    ),
    "a model that no machine has": (
        [FILE, WORKDIR, "--config.model.width=1048576", "--config.model.repeats=1048576"],
        "the model has [0-9,]+ parameters, [0-9,]+ of them in each block 'only'",
    ),
    "a model that this machine cannot hold": (
        [FILE, WORKDIR, "--config.mesh.data=1", "--config.model.width=1048576", "--config.model.repeats=64"],
        "parameters, whose training takes [0-9,.]+ GiB before any row is read, and the 1 devices have",
    ),
    "a plugin that is gone": (
        [FILE, WORKDIR, "--config.plugins=('gone.py',)"],
        "plugins names '.*gone.py', where layers",
    ),
    "no documents": (
        [FILE, WORKDIR, "--config.mesh.data=1", "--config.data.path=none"],
        "data.path is 'none', which does not exist",
    ),
    "short corpus": (
        [FILE, WORKDIR, "--config.mesh.data=1", "--config.training.stages=((1,1,99999),)"],
        "rows of 99999 tokens, and the corpus has",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    (folder / "experiment.py").write_text(EXPERIMENT)
    (folder / "task.py").write_text(TASK)
    (folder / "broken.py").write_text("def get_config():\n    return 1 +\n")
    (folder / "raises.py").write_text("def get_config():\n    return nothing\n")
    (folder / "leaves.py").write_text("def get_config():\n    raise SystemExit(3)\n")
    odd = "class Odd(BaseException): ...\n\ndef get_config():\n    raise Odd('of no known kind')\n"
    (folder / "anything.py").write_text(odd)
    (folder / "dictionary.py").write_text("def get_config():\n    return {}\n")
    (folder / "empty.py").write_text("config = 1\n")
    (folder / "documents").mkdir()
    for i in range(20):
        (folder / "documents" / f"{i}.txt").write_text(f"the document number {i} says little, " * 20)
    return folder


def ended(folder, lines, *arguments):
    """(exit code, stderr) of each command line; none of them may write anything."""
    found = subprocess.run(
        [sys.executable, "-c", FORKS, *arguments],
        input=json.dumps(lines),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not (folder / "run").exists(), "a refused command wrote something"
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def ends(folder):
    """Of every case."""
    return dict(zip(CASES, ended(folder, [arguments for arguments, _ in CASES.values()], "train"), strict=True))


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(100, 2100), marks=pytest.mark.slow)], ids=len)
def test_any_command_line(folder, seeds):
    """Accepted, or told in sentences with exit code 2."""
    lines = [generated.arguments(random.Random(seed), FILES[seed % 3], "run") for seed in seeds]
    for line, (code, told) in zip(lines, ended(folder, lines), strict=True):
        assert code in (0, 2), (line, told)
        assert all(one.startswith(("error: ", "note: ")) and len(one) < 1500 for one in told.splitlines()), (line, told)
        assert told or code == 0, line


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_used(ends, case):
    """Exit code 2, and each line of stderr a sentence."""
    code, told = ends[case]
    assert code == 2, told
    assert re.search(CASES[case][1], told), told
    assert all(line.startswith("error: ") for line in told.splitlines()), told


@pytest.mark.system
def test_train(folder, tmp_path):
    """The whole command: trained, evaluated, nothing on stderr but the bars; then evaluated again, without training."""
    small = {"factors": "(1,)", "depths": 1, "samples": 1, "final_block": 8, "documents": 2}
    command = [sys.executable, "-m", "longctx.train", FILE, f"--workdir={tmp_path}", "--config.mesh.data=1"]
    command += [f"--config.evaluation.{name}={value}" for name, value in small.items()]
    environment = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    for said in ("compiled in", ""):
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert (tmp_path / "report" / "report.html").exists()
        assert str(tmp_path / "report") in ended.stdout
        assert said in ended.stderr
        assert not re.search(r"WARNING|^[IWE]\d{4} |Traceback", ended.stderr, re.MULTILINE), ended.stderr
    assert "compiling the step" not in ended.stderr
    other = [sys.executable, "-m", "longctx.evaluate", f"--workdir={tmp_path}"]
    other += [f"--config.{field}" for field in ("evaluation.samples=2", "evaluation.factors=(1,2)")]
    other += ["--config.data.path=documents/1.txt"]
    ended = subprocess.run(other, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "evaluation.samples was 1, and is 2 in this report." in ended.stdout
    assert "Held out: 1 of 1 documents ('1.txt'), 100.0% of the text." in ended.stdout
    assert (tmp_path / "report.2" / "report.html").exists()  # kept, as the first
    ended = subprocess.run([*other, "--config.evaluation.sampels=2"], cwd=folder, env=environment, capture_output=True)
    assert ended.returncode == 2
    assert b"did you mean 'evaluation.samples'" in ended.stderr


@pytest.mark.system
def test_a_synthetic_task(folder, tmp_path):
    """Trained, evaluated and reported as a corpus is; its config tells another process where the layer is."""
    environment = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}

    def run(command, *arguments):
        arguments = [sys.executable, "-m", f"longctx.{command}", f"--workdir={tmp_path / 'run'}", *arguments]
        return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    trained = run("train", "--config=task.py")
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"accuracy in induction_heads at 40 tokens \(guessing: 7%\)", trained.stdout)
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    refused = run("generate", "--prompt=x")
    assert refused.returncode == 2
    assert "is of the synthetic task 'induction_heads', whose tokens are numbers" in refused.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "runs/a"), "runs/a cannot be read or written: Permission denied."),
        (OSError(28, "No space left", "runs/a"), "runs/a cannot be written: No space left. Make room"),
        (OSError("of a library"), "a file cannot be read or written: of a library."),
    ],
)
def test_what_the_system_refuses_is_told_in_a_sentence(capsys, error, told):
    def main():
        raise error

    assert commands._ended(main) == 1
    assert capsys.readouterr().err.startswith(f"error: {told}")


def test_a_reader_that_has_gone_is_no_error(monkeypatch):
    """As `head` goes: what is left to write goes nowhere, and the code is 0."""

    def main():
        raise BrokenPipeError(32, "Broken pipe")

    moved = []
    monkeypatch.setattr(commands.os, "dup2", lambda *ends: moved.append(ends))
    monkeypatch.setattr(commands.sys, "stdout", sys.__stdout__)
    assert commands._ended(main) == 0
    assert len(moved) == 1
