"""Longer rows than in training: perplexity and needles at 512 to 8,192 tokens with every position scheme.

    python benchmarks/extension.py

Trains the model of experiments/extension.py on 512 tokens with every scheme that learns on short rows, and evaluates it
on up to 16 times as many. Then, in place of RoPE in the model that was trained with it,

    as it is     every scheme that extends RoPE, without training
    tuned        some of them, after 60 more steps on rows of 2,048 tokens
    streaming    RoPE with a window of 256 tokens alone, and with the first four: attention sinks (arXiv:2309.17453)

Every run is a folder of --runs and is not done again; benchmarks/extension.md and .png are written after each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import runpy
import shutil

import jax
from matplotlib.figure import Figure
from timing import processor

from longctx import config, data, evals
from longctx.data import TASKS
from longctx.layers import MIXERS, MLPS
from longctx.parallel import mesh as meshes
from longctx.training import loop
from longctx.training import workdir as workdirs

HERE = pathlib.Path(__file__).parent
FILE = runpy.run_path(str(HERE.parent / "experiments" / "extension.py"))
TRAINED, LONGEST, TUNED = 512, 8192, 2048
SCALE, TUNED_SCALE = LONGEST / TRAINED, TUNED / TRAINED

# Name: options of `positions`, and of the mixer.
FREE = {
    "linear": {"kind": "linear", "factor": SCALE},
    "ntk": {"kind": "ntk", "factor": SCALE},
    "dynamic_ntk": {"kind": "dynamic_ntk", "trained": TRAINED},
    "ntk_by_parts": {"kind": "ntk_by_parts", "trained": TRAINED, "factor": SCALE},
    "yarn": {"kind": "yarn", "trained": TRAINED, "factor": SCALE},
    "llama3": {"kind": "llama3", "trained": TRAINED, "factor": SCALE},
    "longrope, all pairs alike": {"kind": "longrope", "trained": TRAINED, "factor": SCALE},
    "self_extend": {"kind": "self_extend", "group": 32, "window": 256},
    "dual_chunk": {"kind": "dual_chunk", "trained": TRAINED, "local": 128},
}
TUNING = {name: {**FREE[name], "factor": TUNED_SCALE} for name in ("linear", "ntk_by_parts", "yarn")}
STREAMING = {"window 256": "Window(256)", "window 256, sinks 4": "Window(256) | Sinks(4)"}


def experiment(kind: str, size: str, positions: dict | None = None, **mixer) -> config.Experiment:
    """That of the experiment file, with other positions and options of the mixer in place of its own."""
    tree = FILE["get_config"](f"{kind},{size}" if size else kind)
    if positions is not None:
        tree.model.blocks.full.mixer.positions = positions
    tree.model.blocks.full.mixer.update(mixer)
    return config.parse(tree, MIXERS, MLPS, TASKS)


def train(of: config.Experiment, folder: pathlib.Path) -> data.Source:
    """Trains in `folder`, or goes on there."""
    started = (folder / "config.json").exists()
    source = data.prepare(of.data, of.seed, folder if started else None)
    loop.train(of, folder, source)
    return source


def measured(of: config.Experiment, trained: pathlib.Path, folder: pathlib.Path) -> dict:
    """The report's numbers for the parameters in `trained` in the model `of`; kept in `folder`."""
    file = folder / "report" / "summary.json"
    if not file.exists():
        run = workdirs.open_run(trained)
        model, _ = workdirs.load_model(workdirs.Run(trained, of, run.tokenizer))
        source = data.prepare(of.data, of.seed, trained)
        folder.mkdir(parents=True, exist_ok=True)
        with jax.set_mesh(meshes.make(of.mesh)):
            evals.evaluate(model, of, source, folder)
    return json.loads(file.read_text(encoding="utf-8"))


def results(runs: pathlib.Path, size: str):
    """`(part, name, summary)` of every run, one after another."""
    for kind in FILE["KINDS"]:
        of = experiment(kind, size)
        train(of, runs / kind)
        yield "trained with it", kind, measured(of, runs / kind, runs / kind)
    rope = runs / "rope"
    for name, positions in FREE.items():
        yield "in place of rope", name, measured(experiment("rope", size, positions), rope, runs / f"free {name}")
    for name, pattern in STREAMING.items():
        of = experiment("rope", size, pattern=pattern)
        yield "streaming", name, measured(of, rope, runs / f"streaming {name}")
    for name, positions in TUNING.items():
        yield "tuned", name, tuned(runs, size, name, positions)


def tuned(runs: pathlib.Path, size: str, name: str, positions: dict) -> dict:
    """Training goes on from RoPE's checkpoint, in a folder whose experiment has one stage more."""
    folder, of = runs / f"tuned {name}", experiment("rope", size, positions)
    more = config.Stage(4, 2, 128) if size else config.Stage(60, 2, TUNED)
    training = dataclasses.replace(of.training, stages=(*of.training.stages, more))
    longer = dataclasses.replace(of, training=training)
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs / "rope", folder, ignore=shutil.ignore_patterns("report", "logs", "config.json"))
        (folder / "config.json").write_text(json.dumps(config.to_dict(longer)), encoding="utf-8")
    train(longer, folder)
    return measured(of, folder, folder)


def write(found: list[tuple[str, str, dict]], stem: pathlib.Path) -> None:
    """The table and the plot of all results so far."""
    contexts = list(found[0][2]["perplexity"]["final_block"])[2:]  # the shortest say little
    lengths = list(found[0][2]["needle"]["accuracy"])
    lines = [
        "# Rows longer than in training",
        "",
        f"`python benchmarks/extension.py`, on {processor()}, jax {jax.__version__}. The model of "
        f"experiments/extension.py: four layers of softmax attention of width 128, trained on {TRAINED} tokens.",
        "",
        "Perplexity of the last tokens of a document after so many tokens of context, and the share of needles found "
        "in rows of so many tokens.",
        "",
        "| | positions | " + " | ".join(f"ppl {int(n):,}" for n in contexts)
        + " | " + " | ".join(f"needle {int(n):,}" for n in lengths) + " |",
        "|---|---|" + "---:|" * (len(contexts) + len(lengths)),
    ]  # fmt: skip
    for part, name, summary in found:
        perplexity, needle = summary["perplexity"]["final_block"], summary["needle"]["accuracy"]
        cells = [f"{perplexity.get(n, float('nan')):,.1f}" for n in contexts] + [f"{needle[n]:.2f}" for n in lengths]
        lines.append(f"| {part} | {name} | " + " | ".join(cells) + " |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(found, contexts, lengths, stem.with_suffix(".png"))


def _plot(found, contexts, lengths, file: pathlib.Path) -> None:
    """Perplexity above, needles below, a column for each part."""
    parts = list(dict.fromkeys(part for part, _, _ in found))
    figure = Figure(figsize=(4.2 * len(parts), 6.5), layout="constrained")
    axes = figure.subplots(2, len(parts), sharey="row", squeeze=False)
    for column, part in enumerate(parts):
        above, below = axes[:, column]
        for _, name, summary in (one for one in found if one[0] == part):
            values = [summary["perplexity"]["final_block"].get(n, float("nan")) for n in contexts]
            above.plot([int(n) for n in contexts], values, marker=".", label=name)
            below.plot([int(n) for n in lengths], [summary["needle"]["accuracy"][n] for n in lengths], marker=".")
        above.set(title=part, xscale="log", xlabel="tokens of context")
        below.set(xscale="log", ylim=(-0.03, 1.03), xlabel="tokens a row")
        for axis, ticks in ((above, contexts), (below, lengths)):
            axis.axvline(TRAINED, color="grey", linewidth=0.8, linestyle=":")
            axis.set_xticks([int(n) for n in ticks], [f"{int(n):,}" for n in ticks], fontsize="x-small")
            axis.minorticks_off()
        above.legend(fontsize="x-small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.08))
    axes[0, 0].set_ylabel("perplexity of the last tokens")
    axes[1, 0].set_ylabel("needles found")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=pathlib.Path, default=pathlib.Path("runs/extension"), help="a folder for all runs"
    )
    parser.add_argument("--size", choices=("", "smoke"), default="", help="smoke: a test of the machinery, not kept")
    arguments = parser.parse_args()
    table = HERE / "extension" if not arguments.size else arguments.runs / "extension"
    done: list[tuple[str, str, dict]] = []
    for result in results(arguments.runs, arguments.size):
        done.append(result)
        write(done, table)
    print(table.with_suffix(".md").read_text(encoding="utf-8"))
