"""What a layer can do: every mixer on every synthetic task, the best of several learning rates, several seeds.

    python benchmarks/capability.py --processes=2
    python benchmarks/capability.py --mixers=gated_delta,gla --tasks=mqar --rates=1e-3,2e-3,4e-3 --seeds=3
    python benchmarks/capability.py --mixers=gated_delta:negative_eigenvalues=True --tasks=state_tracking

A cell is one run of an experiment of experiments/, in the size that --size names ("small" is made for CPUs). Each mixer
has every rate with the first seed, and the rate that is best on validation rows, which neither training nor the table
uses, with the other seeds. Recall is learnt in a narrow window of rates, so space them by no more than 2 (Arora et al.
2023 on the sweep that missed it). All rates and seeds of a mixer share one compiled program, which takes about as long
to compile as a cell takes to run. Finished cells are lines of benchmarks/capability.jsonl and are not run again unless
their experiment changes; the table, benchmarks/capability.md, is written after each mixer.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import runpy
import shlex
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from timing import processor

from longctx import config, data
from longctx.data import TASKS
from longctx.evals import answers
from longctx.layers import MIXERS, MLPS
from longctx.parallel import mesh as meshes
from longctx.training import optimizer
from longctx.training.step import Program

HERE = pathlib.Path(__file__).parent
VALIDATION = 1_000_003  # added to the seed
Cell = dict[str, Any]


def experiment_of(task: str, mixer: str, size: str, rate: float, seed: int) -> config.Experiment:
    """The experiment file's on one device, with this rate and seed and the options of `mixer`, KIND:OPTION=VALUE...."""
    kind, *options = mixer.split(":")
    tree = runpy.run_path(str(HERE.parent / "experiments" / f"{task}.py"))["get_config"](f"{kind},{size}")
    for name, value in (option.split("=", 1) for option in options):
        tree.model.blocks.block.mixer[name] = ast.literal_eval(value)
    tree.training.learning_rate, tree.seed = rate, seed
    tree.mesh = {"data": 1, "context": 1, "model": 1}
    return config.parse(tree, MIXERS, MLPS, TASKS)


@functools.cache
def digest(task: str, mixer: str, size: str, rate: float, seed: int) -> str:
    """Of everything that the result depends on, the code apart."""
    experiment = experiment_of(task, mixer, size, rate, seed)
    return hashlib.sha256(json.dumps(config.to_dict(experiment), sort_keys=True).encode()).hexdigest()[:16]


class Runner:
    """An experiment with any learning rate and seed, all of which share its programs.

    Args:
      experiment: of a synthetic task, on one device.
    """

    def __init__(self, experiment: config.Experiment):
        self._experiment, self._mesh = experiment, meshes.make(experiment.mesh)
        self._program = Program.make(experiment, experiment.data.vocab_size, self._mesh)
        self._compiled: dict[int, jax.stages.Compiled] = {}
        self._reader: answers.Reader | None = None

    def train(self, rate: float, seed: int) -> tuple[Any, np.ndarray, float]:
        """The trained parameters, `[steps, 2]` losses and gradient norms, and the seconds, compilation not counted."""
        task, metrics, seconds = self._experiment.data, [], 0.0
        training = dataclasses.replace(self._experiment.training, learning_rate=rate)
        rates = (np.float32(optimizer.learning_rate(training, step)) for step in itertools.count())
        with jax.set_mesh(self._mesh):
            state = self._program.init(seed)
            for index, stage in enumerate(self._experiment.training.stages):
                rows = data.batches(task, task, stage, seed, index)
                if index not in self._compiled:
                    self._compiled[index] = self._program.compile(stage)
                start = time.perf_counter()
                for _ in range(stage.steps):
                    state, found = self._compiled[index](state, next(rows), next(rates))
                    metrics.append((found["loss"], found["gradient_norm"]))
                jax.block_until_ready(state)
                seconds += time.perf_counter() - start
        return state.params, np.array(jax.device_get(metrics)), seconds

    def run(self, rate: float, seed: int) -> Cell:
        """Trains and measures; a run whose loss is not finite has no accuracy."""
        start = time.perf_counter()
        params, metrics, seconds = self.train(rate, seed)
        finite = np.isfinite(metrics).all(axis=1)
        if not finite.all():
            step = int(np.argmin(finite))
            return {"diverged": f"loss {metrics[step, 0]}, gradient norm {metrics[step, 1]} at step {step + 1}"}
        task, stage, options = self._experiment.data, self._experiment.training.stages[-1], self._experiment.evaluation
        with jax.set_mesh(self._mesh):
            model = self._program.model(params)
            if self._reader is None:
                self._reader = answers.Reader(model, stage.batch * stage.length)
            reader = self._reader.of(params)
            known = max((length for length in task.lengths if length <= stage.length), default=min(task.lengths))
            validation = reader.measure(task, known, options.samples, seed + VALIDATION)
            rows = {n: answers.samples_of(n, options.samples, options.tokens) for n in sorted(task.lengths)}
            measured = {n: reader.measure(task, n, count, seed) for n, count in rows.items()}
        state = jax.eval_shape(lambda: model.init_state(1, stage.length))
        return {
            "validation": {"accuracy": float(validation.correct.mean()), "loss": validation.loss},
            "accuracy": answers.summarise(task, measured)["accuracy"],
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
            "bounded": model.bounded,
            "training_seconds": seconds,
            "seconds": time.perf_counter() - start,
        }


def read(file: pathlib.Path) -> dict[str, Cell]:
    """Finished cells, by the digest of their experiment, of a file of JSON lines."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {cell["experiment"]: cell for cell in map(json.loads, lines)}


def best(cells: list[Cell]) -> Cell:
    """The most accurate on validation rows; of equals, the one of the least loss there."""
    return max(cells, key=lambda cell: (cell["validation"]["accuracy"], -cell["validation"]["loss"]))


def sweep(cell: Callable[[float, int], Cell | None], rates: list[float], seeds: int) -> list[Cell]:
    """The cells of the best rate, one a seed; none while a rate has not been run, or if all diverge."""
    first = [cell(rate, 0) for rate in rates]
    known = [found for found in first if found is not None and "diverged" not in found]
    if None in first or not known:
        return []
    rate = best(known)["rate"]
    others = [cell(rate, seed) for seed in range(seeds)]
    return [found for found in others if found is not None and "diverged" not in found]


def finished(cells: dict[str, Cell], task: str, mixer: str, arguments) -> list[Cell]:
    """`sweep` of what has been run."""
    return sweep(
        lambda rate, seed: cells.get(digest(task, mixer, arguments.size, rate, seed)), arguments.rates, arguments.seeds
    )


def measure(cells: dict[str, Cell], task: str, mixer: str, arguments) -> list[Cell]:
    """Runs what a sweep lacks; the new cells, each written to the file of cells when it is finished."""
    cells, new = dict(cells), []
    device = f"{os.cpu_count()} cores of {processor()}, {jax.devices()[0].platform}, jax {jax.__version__}"
    runner = functools.cache(lambda: Runner(experiment_of(task, mixer, arguments.size, 1.0, 0)))

    def cell(rate, seed):
        key = digest(task, mixer, arguments.size, rate, seed)
        if key not in cells:
            names = {
                "experiment": key,
                "task": task,
                "mixer": mixer,
                "size": arguments.size,
                "rate": rate,
                "seed": seed,
            }
            cells[key] = names | runner().run(rate, seed) | {"device": device}
            new.append(cells[key])
            with arguments.cells.open("a", encoding="utf-8") as file:  # a line in one piece, whoever else appends
                file.write(json.dumps(cells[key]) + "\n")
        return cells[key]

    sweep(cell, arguments.rates, arguments.seeds)
    return new


def report(cells: dict[str, Cell], arguments) -> str:
    """The table of all that is finished."""
    rates = ", ".join(f"{rate:g}" for rate in arguments.rates)
    size = f"in the size '{arguments.size}'" if arguments.size else "in full"
    lines = [
        "# What the layers can do",
        "",
        f"`{command(arguments)}`",
        "",
        f"Accuracy in new rows by their length, mean ± standard deviation over seeds, of the experiments {size}: two "
        "layers of width 64 with small MLPs, each mixer with its default options but for what "
        f"experiments/ says. Rate: the best of {rates} on validation rows with the first seed; * marks one at the "
        "edge of the sweep, where a wider one may find a better. Bold: the trained length. State: of all layers, for "
        "one row of the trained length, in bytes; + where it grows with the row. s: seconds of training. These are "
        "small trainings on a CPU: a low number says that the layer did not learn the task in so many steps, not that "
        "it cannot.",
    ]
    devices: set[str] = set()
    for task in arguments.tasks:
        rows = {mixer: finished(cells, task, mixer, arguments) for mixer in arguments.mixers}
        rows = {mixer: found for mixer, found in rows.items() if found}
        if not rows:
            continue
        example = experiment_of(task, next(iter(rows)), arguments.size, arguments.rates[0], 0)
        lengths = sorted({int(n) for found in rows.values() for n in found[0]["accuracy"]})
        trained = example.training.stages[-1].length
        stages = ", then ".join(f"{s.steps} steps of {s.batch} rows of {s.length}" for s in example.training.stages)
        options = {key: value for key, value in config.to_dict(example)["data"].items() if key != "kind"}
        lines += [
            "",
            f"## {task}",
            "",
            f"{stages} tokens; guessing {example.data.guessing(min(lengths)):.1%} at {min(lengths)} tokens. "
            f"Options: `{json.dumps(options)}`",
            "",
            "| mixer | "
            + " | ".join(f"**{n:,}**" if n == trained else f"{n:,}" for n in lengths)
            + " | rate | seeds | parameters | state | s |",
            "|---|" + "---:|" * (len(lengths) + 5),
        ]
        for mixer, found in rows.items():
            rate = found[0]["rate"]
            edge = "*" if len(arguments.rates) > 1 and rate in (arguments.rates[0], arguments.rates[-1]) else ""
            accuracies = [spread([cell["accuracy"].get(str(n)) for cell in found]) for n in lengths]
            cost = found[0]
            lines.append(
                f"| `{mixer}` | {' | '.join(accuracies)} | {rate:g}{edge} | {len(found)} | {cost['parameters']:,} "
                f"| {cost['state_bytes']:,}{'' if cost['bounded'] else '+'} | {cost['training_seconds']:.0f} |"
            )
            devices |= {cell["device"] for cell in found}
    lines += ["", f"Devices: {'; '.join(sorted(devices)) or 'none yet'}. Python {platform.python_version()}."]
    return "\n".join(lines) + "\n"


def command(arguments) -> str:
    """What makes the table."""
    lists = {"tasks": (arguments.tasks, TASKS), "mixers": (arguments.mixers, MIXERS)}
    given = [f"--{name}={','.join(chosen)}" for name, (chosen, known) in lists.items() if chosen != list(known)]
    given += [f"--rates={','.join(f'{rate:g}' for rate in arguments.rates)}", f"--seeds={arguments.seeds}"]
    given += [f"--size={arguments.size}", f"--cells={arguments.cells}"]
    return shlex.join(["python", "benchmarks/capability.py", *given])


def spread(values: list[float | None]) -> str:
    """Mean ± standard deviation in per cent; the mean alone of one."""
    found = [value for value in values if value is not None]
    if not found:
        return ""
    deviation = f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{100 * statistics.mean(found):.1f}{deviation}"


def tell(task: str, mixer: str, cells: list[Cell]) -> None:
    """Prints what was run of a mixer."""
    for cell in cells:
        told = "diverged" if "diverged" in cell else f"validation {cell['validation']['accuracy']:.1%}"
        run = f"rate {cell['rate']:g}, seed {cell['seed']}"
        print(f"{task}, {mixer}, {run}: {told}, {cell.get('seconds', 0):.0f} s", flush=True)


def main() -> None:
    def names(known):
        def parse(text):
            given = text.split(",")
            if unknown := [name for name in given if name.split(":")[0] not in known]:
                raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(known)}")
            return given

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mixers",
        type=names(MIXERS),
        default=list(MIXERS),
        help="of the registry, each also with options as KIND:OPTION=VALUE:...; all by default",
    )
    parser.add_argument("--tasks", type=names(TASKS), default=list(TASKS), help="of the registry; all by default")
    parser.add_argument("--rates", type=lambda text: sorted(map(float, text.split(","))), default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", default="small", choices=("", "small", "smoke"), help="of the experiments")
    parser.add_argument("--cells", type=pathlib.Path, default=HERE / "capability.jsonl", help="the file of cells")
    parser.add_argument("--processes", type=int, default=1, help="mixers measured at once")
    arguments = parser.parse_args()
    cells = read(arguments.cells)
    pairs = [(task, mixer) for task in arguments.tasks for mixer in arguments.mixers]
    # A process for each mixer: its programs go when it ends.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.processes, context, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(measure, cells, task, mixer, arguments): (task, mixer) for task, mixer in pairs}
        for future in concurrent.futures.as_completed(waiting):
            new = future.result()
            cells |= {cell["experiment"]: cell for cell in new}
            arguments.cells.with_suffix(".md").write_text(report(cells, arguments), encoding="utf-8")
            tell(*waiting[future], new)
    print(report(cells, arguments))


if __name__ == "__main__":
    main()
