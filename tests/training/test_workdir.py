"""What a working directory accepts, and what it gives back."""

import dataclasses
import json
import os

import pytest

from longctx import config
from longctx.data import TASKS, Tokenizer
from longctx.data.synthetic.mqar import MQAR, Setting
from longctx.errors import UsageError
from longctx.layers import MIXERS, MLPS
from longctx.training import workdir as workdirs


@pytest.fixture
def started(tmp_path, parse, corpus):
    workdirs.start(tmp_path / "run", parse(), corpus)
    return tmp_path / "run"


def test_an_experiment_survives_json(parse):
    """Tuples of stages, blocks with their options, booleans and floats."""
    experiment = parse(
        {"kind": "attention", "heads": 4, "kv_heads": 2, "sinks": True, "pattern": "Window(8)"}, learning_rate=1 / 3
    )
    again = config.parse(json.loads(json.dumps(config.to_dict(experiment))), MIXERS, MLPS, TASKS)
    assert config.to_dict(again) == config.to_dict(experiment)
    assert again.training == experiment.training
    assert dict(again.model.blocks) == dict(experiment.model.blocks)


def test_a_run_of_a_synthetic_task(tmp_path, parse):
    """No tokenizer is kept; nested options survive JSON, and other ones are refused."""
    task = MQAR(vocab_size=64, train=(Setting(16, 2), Setting(32, 4)), test=(Setting(16, 4),))
    experiment = dataclasses.replace(parse(), data=task)
    workdirs.start(tmp_path / "run", experiment, task)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "data.json"]
    run = workdirs.open_run(tmp_path / "run")
    assert run.experiment.data == task
    assert (run.tokenizer, run.vocab_size) == (None, 64)
    assert workdirs.start(tmp_path / "run", experiment, task) == []
    with pytest.raises(UsageError, match=r"data.power: 0.01 in the workdir, 1.0 given"):
        workdirs.check(tmp_path / "run", dataclasses.replace(experiment, data=dataclasses.replace(task, power=1.0)))


def test_open_run(started, parse, corpus):
    run = workdirs.open_run(started)
    assert config.to_dict(run.experiment) == config.to_dict(parse())
    assert run.tokenizer.vocab_size == corpus.tokenizer.vocab_size


def test_another_experiment_is_refused_with_what_differs(started, parse):
    before = {path: path.read_bytes() for path in started.iterdir()}
    given = parse({"kind": "attention", "heads": 1, "kv_heads": 1}, clip_norm=0.5)
    with pytest.raises(UsageError) as error:
        workdirs.check(started, dataclasses.replace(given, seed=3))
    for text in (
        "training.clip_norm: 1.0 in the workdir, 0.5 given",
        "model.blocks.only.mixer.heads: 2 in the workdir, 1 given",
        "seed: 0 in the workdir, 3 given",
    ):
        assert text in str(error.value)
    assert {path: path.read_bytes() for path in started.iterdir()} == before


def test_where_it_runs_may_change(started, parse, corpus):
    given = dataclasses.replace(parse(), mesh=config.Mesh(2, 2, 1), evaluation=config.Evaluation(samples=3))
    changes = workdirs.start(started, given, corpus)
    assert "mesh.context: 1 in the workdir, 2 given" in changes
    assert workdirs.open_run(started).experiment.evaluation.samples == 3


def test_another_corpus_is_refused(started, parse, corpus):
    with pytest.raises(UsageError, match=r"training_tokens: \d+ then, \d+ now"):
        workdirs.start(started, parse(), dataclasses.replace(corpus, train=corpus.heldout))


def test_another_corpus_of_the_same_size_is_refused(started, parse, corpus):
    """Fails when counts stand for the corpus: one token of one document is another."""
    tokens = corpus.train.tokens.copy()
    tokens[[7, 8]] = tokens[[8, 7]] if tokens[7] != tokens[8] else tokens[[8, 7]] + 1
    other = dataclasses.replace(corpus, train=dataclasses.replace(corpus.train, tokens=tokens))
    with pytest.raises(UsageError, match=r"training documents hold another text.* cannot go on"):
        workdirs.start(started, parse(), other)
    assert workdirs.compare_source(started, other, trained=False) == []  # evaluation measures what was held out
    swapped = dataclasses.replace(corpus, train=corpus.heldout, heldout=corpus.train)
    with pytest.raises(UsageError, match=r"were not held out then .* may have been trained on"):
        workdirs.compare_source(started, swapped, trained=False)


def test_a_data_json_without_digests_is_accepted_and_told(started, parse, corpus):
    found = json.loads((started / "data.json").read_text())
    old = {name: found[name] for name in ("tokenizer", "vocab_size", "training_tokens", "heldout_tokens")}
    (started / "data.json").write_text(json.dumps(old))
    assert "without digests" in workdirs.start(started, parse(), corpus)[0]


def harm_nothing_there(run):
    for path in run.iterdir():
        path.unlink()


def harm_no_tokenizer(run):
    (run / "tokenizer.json").unlink()


def harm_other_tokenizer(run):
    Tokenizer.train(["some words of text"] * 9, 300).save(run / "tokenizer.json")


def harm_config(run):
    (run / "config.json").write_text('{"model": ')


def harm_field(run):
    tree = json.loads((run / "config.json").read_text())
    tree["training"]["clip_nrm"] = tree["training"].pop("clip_norm")
    (run / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (harm_nothing_there, r"holds no config.json; give the folder of a run"),
        (harm_no_tokenizer, r"tokenizer.json is missing"),
        (harm_other_tokenizer, r"tokenizer.json is not the one that the model was trained with"),
        (harm_config, r"config.json cannot be read"),
        (harm_field, r"config.json cannot be used: .*did you mean 'clip_norm'"),
    ],
)
def test_a_run_that_cannot_be_opened(started, harm, told):
    harm(started)
    with pytest.raises(UsageError, match=told):
        workdirs.open_run(started)


def test_a_folder_that_is_not_there_or_not_a_folder(tmp_path, parse):
    with pytest.raises(UsageError, match="does not exist"):
        workdirs.open_run(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        workdirs.check(tmp_path / "file", parse())


def test_checkpoints_of_an_unknown_experiment(tmp_path, parse):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"checkpoints but no config.json"):
        workdirs.check(tmp_path, parse())


def test_no_checkpoint_to_load(started):
    with pytest.raises(UsageError, match="holds no checkpoint"):
        workdirs.load_model(workdirs.open_run(started))


def test_a_bad_tokenizer_stops_training_too(started, parse):
    """Training would make another one and write it there."""
    for harm, told in ((harm_other_tokenizer, "is not the one that"), (harm_no_tokenizer, "tokenizer.json is missing")):
        harm(started)
        before = sorted(path.name for path in started.iterdir())
        with pytest.raises(UsageError, match=told):
            workdirs.check(started, parse())
        assert sorted(path.name for path in started.iterdir()) == before


DEEP = b'{"a":' * 20_000 + b"1" + b"}" * 20_000
CONTENTS = {
    "list": b"[]",
    "empty": b"",
    "nul": b"\0" * 500,
    "deep": DEEP,
    "nan": b'{"seed": NaN}',
    "digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "utf-16": '{"seed": 0}'.encode("utf-16"),
    "bom": b"\xef\xbb\xbf{}",
    "latin-1": '{"seed": "é"}'.encode("latin-1"),
    "large": b" " * (2**24 + 1),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_a_file_that_is_no_json(started, parse, name, content):
    (started / name).write_bytes(CONTENTS[content])
    for read in (lambda: workdirs.open_run(started), lambda: workdirs.check(started, parse())):
        with pytest.raises(UsageError, match=name) as error:
            read()
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["config.json", "data.json", "tokenizer.json", "checkpoints"])
@pytest.mark.parametrize("form", ["the other", "link to nothing", "pipe"])
def test_something_else_in_its_place(started, parse, name, form):
    """A pipe that is read would be waited for without end."""
    path = started / name
    path.unlink(missing_ok=True)
    if form == "pipe":
        os.mkfifo(path)
    elif form == "link to nothing":
        path.symlink_to("nowhere")
    elif name == "checkpoints":
        path.touch()
    else:
        path.mkdir()
    before = sorted(started.iterdir())
    for read in (lambda: workdirs.open_run(started), lambda: workdirs.check(started, parse())):
        with pytest.raises(UsageError, match=rf"{name} is not a f(ile|older); restore it"):
            read()
    assert sorted(started.iterdir()) == before


def test_leftovers_of_writing_hinder_nothing(started, parse, corpus):
    for name in ("config.part", "data.part", "config.json.part"):
        (started / name).mkdir()
    workdirs.start(started, parse(), corpus)
    (started / "config.json").unlink()
    workdirs.start(started, parse(), corpus)
    workdirs.open_run(started)
