"""The training loop: stages in turn, the next step dispatched before the last one's metrics are read."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from grain.experimental import set_next_index

from longctx import config, data
from longctx.errors import UsageError, refused
from longctx.models import LanguageModel, parameter_table
from longctx.parallel import mesh as meshes
from longctx.training import lock, origin, start
from longctx.training import workdir as workdirs
from longctx.training.checkpoints import Checkpoints
from longctx.training.metrics import Metrics, Row, summarise
from longctx.training.processes import Votes
from longctx.training.step import Program, TrainState


def make_mesh(experiment: config.Experiment, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The experiment's mesh over `devices`, or over all that are here.

    An axis of -1 takes the most devices that share the micro-batches (along `data`) or rows (along `context`) of every
    stage equally; what is measured afterwards fits any number.

    Raises:
      UsageError: it does not fit the devices, or the batches of a stage do not fit it.
    """
    training = experiment.training
    rows = [stage.batch // training.accumulate for stage in training.stages]
    lengths = [stage.length for stage in training.stages]
    mesh = meshes.make(experiment.mesh, devices, {"data": math.gcd(*rows), "context": math.gcd(*lengths)})
    for index, micro in enumerate(rows):
        if micro % mesh.shape["data"]:
            raise UsageError(
                f"training.stages[{index}] has {micro} rows in a micro-batch, which the {mesh.shape['data']} devices "
                "along mesh.data cannot share equally; change training.stages, training.accumulate or mesh.data, of "
                "which -1 takes as many devices as can."
            )
    return mesh


def unused(mesh: jax.sharding.Mesh) -> list[str]:
    """A sentence on the devices that a mesh leaves out, if it does."""
    if mesh.size == jax.device_count():
        return []
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return [
        f"mesh {sizes} uses {mesh.size} of {jax.device_count()} devices: along "
        "data they share the rows of a micro-batch equally, along context the tokens of a row; other batches, or more "
        "devices along another axis, use more."
    ]


def train(
    experiment: config.Experiment,
    workdir: Path,
    source: data.Source,
    heldout: Callable[..., Callable] | None = None,
    check: Callable[[LanguageModel, config.Experiment, data.Source], object] = lambda *_: None,
) -> Row:
    """Trains, from the newest checkpoint in `workdir` on if there is one; a finished run is left as it is.

    A signal to end (SIGTERM, or one Ctrl-C) lets the step in progress finish, saves, and returns.

    Args:
      experiment: what to train, and how.
      workdir: where everything is written; see `longctx.training.workdir`.
      source: from `longctx.data.prepare`.
      heldout: such as `evals.HeldOut`: called once with the model's graphdef, the experiment and the source, gives what
        every `evaluation.every` steps is called with the parameters, and its `scalars()` go into the step's row.
      check: called with the model, which has shapes for parameters, the experiment and the source, before anything is
        written; it raises a UsageError for what shall be refused, such as `evals.check`.

    Returns:
      `metrics.summarise`'s numbers, and `parameters`, `devices` and `finished`.

    Raises:
      UsageError: the experiment cannot run here; nothing has been written then.
      FloatingPointError: the loss, the gradient or the state is not finite; no checkpoint was saved after it.
    """
    workdir = Path(workdir)
    experiment = workdirs.settled(workdir, experiment)
    training = experiment.training
    mesh = make_mesh(experiment)
    with jax.set_mesh(mesh):
        program = Program.make(experiment, source.vocab_size, mesh)
        # Of all stages, so that a stage that the corpus cannot fill is refused now.
        iterators = [_batches(experiment, source, program, index) for index in range(len(training.stages))]
        workdirs.agree(workdir, experiment, source)
        checkpoints = Checkpoints(workdir, experiment.checkpoints.keep)
        if max(checkpoints.steps(), default=0) < training.steps:
            checkpoints.check_room(program.abstract)
        for index in _to_come(training, checkpoints.steps()):
            stage = training.stages[index]
            with refused(f"training.stages[{index}], {stage.batch} rows of {stage.length} tokens"):
                program.trace(stage)
        check(program.model(program.abstract.params), experiment, source)
        if experiment.init_from and not checkpoints.steps():
            other = workdirs.open_run(origin.Origin.parse(experiment.init_from).workdir)
            origin.check(experiment.init_from, other, program, source)
        with lock.held(workdir, "training"):
            step, summary = _train(experiment, workdir, source, program, checkpoints, iterators, heldout)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.abstract.params))
    return summary | {"finished": step == training.steps, "parameters": parameters, "devices": mesh.size}


def _train(experiment, workdir, source, program, checkpoints, iterators, heldout) -> tuple[int, Row]:
    """The part of `train` that writes: the steps done, and the summary."""
    training = experiment.training
    restored = checkpoints.restore(program.abstract)
    step, state = (0, _initial(experiment, program)) if restored is None else restored
    if int(state.step) != step:
        raise UsageError(
            f"{checkpoints.directory / str(step)} holds the state after {int(state.step)} steps, which is not its "
            "name; rename it, or remove it."
        )
    changes = workdirs.start(workdir, experiment, source)
    stage, done = _locate(training, step)
    set_next_index(iterators[stage], done)
    with Metrics(workdir, training, step, jax.process_index() == 0) as metrics, _stop_signals() as stop:
        for text in unused(program.mesh):
            metrics.say(text)
        if step:
            metrics.say("; ".join([f"going on from step {step}", *changes]))
        if jax.process_index() == 0 and step < training.steps:
            facts = start.facts(program, source, workdir)
            start.write(workdir, facts)
            table = parameter_table(experiment, source.vocab_size)
            metrics.say("\n".join([table, *start.lines(facts), *data.notes(source, experiment.data, training.stages)]))
        measure = heldout(program.graphdef, experiment, source) if heldout and experiment.evaluation.every else None
        run = _Run(experiment, program, checkpoints, metrics, measure)
        step = run.steps(step, state, iterators, Votes(stop, program.mesh))
    return step, summarise(workdir, training, step)


class _Pending(NamedTuple):
    """A step that was dispatched, and whose metrics were not read yet."""

    step: int
    stage: int
    batch: str  # which rows it was made of
    metrics: dict[str, jax.Array]


class _Run:
    """What the steps of one call of `train` share."""

    def __init__(self, experiment, program, checkpoints, metrics, measure):
        self._measure, self._measure_every = measure, experiment.evaluation.every
        self._training, self._every = experiment.training, experiment.checkpoints.every
        self._program = program
        self._checkpoints, self._metrics = checkpoints, metrics
        self._clock = 0.0

    def steps(self, step, state, iterators, votes) -> int:
        """Trains from `step` to the end, or until `votes` are for a stop; returns the steps done."""
        end, pending, compiled = self._training.steps, None, {}
        try:
            while step < end:
                index, _ = _locate(self._training, step)
                stage, iterator = self._training.stages[index], iterators[index]
                if index not in compiled:
                    pending = self._read(pending)
                    compiled = {index: self._compile(stage)}
                rows = next(iterator)
                batch = data.describe(iterator, stage, index)
                rows, rate = _spread(rows, stage, self._program), self._program.rate(step)
                state, metrics = compiled[index](state, rows, rate)
                step += 1
                self._read(pending)
                if self._measure and step % self._measure_every == 0:
                    metrics |= self._heldout(state, metrics)
                pending = _Pending(step, index, batch, metrics)
                stopping = bool(votes)
                if step % self._every == 0 or step == end or stopping:
                    pending, last = self._read(pending), pending  # a state is saved only once it is known to be finite
                    if not self._program.finite(state):
                        raise FloatingPointError(self._not_finite("the state after the update is not finite", last))
                    self._checkpoints.save(step, state)
                    self._clock = time.perf_counter()
                if stopping:
                    self._metrics.say(f"asked to stop: step {step} is saved, the same command goes on from there")
                    break
        finally:
            self._checkpoints.wait()
        return step

    def _compile(self, stage: config.Stage) -> jax.stages.Compiled:
        self._metrics.say(f"compiling the step for {stage.batch} rows of {stage.length} tokens ...")
        before = time.perf_counter()
        compiled = self._program.compile(stage)
        self._clock = time.perf_counter()
        held = compiled.memory_analysis()
        size = held.argument_size_in_bytes + held.temp_size_in_bytes + held.output_size_in_bytes
        size = (size - held.alias_size_in_bytes) / 2**20
        self._metrics.say(f"compiled in {self._clock - before:.1f} s; a step takes {size:,.0f} MiB on a device")
        return compiled

    def _heldout(self, state, metrics) -> dict[str, float]:
        """The held-out loss, whose time is not the step's."""
        jax.block_until_ready(metrics)
        before = time.perf_counter()
        found = self._measure(state.params).scalars()
        self._clock += time.perf_counter() - before
        return found

    def _read(self, pending: _Pending | None) -> None:
        """Waits for a step and records it."""
        if pending is None:
            return
        found = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        now = time.perf_counter()
        for name in ("loss", "gradient_norm", *(name for name in found if name.startswith("heldout"))):
            if not math.isfinite(found[name]):
                what = f"the {name.replace('_', ' ')} is {found[name]}"
                raise FloatingPointError(self._not_finite(what, pending))
        stage = self._training.stages[pending.stage]
        accuracy = found["hits"] / found["answers"] if found["answers"] else None
        row = {"step": pending.step, "stage": pending.stage, **found, "retrieval_accuracy": accuracy}
        # Monotonic on a sound machine; one that was moved or set back must not log less than nothing.
        row |= {"tokens": stage.batch * stage.length, "seconds": max(now - self._clock, 0.0)}
        self._metrics.record(row)
        self._clock = now

    def _not_finite(self, what: str, pending: _Pending) -> str:
        self._checkpoints.wait()
        saved = self._checkpoints.steps()
        workdir = self._checkpoints.directory.parent
        go_on = f", which goes on from there with --init_from={workdir}@{saved[-1]}" if saved else ""
        return (
            f"{what} at step {pending.step}, on {pending.batch}; training stops and {self._checkpoints.newest()}. "
            "Look at these rows, or lower training.learning_rate or training.clip_norm in another "
            f"--workdir{go_on}."
        )


def _locate(training: config.Training, step: int) -> tuple[int, int]:
    """The stage that comes after `step` steps, and how many of its own steps are done; past the end, (last, 0)."""
    for index, stage in enumerate(training.stages):
        if step < stage.steps:
            return index, step
        step -= stage.steps
    return len(training.stages) - 1, 0


def _initial(experiment: config.Experiment, program: Program) -> TrainState:
    """The state before the first step: parameters by the seed, or what another run saved."""
    return origin.load(experiment.init_from, program) if experiment.init_from else program.init()


def _to_come(training: config.Training, saved: list[int]) -> range:
    """The stages that are not over at the newest checkpoint; none in a finished run."""
    done = max(saved, default=0)
    return range(_locate(training, done)[0] if done < training.steps else len(training.stages), len(training.stages))


def _batches(experiment: config.Experiment, source: data.Source, program: Program, index: int):
    """The iterator of a stage, of this process's share of the rows."""
    stage = experiment.training.stages[index]
    sharding = program.batch_sharding((stage.batch, stage.length))
    slices = sharding.addressable_devices_indices_map((stage.batch, stage.length)).values()
    spans = {index[0].indices(stage.batch)[:2] for index in slices}
    first, rows = min(spans)[0], max(spans)[1] - min(spans)[0]
    return data.batches(source, experiment.data, stage, experiment.seed, index, first // rows, stage.batch // rows)


def _spread(rows: dict[str, np.ndarray], stage: config.Stage, program: Program) -> dict[str, jax.Array]:
    """This process's rows as its part of global arrays."""
    shape = (stage.batch, stage.length)
    sharding = program.batch_sharding(shape)
    return {name: jax.make_array_from_process_local_data(sharding, value, shape) for name, value in rows.items()}


class _Stop:
    """True once a signal has asked to end."""

    def __init__(self):
        self.asked = False

    def __bool__(self):
        return self.asked


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Catches the first SIGTERM or SIGINT; a second one ends the process as usual."""
    stop = _Stop()
    before = {}

    def ask(number, _frame):
        stop.asked = True
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
