"""What a measurement would refuse is known before it begins."""

import dataclasses

import jax
import pytest

from longctx import config
from longctx.data.synthetic import InductionHeads
from longctx.errors import UsageError
from longctx.evals import check
from longctx.layers.position_schemes import XPos
from longctx.parallel import mesh as meshes
from longctx.training.step import Program


def with_mixer(experiment, mixer):
    """The experiment whose attention has the options that `mixer` makes of its own."""
    full = experiment.model.blocks["full"]
    full = dataclasses.replace(full, mixer=mixer(full.mixer))
    blocks = dict(experiment.model.blocks) | {"full": full}
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, blocks=blocks))


def checked(experiment, source, sizes=None):
    """`check`, of shapes alone."""
    mesh = meshes.make(sizes or config.Mesh(1, 1, 1))
    with jax.set_mesh(mesh):
        program = Program.make(experiment, 300, mesh)
        check(program.model(program.abstract.params), experiment, source)


TASK = InductionHeads(lengths=(40, 300))


@pytest.mark.parametrize("source", ["corpus", "task"])
def test_lengths_that_a_layer_refuses(experiment, corpus, source):
    """Longer rows than those of training, of 64 tokens. Guards against leaving out `check`."""
    given = corpus if source == "corpus" else TASK
    checked(experiment, given)
    short = with_mixer(experiment, lambda options: dataclasses.replace(options, positions=XPos(scale_base=1.0)))
    with pytest.raises(UsageError, match=r"evaluation of rows of (256|300) tokens .*more than xpos can scale"):
        checked(short, given)


def test_heads_that_the_devices_do_not_divide(experiment, corpus):
    heads = with_mixer(experiment, lambda options: dataclasses.replace(options, context_parallel="heads"))
    checked(heads, corpus, config.Mesh(1, 2, 1))
    with pytest.raises(UsageError, match="8 devices along context cannot share 2 heads"):
        checked(heads, corpus, config.Mesh(1, 8, 1))
