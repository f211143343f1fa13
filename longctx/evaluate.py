"""Evaluates a trained model on held-out text, or on new rows of its task, and writes WORKDIR/report anew.

    python -m longctx.evaluate --workdir=runs/quickstart

What is measured is the `evaluation` part of the experiment; training does the same at its end.
"""

from __future__ import annotations

import jax
from absl import flags

from longctx import commands, config, data, evals
from longctx.errors import UsageError
from longctx.parallel import mesh as meshes
from longctx.training import metrics
from longctx.training import workdir as workdirs

_MESH = flags.DEFINE_list("mesh", None, "Devices as DATA,CONTEXT,MODEL; by default as in training.")


def main() -> None:
    with commands.joined():
        _evaluate(workdirs.open_run(commands.workdir()))


def _evaluate(run: workdirs.Run) -> None:
    experiment = run.experiment
    mesh = meshes.make(experiment.mesh if _MESH.value is None else _sizes(_MESH.value))
    model, _ = workdirs.load_model(run, mesh)
    source = data.prepare(experiment.data, experiment.seed, run.path)
    training = metrics.summarise(run.path, experiment.training)
    with jax.set_mesh(mesh):
        evals.evaluate(model, experiment, source, run.path, training)
    print(f"the report is {run.path / 'report' / 'report.html'}")


def _sizes(given: list[str]) -> config.Mesh:
    try:
        split_batch, split_sequence, split_heads = map(int, given)
    except ValueError:
        text = ",".join(given)
        raise UsageError(f"--mesh={text} is not three whole numbers; give --mesh=DATA,CONTEXT,MODEL.") from None
    sizes = config.Mesh(split_batch, split_sequence, split_heads)
    if problems := list(sizes.problems()):
        raise UsageError(f"--mesh: {'; '.join(problems)}")
    return sizes


if __name__ == "__main__":
    commands.define_workdir()
    commands.define_processes()
    commands.run(main)
