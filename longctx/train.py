"""Trains the model of an experiment file, then evaluates it.

    python -m longctx.train --config=experiments/quickstart.py --workdir=runs/quickstart

The same command goes on where a run stopped; in a finished run it only evaluates. `--config.training.clip_norm=0.5`
overrides a field of the file.
"""

from __future__ import annotations

import jax
from absl import flags

from longctx import commands, data, evals
from longctx.training import loop
from longctx.training import workdir as workdirs

_MULTIPROCESS = flags.DEFINE_bool("multiprocess", False, "Join the other processes of the cluster first.")


def main() -> int | None:
    experiment, workdir = commands.experiment(), commands.workdir()
    if _MULTIPROCESS.value:
        jax.distributed.initialize()
    mesh = loop.make_mesh(experiment)  # here too, so that what does not fit is refused before the corpus is read
    workdirs.check(workdir, experiment)
    started = (workdir / "config.json").exists()
    source = data.prepare(experiment.data, experiment.seed, workdir if started else None)
    summary = loop.train(experiment, workdir, source)
    if not summary["finished"]:
        return
    model, _ = workdirs.load_model(workdirs.open_run(workdir), mesh)
    with jax.set_mesh(mesh):
        evals.evaluate(model, experiment, source, workdir, training=summary)
    print(f"the report is {workdir / 'report' / 'report.html'}")


if __name__ == "__main__":
    commands.define_config()
    commands.define_workdir()
    commands.run(main)
