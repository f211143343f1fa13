"""Every measurement of a trained model, on held-out text or its synthetic task, and the report of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import tqdm
from flax import nnx

from longctx import config, data
from longctx.evals import answers, needle, perplexity, report
from longctx.evals.scorer import Scorer
from longctx.evals.speed import speed
from longctx.models import parameter_count

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def evaluate(
    model: nnx.Module,
    experiment: config.Experiment,
    source: data.Source,
    workdir: str | os.PathLike,
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures a model, writes WORKDIR/report and prints its table.

    Args:
      model: the trained model; it runs where it is placed, under the ambient mesh.
      experiment: whose `evaluation` says what to measure.
      source: a corpus, whose held-out documents are used, or a synthetic task, of which new rows are made.
      workdir: of the run; its config.json and metrics.jsonl are shown in the report.
      training: what `longctx.training` says of the run: seconds, tokens_per_second, loss, ...

    Returns:
      What report/summary.json holds.
    """
    notes = []
    if training is not None and not training.get("finished", True):
        notes.append("Training has not finished: this is the newest checkpoint.")
    start = time.perf_counter()
    measure = _of_task if isinstance(source, data.Task) else _of_text
    silent = None if jax.process_index() == 0 else True  # None: where stderr is no terminal
    with tqdm.tqdm(desc="evaluating", unit="token", unit_scale=True, disable=silent) as bar:
        measured = measure(model, experiment, source, bar, notes)
        total = bar.total

    summary = {
        "model": {
            "parameters": parameter_count(model),
            "trained_length": experiment.training.stages[-1].length,
        },
        "train": _training(training),
        **measured,
        "evaluation": {"seconds": time.perf_counter() - start, "tokens": total},
        "notes": notes,
        "device": _device(),
        "versions": _versions(),
        "config": _config(workdir),
    }
    if jax.process_index() == 0:
        report.write(Path(workdir), summary)
        print(report.table(summary), flush=True)
    return summary


def _of_task(
    model: nnx.Module, experiment: config.Experiment, task: data.Task, bar: tqdm.tqdm, notes: list[str]
) -> dict[str, Any]:
    """Answers to a synthetic task, by the length of rows."""
    options = experiment.evaluation
    rows = {n: answers.samples_of(n, options.samples, options.tokens) for n in sorted(task.lengths)}
    bar.reset(sum(length * count for length, count in rows.items()))
    reader = answers.Reader(model, _tokens_at_once(experiment), bar.update)
    measured = {length: reader.measure(task, length, count, experiment.seed) for length, count in rows.items()}
    speeds = {
        str(length): {
            "tokens_per_second": found.tokens_per_second,
            "peak_bytes": found.peak_bytes,
            "rows": rows[length],
        }
        for length, found in measured.items()
    }
    return {
        "task": answers.summarise(task, measured),
        "needle": {"accuracy": {}},
        "perplexity": {"final_block": {}},
        "loss_by_position": [],
        "speed": speeds,
    }


def _of_text(
    model: nnx.Module, experiment: config.Experiment, corpus: data.Corpus, bar: tqdm.tqdm, notes: list[str]
) -> dict[str, Any]:
    """Retrieval, perplexity and loss by position in held-out text, and speed."""
    options, stage = experiment.evaluation, experiment.training.stages[-1]
    lengths = sorted(factor * stage.length for factor in set(options.factors))
    block, facts = options.final_block, experiment.data.needles.facts
    tail = min(block, lengths[0])  # tokens scored where the last one alone matters; the blocks' programs then serve

    # Perplexity: the windows, and by context the length that rows are padded to, so that programs are shared.
    documents = corpus.heldout.lengths
    longest = perplexity.longest_context(documents, lengths[-1], block)
    if longest < lengths[-1]:
        notes.append(
            f"No held-out document has {lengths[-1] + block:,} tokens; "
            + (f"perplexity is measured up to a context of {longest:,}." if longest else "perplexity is not measured.")
        )
    contexts = perplexity.contexts(longest) if longest else []
    shapes = {c: min((n for n in lengths if n >= c + block), default=c + block) for c in contexts[:-1]}
    shapes |= {c: c + block - 1 for c in contexts[-1:]}
    windows = perplexity.windows(documents, longest, block, options.documents) if longest else []
    # Facts are single words of the vocabulary that only training on them can teach.
    where = needle.depths(options.depths) if experiment.data.needles.rows else []
    if not where:
        notes.append("The training rows carried no facts (data.needles.rows is 0), so retrieval is not measured.")

    bar.reset(len(windows) * sum(shapes.values()) + len(where) * options.samples * sum(lengths))
    scorer = Scorer(model, _tokens_at_once(experiment), bar.update)
    measured: dict[str, Any] = {"needle": {"accuracy": {}}, "perplexity": {"final_block": {}}}
    if where:
        accuracy = needle.grid(scorer, corpus, lengths, options.samples, facts, where, tail=tail, seed=experiment.seed)
        measured["needle"] = needle.summarise(accuracy, lengths, where, options.samples, facts)
    measured["loss_by_position"] = []
    if windows:
        blocks, whole = perplexity.final_block(scorer, corpus.heldout, windows, block, shapes)
        measured["perplexity"] = perplexity.summarise(blocks, experiment.seed) | {
            "block": block,
            "windows": len(windows),
            "documents": len({window.document for window in windows}),
        }
        measured["loss_by_position"] = perplexity.by_position(whole)
    measured["speed"] = speed(scorer, corpus.heldout.tokens, lengths, tail=tail)
    return measured


def _tokens_at_once(experiment: config.Experiment) -> int:
    """As many as a step of training held at once, with its backward pass."""
    stage = experiment.training.stages[-1]
    return stage.batch * stage.length // experiment.training.accumulate


def _training(training: dict[str, Any] | None) -> dict[str, Any]:
    """The summary of training, under the report's names."""
    names = {"seconds": "wall_seconds", "loss": "final_loss"}
    return {names.get(key, key): value for key, value in (training or {}).items()}


def _device() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "host": platform.platform(),
        "cores": os.cpu_count(),
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _config(workdir: str | os.PathLike) -> dict[str, Any]:
    """The experiment, as the run wrote it down."""
    file = Path(workdir) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
