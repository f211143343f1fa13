"""What an experiment file may say, and what it is told when it may not."""

import copy
import json
import pathlib
import random
import runpy

import generated
import pytest

from longctx import config
from longctx.data import TASKS
from longctx.errors import UsageError
from longctx.layers import MIXERS, MLPS


def tree():
    block = {"mixer": {"kind": "gated_delta", "heads": 2}, "mlp": {"kind": "swiglu", "hidden": 64}}
    return {
        "model": {"pattern": ("delta",), "width": 32, "blocks": {"delta": block}},
        "training": {"stages": ((10, 4, 64),)},
    }


def parse(changes=()):
    given = copy.deepcopy(tree())
    for path, value in dict(changes).items():
        *parents, leaf = path.split(".")
        node = given
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return config.parse(given, MIXERS, MLPS, TASKS)


def test_fields_and_defaults():
    experiment = parse({"training.learning_rate": 1})
    assert experiment.training.stages == (config.Stage(10, 4, 64),)
    assert experiment.training.learning_rate == 1.0
    assert isinstance(experiment.training.learning_rate, float)
    assert experiment.model.blocks["delta"].mixer == MIXERS["gated_delta"].Config(heads=2)
    assert experiment.data == config.Data()


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("model.widht", 3, "model.widht is not a field; did you mean 'width'?"),
        ("model.width", "wide", "model.width is 'wide', of type str; expected int"),
        ("model.width", True, "of type bool; expected int"),
        ("model.pattern", ("delta", "other"), "names the block 'other'"),
        ("model.blocks.delta.mixer.kind", "mamba9", "model.blocks.delta.mixer.kind is 'mamba9'; choose one of"),
        ("model.blocks.delta.mixer.headz", 2, "model.blocks.delta.mixer.headz is not a field"),
        ("model.blocks.delta.mixer.heads", 0, "must be at least 1"),
        ("model.dtype", "float8", "model.dtype is 'float8'; choose one of"),
        ("training.stages", (), "training.stages is empty"),
        ("training.stages", ((10, 4),), "training.stages[0] is (10, 4); expected steps, batch, length"),
        ("training.accumulate", 3, "does not divide the batch of 4 rows"),
        ("mesh", {"data": -1, "context": -1}, "more than one axis open"),
        ("mesh.context", 3, "which mesh.context=3 does not divide"),
        ("data.needles.facts", 30, "the last stage's rows have no room"),
        ("data.kind", "text", "data.kind is 'text'; choose one of corpus, induction_heads, mqar"),
        ("data", {"kind": "corpus", "vocab": 3}, "data.vocab is not a field; did you mean 'vocab_size'?"),
        ("data", {"kind": "mqar", "path": ""}, "data.path is not a field; known fields are vocab_size, train, test"),
        ("data", "text", "data is 'text'; give a dictionary of its kind and options"),
        ("seed", -1, "seed is -1"),
        ("training.label_smoothing", 1.0, "label_smoothing is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_is_told(path, value, told):
    with pytest.raises(UsageError) as error:
        parse({path: value})
    assert told in str(error.value)


def test_everything_wrong_is_told_at_once():
    with pytest.raises(UsageError) as error:
        parse({"model.widht": 3, "training.learning_rate": -1.0, "mesh.context": 0})
    assert len(str(error.value).splitlines()) == 3


def test_a_required_field():
    given = tree()
    del given["training"]
    with pytest.raises(UsageError, match="training is missing"):
        config.parse(given, MIXERS, MLPS)


def test_data_of_a_kind():
    assert parse({"data": {"kind": "corpus", "vocab_size": 500}}).data == config.Data(vocab_size=500)
    task = parse({"data": {"kind": "induction_heads", "lengths": (32, 64)}}).data
    assert task == TASKS["induction_heads"](lengths=(32, 64))


EXPERIMENTS = sorted((pathlib.Path(__file__).parents[1] / "experiments").glob("*.py"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_file(path):
    """Every argument that it takes gives an experiment: on synthetic tasks every mixer, each in every size."""
    file = runpy.run_path(str(path))
    get_config, synthetic = file["get_config"], path.stem in TASKS
    if synthetic:
        arguments = [f"{kind},{size}" for kind in MIXERS for size in ("", "small", "smoke")]
    elif names := file.get("PATTERNS") or file.get("MLPS") or file.get("KINDS"):
        arguments = [f"{name}{size}" for name in names for size in ("", ",smoke")]
    elif rows := file.get("ROWS"):
        arguments = [f"{row}{kind}" for row in rows for kind in ("", ",attention")]
    else:
        arguments = ["", "smoke"]
    for argument in arguments:
        experiment = config.parse(get_config(argument), MIXERS, MLPS, TASKS)
        assert experiment.training.steps > 0
        assert experiment.data.kind == (path.stem if synthetic else "corpus")
    with pytest.raises(ValueError, match=r"give|knows|choose"):
        get_config("gated_delta,large")


def test_every_task_has_an_experiment():
    assert set(TASKS) <= {path.stem for path in EXPERIMENTS}


@pytest.mark.parametrize("seed", range(60))
def test_saved_is_what_is_parsed(seed):
    """Any experiment survives JSON: every kind, nested options, positions, tasks, tuples."""
    experiment = generated.repaired(generated.tree(random.Random(seed)))
    saved = json.loads(json.dumps(config.to_dict(experiment)))
    again = config.parse(saved, MIXERS, MLPS, TASKS)
    assert again == experiment
    assert json.dumps(config.to_dict(again)) == json.dumps(saved)


@pytest.mark.parametrize("kind", [*MIXERS, *MLPS])
def test_every_kind_inside_and_outside(kind):
    """Options of every kind, as a block has them and as those of a mixer in `multi_resolution`; seen to fail there."""
    registry, part = (MIXERS, "mixer") if kind in MIXERS else (MLPS, "mlp")
    given = {"mixer": {"kind": "gla"}, "mlp": {"kind": "relu2"}} | {part: registry[kind].Config()}
    inner = {"mixer": {"kind": "multi_resolution", "inner": given["mixer"]}, "mlp": given["mlp"]}
    experiment = parse({"model.blocks": {"delta": given, "inner": inner}})
    saved = json.loads(json.dumps(config.to_dict(experiment)))
    assert saved["model"]["blocks"]["delta"][part]["kind"] == kind
    assert config.parse(saved, MIXERS, MLPS, TASKS) == experiment
