"""What the command line changes of an experiment file, and how layers of one's own are found again."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

import longctx
from longctx import config
from longctx.data import TASKS
from longctx.errors import UsageError
from longctx.layers import MIXERS, MLPS
from longctx.layers.basic import QKNorm
from longctx.layers.positions import YaRN
from longctx.overrides import ExperimentParser
from longctx.training import workdir as workdirs

FILE = """
from ml_collections import ConfigDict, FrozenConfigDict

def get_config(arg=""):
    attention = {"kind": "attention", "heads": 2, "kv_heads": 2, "pattern": "Window(8)"}
    hourglass = {"kind": "multi_resolution", "inner": {"kind": "attention", "heads": 8}}
    relu2 = {"kind": "relu2", "hidden": 8}
    blocks = {"a": {"mixer": attention, "mlp": relu2}, "b": {"mixer": hourglass, "mlp": relu2}}
    found = ConfigDict({
        "model": {"pattern": ("a", "b"), "width": 16, "blocks": blocks},
        "training": {"stages": ((1, 1, 256),), "clip_norm": 1},
    })
    return FrozenConfigDict(found) if arg else found
"""
# A layer that no one at longctx knows, and an experiment with it.
OWN = """
from __future__ import annotations

import dataclasses

from flax import nnx
from ml_collections import ConfigDict

from longctx.layers import MIXERS
from longctx.layers.basic import Linear
from longctx.schema import Options


class Mine(nnx.Module):
    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        rank: int = 4  # of the projection

    def __init__(self, width, options, rngs):
        self.into = Linear(width, options.rank, ("embed", "heads"), rngs)
        self.out = Linear(options.rank, width, ("heads", "embed"), rngs)

    def __call__(self, x, segments, state=None):
        return self.out(self.into(x)), None

    def init_state(self, batch, capacity, dtype):
        return None


MIXERS["mine"] = Mine


def get_config():
    blocks = {"a": {"mixer": {"kind": "mine", "rank": 2}, "mlp": {"kind": "relu2", "hidden": 8}}}
    return ConfigDict({
        "model": {"pattern": ("a",), "width": 16, "blocks": blocks},
        "training": {"stages": ((2, 2, 8),)},
        "data": {"kind": "induction_heads", "lengths": (8,)},
        "mesh": {"data": 1},
        "evaluation": {"samples": 1},
    })
"""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The experiment of a command line."""
    (tmp_path / "file.py").write_text(FILE)

    def experiment(*overrides, argument="", file=tmp_path / "file.py"):
        arguments = [f"--config={file}{argument}", *(f"--config.{override}" for override in overrides)]
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        values["config"].parser = ExperimentParser(name="config")
        values(sys.argv)
        found = config.parse(values.config, MIXERS, MLPS, TASKS)
        assert config.parse(json.loads(json.dumps(config.to_dict(found))), MIXERS, MLPS, TASKS) == found
        return found

    return experiment


def test_options_that_may_be_left_out(given):
    """False is none of them, and True their defaults, as in a file."""
    kind, norm = "model.blocks.a.mixer.kind=attention", "model.blocks.a.mixer.qk_norm"
    assert given(kind, f"{norm}=False").model.blocks["a"].mixer.qk_norm is None
    assert given(kind, f"{norm}=True").model.blocks["a"].mixer.qk_norm == QKNorm()
    assert given(kind, f"{norm}.over=all").model.blocks["a"].mixer.qk_norm == QKNorm(over="all")


def test_another_kind(given, capsys):
    """What both have stays, what only the old one has goes and is told, and the rest is the new one's."""
    found = given("model.blocks.a.mixer.kind=gla", "model.blocks.a.mixer.gate_rank=3").model.blocks["a"].mixer
    assert found == MIXERS["gla"].Config(heads=2, gate_rank=3)
    told = "note: with model.blocks.a.mixer.kind=gla the file's kv_heads, pattern are left out\n"
    assert capsys.readouterr().err == told
    assert given("data.kind=mqar").data == TASKS["mqar"]()
    assert capsys.readouterr().err == ""
    assert given("model.blocks.a.mlp.kind=swiglu").model.blocks["a"].mlp == MLPS["swiglu"].Config(hidden=8)


def test_nested_kinds_and_their_options(given):
    """Those that the file leaves out are open to the command line too."""
    inner = "model.blocks.b.mixer.inner"
    found = given(
        f"{inner}.positions.kind=yarn", f"{inner}.positions.factor=8", "model.blocks.a.mixer.positions.base=5e5"
    )
    assert found.model.blocks["b"].mixer.inner == MIXERS["attention"].Config(heads=8, positions=YaRN(factor=8.0))
    assert found.model.blocks["a"].mixer.positions.base == 5e5
    assert given(f"{inner}.kind=gla").model.blocks["b"].mixer.inner == MIXERS["gla"].Config(heads=8)


def test_every_field_is_open(given):
    """Whole numbers where a float belongs can become floats; whatever the file leaves out can be set."""
    found = given(
        "training.clip_norm=0.5", "evaluation.depths=3", "data.needles.facts=2", "checkpoints.keep=4", "seed=7"
    )
    assert (found.training.clip_norm, found.evaluation.depths, found.data.needles.facts) == (0.5, 3, 2)
    assert (found.checkpoints.keep, found.seed) == (4, 7)
    assert given("evaluation.factors=(1,)", "model.pattern=('a',)").evaluation.factors == (1,)


@pytest.mark.parametrize("kind", [*MIXERS, *MLPS])
def test_every_kind_with_its_defaults(given, kind):
    """What the command line fills in survives JSON too (`given` looks)."""
    part, kinds = ("mixer", MIXERS) if kind in MIXERS else ("mlp", MLPS)
    found = getattr(given(f"model.blocks.a.{part}.kind={kind}").model.blocks["a"], part)
    assert type(found) is kinds[kind].Config


@pytest.mark.parametrize(
    "path", sorted((Path(longctx.__file__).parents[1] / "experiments").glob("*.py")), ids=lambda path: path.stem
)
def test_an_experiment_file_with_its_defaults(given, path):
    """As the file alone gives it."""
    alone = config.parse(runpy.run_path(str(path))["get_config"](), MIXERS, MLPS, TASKS)
    assert given(file=path) == alone


def test_a_value_that_the_file_requires(given, tmp_path):
    required = FILE.replace("    return", "    found.seed = config_dict.required_placeholder(int)\n    return")
    (tmp_path / "file.py").write_text(required.replace("import ConfigDict,", "import ConfigDict, config_dict,"))
    with pytest.raises(flags.Error, match="seed is a required placeholder; give it a value in the file"):
        given()


def test_a_frozen_config(given):
    assert given(argument=":frozen") == given()


def test_a_registered_class_has_its_kind():
    """One that took over another's options too, and a kind is not taken twice."""
    taken = dict(MIXERS)

    class Other(MIXERS["gla"]):
        pass

    class Again(MIXERS["gla"]):
        pass

    try:
        MIXERS["other"] = Other
        assert (Other.Config(heads=2).kind, MIXERS["gla"].Config().kind) == ("other", "gla")
        with pytest.raises(ValueError, match=r"'other' is .* already; choose another name"):
            MIXERS["other"] = Again
        with pytest.raises(ValueError, match="is 'other' already; derive a class"):
            MIXERS["another"] = Other
    finally:
        del MIXERS["other"]
    assert dict(MIXERS) == taken


def test_a_layer_of_ones_own(tmp_path, given):
    """The config says where it is: a process that knows nothing of it finds it, and a file that is gone is named."""
    (tmp_path / "file.py").write_text(OWN)
    saved = config.to_dict(given())
    assert saved["plugins"] == [str(tmp_path / "file.py")]
    assert MIXERS | MLPS  # another registry of the same, which changes nothing
    assert config.to_dict(given()) == saved

    def forgotten():
        del MIXERS["mine"]
        for name in [name for name in sys.modules if name.startswith("longctx_file_")]:
            del sys.modules[name]

    forgotten()
    found = config.parse(saved, MIXERS, MLPS, TASKS)
    assert found.model.blocks["a"].mixer == MIXERS["mine"].Config(rank=2)
    forgotten()
    (tmp_path / "file.py").unlink()
    with pytest.raises(UsageError, match=r"plugins names '.*file.py', where layers are .*there is no such file"):
        config.parse(saved, MIXERS, MLPS, TASKS)


@pytest.mark.parametrize(
    "name", ["{folder}/file.py", "{folder}/inner/../file.py", "{folder}/link.py", "file", "file.of"]
)
def test_a_workdir_brings_no_code(tmp_path, monkeypatch, name):
    """Guards against code that runs because a workdir from elsewhere is looked at, here or from within."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "file.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "link.py").symlink_to(tmp_path / "file.py")
    (tmp_path / "config.json").write_text(json.dumps({"plugins": [name.format(folder=tmp_path)]}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    with pytest.raises(UsageError, match="a workdir brings no code"):
        workdirs.open_run(tmp_path)


def test_heads_follow_a_width_of_the_command_line(given, tmp_path):
    """They are no numbers until the width is known, and may be given all the same."""
    (tmp_path / "other.py").write_text(FILE.replace('"heads": 2, "kv_heads": 2, ', ""))

    def mixer(*overrides):
        return given("model.width=1024", *overrides, file=tmp_path / "other.py").model.blocks["a"].mixer

    assert (mixer().heads, mixer().kv_heads) == (32, 32)
    assert mixer("model.blocks.a.mixer.head_width=64").heads == 16
    assert mixer("model.blocks.a.mixer.kind=gla").heads == 32
    assert mixer("model.blocks.a.mixer.heads=8").heads == 8
