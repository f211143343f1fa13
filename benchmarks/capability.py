"""What a layer can do: every mixer on every synthetic task, the best of several learning rates, several seeds.

    python benchmarks/capability.py
    python benchmarks/capability.py --mixers=gated_delta,gla --tasks=mqar --rates=1e-3,2e-3,4e-3 --seeds=3
    python benchmarks/capability.py --mixers=gated_delta:negative_eigenvalues=True --tasks=state_tracking

A cell is one run of an experiment of experiments/, in the size that --size names ("small" is made for CPUs). Each mixer
has every rate with the first seed, and the rate that is best on validation rows, which neither training nor the table
uses, with the other seeds. Recall is learnt in a narrow window of rates, so space them by no more than 2 (Arora et al.
2023 on the sweep that missed it). Finished cells are lines of benchmarks/capability.jsonl and are not run again unless
their experiment changes; the table, benchmarks/capability.md, is written after each.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import os
import pathlib
import platform
import runpy
import shlex
import statistics
import tempfile
import time
from typing import Any

import jax
from timing import processor

from longctx import config
from longctx.data import TASKS
from longctx.evals import answers
from longctx.layers import MIXERS, MLPS
from longctx.models import parameter_count
from longctx.parallel import mesh as meshes
from longctx.training import loop
from longctx.training import workdir as workdirs

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
    return hashlib.sha256(json.dumps(workdirs.to_dict(experiment), sort_keys=True).encode()).hexdigest()[:16]


def run(experiment: config.Experiment) -> Cell:
    """Trains and measures; a run whose loss is not finite has no accuracy.

    Raises:
      SystemExit: a signal stopped the training.
    """
    task, stage = experiment.data, experiment.training.stages[-1]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        try:
            trained = loop.train(experiment, workdir, task)
        except FloatingPointError as error:
            return {"diverged": str(error).split(";")[0]}
        if not trained["finished"]:
            raise SystemExit("stopped before the end of a training; the same command goes on from the last cell")
        model, _ = workdirs.load_model(workdirs.open_run(workdir))
    options = experiment.evaluation
    with jax.set_mesh(meshes.make(experiment.mesh)):
        reader = answers.Reader(model, stage.batch * stage.length)
        known = max((length for length in task.lengths if length <= stage.length), default=min(task.lengths))
        validation = reader.measure(task, known, options.samples, experiment.seed + VALIDATION)
        rows = {n: answers.samples_of(n, options.samples, options.tokens) for n in sorted(task.lengths)}
        measured = {n: reader.measure(task, n, count, experiment.seed) for n, count in rows.items()}
    state = jax.eval_shape(lambda: model.init_state(1, stage.length))
    return {
        "validation": {"accuracy": float(validation.correct.mean()), "loss": validation.loss},
        "accuracy": answers.summarise(task, measured)["accuracy"],
        "parameters": parameter_count(model),
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "bounded": model.bounded,
        "training_seconds": trained["seconds"],
        "seconds": time.perf_counter() - start,
    }


class Cells:
    """Finished cells, by the digest of their experiment, kept in a file of JSON lines."""

    def __init__(self, file: pathlib.Path):
        self._file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._found = {cell["experiment"]: cell for cell in map(json.loads, lines)}

    def __call__(self, task: str, mixer: str, size: str, rate: float, seed: int, missing: bool = True) -> Cell | None:
        """The cell, run now if need be; with `missing` false, None instead."""
        key = digest(task, mixer, size, rate, seed)
        if key not in self._found and missing:
            device = f"{os.cpu_count()} cores of {processor()}, {jax.devices()[0].platform}, jax {jax.__version__}"
            names = {"experiment": key, "task": task, "mixer": mixer, "size": size, "rate": rate, "seed": seed}
            cell = names | run(experiment_of(task, mixer, size, rate, seed)) | {"device": device}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
            self._found[key] = cell
            told = "diverged" if "diverged" in cell else f"validation {cell['validation']['accuracy']:.1%}"
            print(f"{task}, {mixer}, rate {rate:g}, seed {seed}: {told}, {cell.get('seconds', 0):.0f} s", flush=True)
        return self._found.get(key)


def best(cells: list[Cell]) -> Cell:
    """The most accurate on validation rows; of equals, the one of the least loss there."""
    return max(cells, key=lambda cell: (cell["validation"]["accuracy"], -cell["validation"]["loss"]))


def sweep(cells: Cells, task: str, mixer: str, arguments, missing: bool = True) -> list[Cell]:
    """The cells of the best rate, one a seed; none if no rate has been run yet, or all diverge."""
    first = [cells(task, mixer, arguments.size, rate, 0, missing) for rate in arguments.rates]
    first = [cell for cell in first if cell is not None and "diverged" not in cell]
    if not first:
        return []
    rate = best(first)["rate"]
    seeds = [cells(task, mixer, arguments.size, rate, seed, missing) for seed in range(arguments.seeds)]
    return [cell for cell in seeds if cell is not None and "diverged" not in cell]


def report(cells: Cells, arguments) -> str:
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
        rows = {mixer: sweep(cells, task, mixer, arguments, missing=False) for mixer in arguments.mixers}
        rows = {mixer: found for mixer, found in rows.items() if found}
        if not rows:
            continue
        example = experiment_of(task, next(iter(rows)), arguments.size, arguments.rates[0], 0)
        lengths = sorted({int(n) for found in rows.values() for n in found[0]["accuracy"]})
        trained = example.training.stages[-1].length
        stages = ", then ".join(f"{s.steps} steps of {s.batch} rows of {s.length}" for s in example.training.stages)
        options = {key: value for key, value in workdirs.to_dict(example)["data"].items() if key != "kind"}
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
    arguments = parser.parse_args()
    cells = Cells(arguments.cells)
    for task in arguments.tasks:
        for mixer in arguments.mixers:
            sweep(cells, task, mixer, arguments)
            arguments.cells.with_suffix(".md").write_text(report(cells, arguments), encoding="utf-8")
    print(report(cells, arguments))


if __name__ == "__main__":
    main()
