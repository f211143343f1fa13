"""Evaluates a trained model on held-out text, or on new rows of its task, and writes WORKDIR/report anew.

    python -m longctx.evaluate --workdir=runs/quickstart

What is measured is the `evaluation` part of the experiment; training does the same at its end. Overrides such as
`--config.evaluation.samples=64` change it for this report, and `--config.data.path=FOLDER` names other text, all
documents of which are measured. Both are said in the report; earlier reports are kept beside it.
"""

from __future__ import annotations

import dataclasses
import sys

import jax

from longctx import commands, config, data, evals
from longctx.errors import UsageError
from longctx.folder import path as paths
from longctx.parallel import mesh as meshes
from longctx.training import lock, loop, metrics
from longctx.training import workdir as workdirs


def main() -> None:
    with commands.joined():
        run = workdirs.open_run(commands.workdir())
        paths.writable(run.path)
        with lock.held(run.path, "evaluating"):
            _evaluate(run)


def _evaluate(run: workdirs.Run) -> None:
    experiment, notes = _overridden(run.experiment)
    given = commands.mesh()
    mesh = loop.make_mesh(experiment) if given is None else meshes.make(given)
    model, step = workdirs.load_model(run, mesh)
    if experiment.data == run.experiment.data:
        source = data.prepare(experiment.data, experiment.seed, run.path)
        for line in workdirs.compare_source(run.path, source, trained=False):
            print(line, file=sys.stderr)
    else:
        source = data.unseen(experiment.data.path, run.tokenizer)
        notes.append("All documents of the other text are measured; whether any was trained on is not known.")
    training = metrics.summarise(run.path, experiment.training, step)
    with jax.set_mesh(mesh):
        evals.check(model, experiment, source)
        evals.evaluate(model, experiment, source, run.path, training, notes=notes)
    print(f"the report is {run.path / 'report' / 'report.html'}")


def _overridden(experiment: config.Experiment) -> tuple[config.Experiment, list[str]]:
    """The experiment with the command line's overrides, and each of these in a sentence."""
    given = commands.experiment()
    allowed = dataclasses.replace(experiment, evaluation=given.evaluation)
    if isinstance(experiment.data, config.Data):
        allowed = dataclasses.replace(
            allowed, data=dataclasses.replace(experiment.data, path=getattr(given.data, "path", ""))
        )
    if given != allowed:
        raise UsageError(
            "what a trained model is cannot be overridden; of its config give --config.evaluation.NAME=VALUE and "
            "--config.data.path=FOLDER alone."
        )
    changes = []
    for part in ("evaluation", "data"):
        before, after = (dataclasses.asdict(getattr(each, part)) for each in (experiment, given))
        changes += [
            f"{part}.{name} was {before[name]!r}, and is {after[name]!r} in this report."
            for name in before
            if before[name] != after[name]
        ]
    return given, changes


if __name__ == "__main__":
    commands.define_run()
    commands.define_mesh("as in training")
    commands.define_processes()
    commands.run(main)
