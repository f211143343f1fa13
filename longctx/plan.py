"""Compiles the training step of an experiment for TPUs or GPUs, on a machine without any, and says what it takes there.

    pip install -e '.[plan]'        # for TPUs; for GPUs '.[plan-gpu]'
    python -m longctx.plan --config=experiments/hybrid_1b_1m.py --topology=v5p:4x4x8

The report is Markdown; `--json=FILE` writes its numbers to a file as well. A step that does not fit the devices'
memory is an answer like any other, with what to change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from longctx import commands, planning
from longctx.errors import UsageError

_TOPOLOGY = flags.DEFINE_string("topology", None, "v5p:4x4x8: a TPU, chips along axes; h100:4x8: a GPU, hosts x GPUs.")
_JSON = flags.DEFINE_string("json", None, "A file to write the numbers to.")


def main() -> None:
    experiment = commands.experiment()
    if not _TOPOLOGY.value:
        raise UsageError("--topology is missing; give for example --topology=v5p:4x4x8 or --topology=h100:4x8.")
    topology = planning.describe(_TOPOLOGY.value)
    report = planning.plan(experiment, topology, _name())
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report.json(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(report.text())


def _name() -> str:
    """The experiment as the command line names it."""
    flag = flags.FLAGS["config"]
    overrides = config_flags.get_override_values(flag)
    return " ".join([config_flags.get_config_filename(flag), *(f"--config.{k}={v}" for k, v in overrides.items())])


if __name__ == "__main__":
    commands.define_config()
    commands.run(main)
