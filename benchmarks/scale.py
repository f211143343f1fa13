"""Memory and bytes sent on a pod, by length and by devices, and the longest row that fits on eight small chips.

    pip install -e '.[plan]' && python benchmarks/scale.py --write

Compiled for TPUs on a machine without one (`longctx.plan`); nothing is measured. The curves are of
experiments/hybrid_1b_1m.py and of full attention in its place; the longest rows, of a small model of one kind of layer,
with all eight chips of a v5e:2x4 on one row. What is found is kept in a file of results, and a cell that is there is
not compiled again, so that a run can be stopped and go on. With --write what the file has replaces benchmarks/scale.md
and scale.png.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import runpy
import subprocess

from matplotlib.figure import Figure

from longctx import config, planning
from longctx.data import TASKS
from longctx.layers import MIXERS, MLPS

EXPERIMENT = pathlib.Path(__file__).parents[1] / "experiments" / "hybrid_1b_1m.py"
LENGTHS = ("128k", "1m", "4m")
KINDS = {"hybrid": "", "full attention": ",attention"}
POD = "v5p:4x4x8"
PODS = ("v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8")  # rows of 1m
SMALL = "v5e:2x4"
WIDTH, LAYERS, HEADS = 1024, 8, 8
FAMILIES = {
    "gated_delta": {"kind": "gated_delta", "heads": HEADS, "key_width": 64, "value_width": 128},
    "kda": {"kind": "kda", "heads": HEADS, "key_width": 64, "value_width": 128},
    "mamba2": {"kind": "mamba2", "heads": 2 * HEADS, "key_width": 128, "value_width": 128},
    "mlstm": {"kind": "mlstm", "heads": HEADS, "key_width": 64, "value_width": 128},
    "rglru": {"kind": "rglru", "hidden": WIDTH, "heads": HEADS},
    "attention, window 2048": {"kind": "attention", "heads": HEADS, "kv_heads": 4, "pattern": "Window(2048)"},
    "attention, full": {"kind": "attention", "heads": HEADS, "kv_heads": 4},
}
FIRST = 19  # the power of two tried first


def on_pod(row: str, kind: str, pod: str, one_by_one: bool = False) -> dict:
    """The numbers of the experiment's plan; `one_by_one`: with as many micro-batches as each device has rows."""
    name, topology = row + KINDS[kind], planning.describe(pod)
    tree = runpy.run_path(str(EXPERIMENT))["get_config"](name)
    if one_by_one:
        tree.training.accumulate = tree.training.stages[0][1] * tree.mesh.context // len(topology.devices)
    return planning.plan(config.parse(tree, MIXERS, MLPS, TASKS), topology, name).json()


def of_family(family: str, length: int) -> dict:
    """The numbers of a small model's plan, with one row over all chips."""
    mixer = FAMILIES[family]
    if mixer["kind"] == "attention":
        mixer = mixer | {"head_width": WIDTH // HEADS}
    tree = {
        "model": {
            "width": WIDTH,
            "pattern": ("only",),
            "repeats": LAYERS,
            "remat": "full",
            "blocks": {"only": {"mixer": mixer, "mlp": {"kind": "swiglu", "hidden": 3 * WIDTH}}},
        },
        "training": {"stages": ((1, 1, length),)},
        "mesh": {"data": 1, "context": 8},
        "data": {"vocab_size": 32768},
    }
    return planning.plan(config.parse(tree, MIXERS, MLPS, TASKS), planning.describe(SMALL), family).json()


class Cells:
    """What was found, in a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.known = dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}

    def find(self, key: str, function, *arguments) -> dict:
        """The cell, compiled now if it is not in the file."""
        if key not in self.known:
            self.known[key] = function(*arguments) | {"commit": _commit()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.known[key]]) + "\n")
            print(f"{key}: fits {self.known[key]['fits']}", flush=True)
        return self.known[key]

    def longest(self, family: str) -> None:
        """Looks for the largest power of two that fits: from `FIRST` up while rows fit, or down until one does."""

        def fits(power: int) -> bool:
            return self.find(f"{family} 2**{power}", of_family, family, 2**power)["fits"]

        power = FIRST
        step = 1 if fits(power) else -1
        while fits(power := power + step) == (step > 0):
            pass


def _commit() -> str:
    """The one that is checked out, short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=EXPERIMENT.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def report(cells: dict) -> str:
    """The tables, of what is known, in Markdown."""
    lines = [
        "# Long rows on a pod",
        "",
        "`python benchmarks/scale.py --write`: compiled on a machine without a TPU; nothing is measured. A cell takes "
        "minutes, and they were not all compiled at once: each names the commit whose program it is of.",
        "",
    ]
    on_pods = {key: cell for key, cell in cells.items() if " 2**" not in key}
    lines += bool(on_pods) * [
        f"## experiments/hybrid_1b_1m.py and full attention, {2**23:,} tokens a step",
        "",
        "| pod | kind | tokens a row | context | temporaries, GiB | all, GiB | fits | sent, GiB | computing at peak, s "
        "| utilised, at most | commit |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for key, cell in on_pods.items():
        held, sent = cell["bytes_per_device"], cell["collectives"]
        sent = "—" if sent is None else f"{sum(sent.values()) / 2**30:.1f}"
        lines.append(
            f"| {cell['topology']} | {key.split(' on ')[0]} | {cell['length']:,} | {cell['mesh']['context']} | "
            f"{held['temporaries'] / 2**30:.1f} | {held['total'] / 2**30:.1f} | {'yes' if cell['fits'] else 'no'} | "
            f"{sent} | {cell['roofline_seconds']['compute']:.2f} | {cell['utilisation_bound']:.0%} | {cell['commit']} |"
        )
    lines += [
        "",
        f"## The longest row on one {SMALL}",
        "",
        f"{LAYERS} layers of width {WIDTH}, everything recomputed, one row over eight chips; powers of two.",
        "",
        "| layer | longest that fits | its temporaries, GiB | shortest that does not | commit |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for family in FAMILIES:
        tried = {cell["length"]: cell for key, cell in cells.items() if key.startswith(f"{family} 2**")}
        fit = max((length for length, cell in tried.items() if cell["fits"]), default=None)
        over = min((length for length, cell in tried.items() if not cell["fits"]), default=None)
        commits = ", ".join(sorted({cell["commit"] for cell in tried.values()}))
        if tried:
            size = "—" if fit is None else f"{tried[fit]['bytes_per_device']['temporaries'] / 2**30:.1f}"
            lines.append(f"| {family} | {fit or 0:,} | {size} | {f'{over:,}' if over else '—'} | {commits} |")
    return "\n".join(lines) + "\n"


def plot(cells: dict, path: pathlib.Path) -> None:
    """Memory and bytes sent by length and by devices."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    for kind in KINDS:
        found = [(key, cell) for key, cell in cells.items() if key.startswith(kind)]
        for column, (by, chosen) in enumerate(
            (("length", [cell for _, cell in found if cell["topology"] == POD]),
             ("devices", [cell for key, cell in found if " 1m " in key]))
        ):  # fmt: skip
            chosen = sorted(chosen, key=lambda cell: cell[by])
            x = [cell[by] for cell in chosen]
            axes[0, column].plot(x, [cell["bytes_per_device"]["total"] / 2**30 for cell in chosen], "o-", label=kind)
            sent = [cell for cell in chosen if cell["collectives"] is not None]
            y = [sum(cell["collectives"].values()) / 2**30 for cell in sent]
            axes[1, column].plot([cell[by] for cell in sent], y, "o-", label=kind)
            axes[1, column].set_xlabel({"length": f"tokens a row, on {POD}", "devices": "devices, 1m tokens a row"}[by])
    for row, label in enumerate(("GiB on each device", "GiB that a device sends")):
        axes[row, 0].set_ylabel(label)
        for axis in axes[row]:
            axis.set_xscale("log", base=2)
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--only", default="", help="cells whose name has this")
    parser.add_argument("--write", action="store_true", help="replace benchmarks/scale.md and scale.png")
    options = parser.parse_args()
    found = Cells(options.results)
    jobs = [(row, kind, POD) for row in LENGTHS for kind in KINDS]
    jobs += [("1m", kind, pod) for pod in PODS if pod != POD for kind in KINDS]
    for row, kind, pod in jobs:
        key = f"{kind} {row} on {pod}"
        if options.only in key and not found.find(key, on_pod, row, kind, pod)["fits"]:
            found.find(f"{kind} {row}, one row at a time on {pod}", on_pod, row, kind, pod, True)
    for family in FAMILIES:
        if options.only in family:
            found.longest(family)
    text = report(found.known)
    if options.write:
        pathlib.Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
        if any(" 2**" not in key for key in found.known):
            plot(found.known, pathlib.Path(__file__).with_suffix(".png"))
    print(text)
