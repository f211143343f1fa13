"""What a run is, said when training starts: size, devices, corpus, epochs; WORKDIR/start.json keeps it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax

from longctx import data, provenance
from longctx.folder import files
from longctx.training.step import Program

FILE = "start.json"


def facts(program: Program, source: data.Source, workdir: Path) -> dict[str, Any]:
    """Everything, as JSON.

    Returns:
      `run`, as `provenance.run` says; `parameters`; `devices`, `device` and `mesh`; `state_bytes`, of parameters and
      optimiser on one device; `tokens` that will be trained on; of text `corpus`, its tokens and documents, and
      `epochs`.
    """
    stages = program.experiment.training.stages
    tokens = sum(stage.steps * stage.batch * stage.length for stage in stages)
    found = {
        "run": provenance.run(workdir),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.abstract.params)),
        "devices": program.mesh.size,
        "device": program.mesh.devices.flat[0].device_kind,
        "mesh": dict(program.mesh.shape),
        "state_bytes": sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(program.abstract)
        ),
        "tokens": tokens,
    }
    if isinstance(source, data.Task):
        return found
    sizes = {
        f"{part}_{unit}": count
        for part, store in (("training", source.train), ("heldout", source.heldout))
        for unit, count in (("tokens", store.size), ("documents", len(store)))
    }
    return found | {"corpus": sizes, "epochs": tokens / source.train.size}


def lines(found: dict[str, Any]) -> list[str]:
    """The facts as text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    text = [
        f"{found['parameters']:,} parameters, with the optimiser {found['state_bytes'] / 2**20:,.1f} MiB on a device",
        f"{found['devices']} x {found['device']}, mesh: {mesh}",
    ]
    if corpus := found.get("corpus"):
        text += [
            f"corpus: {corpus['training_tokens']:,} tokens in {corpus['training_documents']:,} documents, and held out "
            f"{corpus['heldout_tokens']:,} in {corpus['heldout_documents']:,}",
            f"training: {found['tokens']:,} tokens, {found['epochs']:,.3g} epochs",
        ]
    else:
        text.append(f"training: {found['tokens']:,} tokens, made anew each")
    return text


def write(workdir: Path, found: dict[str, Any]) -> None:
    """Replaces WORKDIR/start.json in one move."""
    files.replace(workdir / FILE, json.dumps(found, indent=2, allow_nan=False) + "\n")
