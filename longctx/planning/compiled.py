"""The training step of an experiment, compiled for devices that are not here, and what it takes there."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from longctx import config
from longctx.data import Task, Tokenizer
from longctx.errors import refused
from longctx.ops import kernels
from longctx.parallel import mesh as meshes
from longctx.planning import programs, work
from longctx.planning.chips import Passes
from longctx.planning.report import Report
from longctx.planning.topology import Topology
from longctx.training import loop
from longctx.training.step import Program

_SIZE = r"([\d.]+)([BKMGT]?)"
_FAILURES = (  # what libtpu says of a program that is too large: of its temporaries, with and without addresses
    re.compile(rf"HLO temporaries \({_SIZE}\)"),
    re.compile(rf"program\s+{_SIZE}"),
    re.compile(rf"Used {_SIZE} of"),
)


class Compiled(NamedTuple):
    """What the compiler found.

    Attributes:
      bytes: on each device, by use; "host" is the host's memory.
      moved: bytes that a device reads and writes; None if the program does not fit.
      collectives: bytes that a device sends, by kind; None if the program does not fit.
    """

    bytes: dict[str, int]
    moved: int | None
    collectives: dict[str, int] | None


def plan(experiment: config.Experiment, topology: Topology, name: str) -> Report:
    """Compiles the step of the experiment's longest rows for a topology.

    Args:
      experiment: what to train; its mesh is laid over the topology's devices.
      topology: from `describe`.
      name: of the experiment, for the report.

    Raises:
      UsageError: the mesh does not fit the topology, a stage does not fit the mesh, or a layer cannot compute it there.
    """
    stage = max(experiment.training.stages, key=lambda stage: stage.length)
    mesh = loop.make_mesh(experiment, topology.devices)
    program = Program.make(experiment, vocabulary(experiment.data), mesh)
    with jax.set_mesh(mesh), refused(f"{stage.batch} rows of {stage.length} tokens"):
        program.trace(stage)
    model, done, share = operations(program, stage, topology.device.passes)
    begin = time.perf_counter()
    compiled = compile_step(program, stage, share)
    seconds = time.perf_counter() - begin
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
        moved=compiled.moved,
        collectives=compiled.collectives,
        flops_per_step=model.operations,
        flops_done=done.operations,
        passes=done.passes,
        compile_seconds=seconds,
    )


def vocabulary(data: config.Data | Task) -> int:
    """Entries of the vocabulary; of one that is yet to be learnt, as many as it may have."""
    if isinstance(data, Task) or data.tokenizer == "bpe":
        return data.vocab_size
    return (Tokenizer.bytes() if data.tokenizer == "bytes" else Tokenizer.load(data.tokenizer)).vocab_size


def compile_step(program: Program, stage: config.Stage, share: float) -> Compiled:
    """Compiles one step. Too large a program is a result as well: for TPUs none at all, for GPUs like any other.

    `share` is that of `programs.moved`.
    """
    sizes = {
        "parameters": on_each_device(program.abstract.params),
        "optimizer": on_each_device(program.abstract.optimizer),
        "batch": on_each_device(program.batch(stage)),
    }
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.compile(stage)
    except jax.errors.JaxRuntimeError as error:
        return Compiled(sizes | too_large(error, sum(sizes.values())), None, None)
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes["temporaries"] = memory.temp_size_in_bytes
    sizes["program"] = memory.generated_code_size_in_bytes
    sizes["host"] = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    taken = memory.argument_size_in_bytes + results + sizes["temporaries"] + sizes["program"]
    text = compiled.as_text()
    return Compiled(
        sizes | {"total": taken}, programs.moved(text, share), programs.collectives(text, program.mesh.size)
    )


def too_large(error: Exception, arguments: int) -> dict[str, int]:
    """Temporaries and total, as the error of a compilation that ran out of memory gives them.

    Raises:
      The error itself, if it is another.
    """
    text = str(error)
    found = next((found for pattern in _FAILURES if (found := pattern.search(text))), None)
    if "RESOURCE_EXHAUSTED" not in text or "hbm" not in text.lower() or found is None:
        raise error
    temporaries = int(float(found[1]) * 2 ** (10 * " KMGT".index(found[2].replace("B", "") or " ")))
    return {"temporaries": temporaries, "total": arguments + temporaries}


def on_each_device(tree: Any) -> int:
    """Bytes that a device holds of arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def operations(program: Program, stage: config.Stage, passes: Passes) -> tuple[work.Work, work.Work, float]:
    """Of the model, as it is defined, and of the program, with what it computes again and for other devices.

    Then the share that loops that end at run time make of the rounds that they may make on one device's part of a row.

    Loops that end at run time are counted in the program for whole rows, which says how many steps they take when
    each row is one document.
    """
    model = dataclasses.replace(program.experiment.model, remat="none")
    plain = Program.make(dataclasses.replace(program.experiment, model=model), program.vocab_size, program.mesh)
    device = program.mesh.abstract_mesh.abstract_device

    def two(axis: str) -> AbstractMesh:
        """Two devices along one axis: rows are whole."""
        sizes = [2 if name == axis else 1 for name in meshes.AXES]
        return AbstractMesh(tuple(sizes), meshes.AXES, (AxisType.Auto,) * 3, abstract_device=device)

    # Devices that split heads may do the same twice, for what the heads share, and those with rows of their own never.
    with jax.sharding.use_abstract_mesh(two("data")):
        fixed, _ = traced(plain, dataclasses.replace(stage, batch=2 * stage.batch), passes)
    with jax.sharding.use_abstract_mesh(two("model")):
        (_, looped), (_, repeated) = (traced(each, stage, passes) for each in (plain, program))
    with jax.set_mesh(program.mesh):
        split, allowed = traced(program, stage, passes)
    share = repeated.operations / allowed.operations if allowed.operations else 1.0
    return fixed.times(1 / 2) + looped, split + repeated, share


def traced(program: Program, stage: config.Stage, passes: Passes) -> tuple[work.Work, work.Work]:
    """What `work.count` finds in a step, under the ambient mesh, where no kernel hides it."""
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.arguments(stage))
    with kernels.none():
        return work.count(jax.jit(program.step).trace(*given).jaxpr.jaxpr, passes)
