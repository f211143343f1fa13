"""The training step of an experiment, compiled for devices that are not here, and what it takes there."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from longctx import config
from longctx.data import Task, Tokenizer
from longctx.errors import UsageError
from longctx.evals import programs
from longctx.parallel import mesh as meshes
from longctx.planning import work
from longctx.planning.chips import Passes
from longctx.planning.report import Report
from longctx.planning.topology import Topology
from longctx.training.step import Program

_SIZE = r"([\d.]+)([BKMGT]?)"
_FAILURES = (  # what libtpu says of a program that is too large: of its temporaries, before and after they have places
    re.compile(rf"HLO temporaries \({_SIZE}\)"),
    re.compile(rf"program\s+{_SIZE}"),
    re.compile(rf"Used {_SIZE} of"),
)


class Compiled(NamedTuple):
    """What the compiler found.

    Attributes:
      bytes: on each device, by use; "host" is the host's memory.
      collectives: bytes that a device sends, by kind; None if the program does not fit.
    """

    bytes: dict[str, int]
    collectives: dict[str, int] | None


def plan(experiment: config.Experiment, topology: Topology, name: str) -> Report:
    """Compiles the step of the experiment's longest rows for a topology.

    Args:
      experiment: what to train; its mesh is laid over the topology's devices.
      topology: from `describe`.
      name: of the experiment, for the report.

    Raises:
      UsageError: the mesh does not fit the topology, or the stage does not fit the mesh.
    """
    stage = max(experiment.training.stages, key=lambda stage: stage.length)
    mesh = make_mesh(experiment, stage, topology)
    program = Program.make(experiment, vocabulary(experiment.data), mesh)
    begin = time.perf_counter()
    compiled = compile_step(program, stage)
    seconds = time.perf_counter() - begin
    model, done = operations(program, stage, topology.device.passes)
    return Report(
        config=name,
        topology=topology.name,
        devices=mesh.size,
        device=topology.device,
        hosts=topology.hosts,
        mesh=dict(mesh.shape),
        experiment=experiment,
        stage=stage,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.abstract.params)),
        bytes_per_device=compiled.bytes,
        collectives=compiled.collectives,
        flops_per_step=model.operations,
        flops_done=done.operations,
        passes=done.passes,
        compile_seconds=seconds,
    )


def make_mesh(experiment: config.Experiment, stage: config.Stage, topology: Topology) -> jax.sharding.Mesh:
    """The experiment's mesh over the pod.

    Raises:
      UsageError: it does not fit the pod, or the stage does not fit it.
    """
    try:
        mesh = meshes.make(experiment.mesh, topology.devices)
    except NotImplementedError as error:  # the torus has no such rings
        raise UsageError(
            f"{experiment.mesh} cannot be laid over the torus of {topology.name}; give axes whose sizes are products "
            "of its sides."
        ) from error
    rows = stage.batch // experiment.training.accumulate
    if rows % mesh.shape["data"] or stage.length % mesh.shape["context"]:
        raise UsageError(
            f"micro-batches of {rows} rows of {stage.length} tokens cannot be shared equally over mesh.data="
            f"{mesh.shape['data']} and mesh.context={mesh.shape['context']} devices of {topology.name}; change "
            "training.stages, training.accumulate or mesh."
        )
    return mesh


def vocabulary(data: config.Data | Task) -> int:
    """Entries of the vocabulary; of one that is yet to be learnt, as many as it may have."""
    if isinstance(data, Task) or data.tokenizer == "bpe":
        return data.vocab_size
    return (Tokenizer.bytes() if data.tokenizer == "bytes" else Tokenizer.load(data.tokenizer)).vocab_size


def compile_step(program: Program, stage: config.Stage) -> Compiled:
    """Compiles one step. Too large a program is a result as well: for TPUs none at all, for GPUs like any other."""
    sizes = {
        "parameters": on_each_device(program.abstract.params),
        "optimizer": on_each_device(program.abstract.optimizer),
        "batch": on_each_device(batch(program, stage)),
    }
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.compile(stage)
    except jax.errors.JaxRuntimeError as error:
        return Compiled(sizes | too_large(error, sum(sizes.values())), None)
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes["temporaries"] = memory.temp_size_in_bytes
    sizes["program"] = memory.generated_code_size_in_bytes
    sizes["host"] = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    taken = memory.argument_size_in_bytes + results + sizes["temporaries"] + sizes["program"]
    return Compiled(sizes | {"total": taken}, programs.collectives(compiled.as_text(), program.mesh.size))


def too_large(error: Exception, arguments: int) -> dict[str, int]:
    """Temporaries and total, as the error of a compilation that ran out of memory tells them.

    Raises:
      The error itself, if it is another.
    """
    text = str(error)
    found = next((found for pattern in _FAILURES if (found := pattern.search(text))), None)
    if "RESOURCE_EXHAUSTED" not in text or "hbm" not in text.lower() or found is None:
        raise error
    temporaries = int(float(found[1]) * 2 ** (10 * " KMGT".index(found[2].replace("B", "") or " ")))
    return {"temporaries": temporaries, "total": arguments + temporaries}


def batch(program: Program, stage: config.Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, as `Program.compile` takes it."""
    shape = (stage.batch, stage.length)
    dtypes = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
    dtypes |= {"answers": np.bool_, "segment_ids": np.int32, "positions": np.int32}
    sharding = program.batch_sharding(shape)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def on_each_device(tree: Any) -> int:
    """Bytes that a device holds of arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def operations(program: Program, stage: config.Stage, passes: Passes) -> tuple[work.Work, work.Work]:
    """Of the model, as it is defined, and of the program, with what it computes again and for other devices.

    Loops that end at run time are counted in the program for whole rows, which tells how many steps they take when
    each row is one document.
    """
    model = dataclasses.replace(program.experiment.model, remat="none")
    plain = Program.make(dataclasses.replace(program.experiment, model=model), program.vocab_size, program.mesh)
    # As on two devices that split heads only: rows are whole, and no kernel hides what it does.
    device = program.mesh.abstract_mesh.abstract_device
    whole = AbstractMesh((1, 1, 2), meshes.AXES, (AxisType.Auto,) * 3, abstract_device=device)
    with jax.sharding.use_abstract_mesh(whole):
        (fixed, looped), (_, repeated) = (traced(each, stage, passes) for each in (plain, program))
    with jax.set_mesh(program.mesh):
        split, _ = traced(program, stage, passes)
    return fixed + looped, split + repeated


def traced(program: Program, stage: config.Stage, passes: Passes) -> tuple[work.Work, work.Work]:
    """What `work.count` finds in a step, under the ambient mesh."""
    state, rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (program.abstract, batch(program, stage))
    )
    return work.count(jax.jit(program.step).trace(state, rows).jaxpr.jaxpr, passes)
