"""One process: the gradients of the first batch, then the whole run. Arguments as of longctx.train, and --gradients."""

from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from longctx import commands, data
from longctx.training import loop
from longctx.training.step import Program, token_weights

_GRADIENTS = flags.DEFINE_string("gradients", None, "The .npz to write.")


def main():
    experiment, workdir = commands.experiment(), commands.workdir()
    with commands.joined():
        source = data.prepare(experiment.data, experiment.seed)
        save_gradients(experiment, source, Path(_GRADIENTS.value))
        loop.train(experiment, workdir, source)


def save_gradients(experiment, source, path):
    """Of the mean loss of the first batch, for every parameter."""
    mesh = loop.make_mesh(experiment)
    with jax.set_mesh(mesh):
        program = Program.make(experiment, source.vocab_size, mesh)
        stage = experiment.training.stages[0]
        batch = loop._spread(next(loop._batches(experiment, source, program, 0)), stage, program)

        def gradients(params, batch):
            weight = token_weights(batch, experiment.training.answer_weight).sum()
            return program._gradient(params, batch, weight)[0]

        whole = NamedSharding(mesh, PartitionSpec())
        found = jax.jit(gradients, out_shardings=whole)(program.init().params, batch)
        if jax.process_index() == 0:
            leaves = jax.tree.leaves_with_path(found)
            np.savez(path, **{jax.tree_util.keystr(name): np.asarray(value) for name, value in leaves})


if __name__ == "__main__":
    commands.define_config()
    commands.define_workdir()
    commands.define_processes()
    commands.run(main)
