"""Evaluates a trained model on held-out text, or on new rows of its task, and writes WORKDIR/report anew.

    python -m longctx.evaluate --workdir=runs/quickstart

What is measured is the `evaluation` part of the experiment; training does the same at its end.
"""

from __future__ import annotations

import sys

import jax

from longctx import commands, data, evals
from longctx.folder import lock
from longctx.folder import path as paths
from longctx.parallel import mesh as meshes
from longctx.training import loop, metrics
from longctx.training import workdir as workdirs


def main() -> None:
    with commands.joined():
        run = workdirs.open_run(commands.workdir())
        paths.writable(run.path)
        with lock.held(run.path, "evaluating"):
            _evaluate(run)


def _evaluate(run: workdirs.Run) -> None:
    experiment = run.experiment
    given = commands.mesh()
    mesh = loop.make_mesh(experiment) if given is None else meshes.make(given)
    model, step = workdirs.load_model(run, mesh)
    source = data.prepare(experiment.data, experiment.seed, run.path)
    for line in workdirs.compare_source(run.path, source, trained=False):
        print(line, file=sys.stderr)
    training = metrics.summarise(run.path, experiment.training, step)
    with jax.set_mesh(mesh):
        evals.check(model, experiment, source)
        evals.evaluate(model, experiment, source, run.path, training)
    print(f"the report is {run.path / 'report' / 'report.html'}")


if __name__ == "__main__":
    commands.define_workdir()
    commands.define_mesh("as in training")
    commands.define_processes()
    commands.run(main)
