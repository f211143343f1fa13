"""Trains the model of an experiment file, then evaluates it.

    python -m longctx.train --config=experiments/quickstart.py --workdir=runs/quickstart

The same command goes on where a run stopped; in a finished run it only evaluates. `--config.training.clip_norm=0.5`
overrides a field of the file. `--init_from=runs/other` starts from the parameters of another run, and
`--init_from=runs/other@500:all` from a step of it, its optimiser's state included; its tokenizer comes along; stages,
rates and documents are the new run's own. On several machines, each starts the command with `--coordinator=HOST:PORT
--num_processes=N --process_id=I`, or with `--coordinator=auto`; see docs/many_processes.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from absl import flags

from longctx import commands, config, data, evals
from longctx.models import checks
from longctx.training import lock, loop, origin
from longctx.training import workdir as workdirs

_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "WORKDIR[@STEP][:all]: another run's checkpoint to start from; with :all its optimiser's state too.",
)


def main() -> None:
    experiment, workdir = commands.experiment(), commands.workdir()
    if _INIT_FROM.value is not None:
        experiment = dataclasses.replace(experiment, init_from=_INIT_FROM.value)
    with commands.joined():
        _train(experiment, workdir)


def _train(experiment: config.Experiment, workdir: Path) -> None:
    experiment = workdirs.settled(workdir, experiment)
    mesh = loop.make_mesh(experiment)  # here too, so that what does not fit is refused before the corpus is read
    checks.room(experiment, mesh.devices.flatten().tolist())
    workdirs.check(workdir, experiment)
    lock.check(workdir, "training")
    started = (workdir / "config.json").exists()
    source = data.prepare(
        experiment.data, experiment.seed, workdir if started else origin.tokenizer(experiment.init_from)
    )
    summary = loop.train(experiment, workdir, source, evals.HeldOut, evals.check)
    if not summary["finished"]:
        return
    model, _ = workdirs.load_model(workdirs.open_run(workdir), mesh)
    with jax.set_mesh(mesh), lock.held(workdir, "evaluating"):
        evals.evaluate(model, experiment, source, workdir, training=summary)
    print(f"the report is {workdir / 'report' / 'report.html'}")


if __name__ == "__main__":
    commands.define_config()
    commands.define_workdir()
    commands.define_processes()
    commands.run(main)
