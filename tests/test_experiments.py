"""Every experiment file runs on eight devices as it is: parsed, laid over them, and all its programs traced."""

import dataclasses
import pathlib
import runpy
import types

import jax
import numpy as np
import pytest

from longctx import config, evals
from longctx.data import TASKS, Task
from longctx.errors import UsageError
from longctx.layers import MIXERS, MLPS
from longctx.planning.compiled import vocabulary
from longctx.training import loop
from longctx.training.step import Program

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
# The others run as they are; this one is made for more devices, and takes eight for its shorter rows.
ARGUMENTS = {"hybrid_1b_1m": ("128k",)}
LONG = types.SimpleNamespace(heldout=types.SimpleNamespace(lengths=np.array([2**22])))  # enough for any context


def parsed(name):
    tree = runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](*ARGUMENTS.get(name, ()))
    return config.parse(tree, MIXERS, MLPS, TASKS)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_on_eight_devices(name):
    """Its last stage, and its longest rows. Guards against an axis of -1 that takes all devices."""
    experiment = parsed(name)
    longest = dataclasses.replace(experiment.evaluation, factors=(max(experiment.evaluation.factors),))
    mesh = loop.make_mesh(experiment)
    with jax.set_mesh(mesh):
        program = Program.make(experiment, vocabulary(experiment.data), mesh)
        program.trace(experiment.training.stages[-1])
        source = experiment.data if isinstance(experiment.data, Task) else LONG
        experiment = dataclasses.replace(experiment, evaluation=longest)
        evals.check(program.model(program.abstract.params), experiment, source)


def test_made_for_more():
    tree = runpy.run_path(str(FOLDER / "hybrid_1b_1m.py"))["get_config"]("1m")
    with pytest.raises(UsageError, match="there are 8 and the other axes take 16"):
        loop.make_mesh(config.parse(tree, MIXERS, MLPS, TASKS))
