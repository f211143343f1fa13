"""Every measurement of a trained model, on held-out text or its synthetic task, and the report of them."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from longctx import config, data, provenance
from longctx.errors import refused
from longctx.evals import answers, needle, perplexity, pieces, report
from longctx.evals.heldout import HeldOut
from longctx.evals.scorer import Scorer
from longctx.evals.speed import speed
from longctx.models import parameter_count
from longctx.progress import Progress

SEED = 0  # of what is planted and of new rows: the same for runs of whatever seed, so that they can be compared


def evaluate(
    model: nnx.Module,
    experiment: config.Experiment,
    source: data.Source,
    workdir: str | os.PathLike,
    training: dict[str, Any] | None = None,
    name: str = "report",
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures a model, writes a report into WORKDIR and prints its table.

    Args:
      model: the trained model; it runs where it is placed, under the ambient mesh.
      experiment: whose `evaluation` says what to measure.
      source: a corpus, whose held-out documents are used, or a synthetic task, of which new rows are made.
      workdir: of the run; its config.json and metrics.jsonl are shown in the report.
      training: what `longctx.training` says of the run: seconds, tokens_per_second, loss, ...
      name: of the report's folder in WORKDIR; see `report.write`.
      notes: sentences that the report says as well.

    Returns:
      What report/summary.json holds.

    Raises:
      FloatingPointError: no loss of the model is finite; no report was written.
    """
    workdir, notes = Path(workdir), [*notes, *data.notes(source, experiment.data, experiment.training.stages)]
    if training is not None and not training.get("finished", True):
        notes.append("Training has not finished: this is the newest checkpoint.")
    if training is not None and (missing := training.get("missing")):
        notes.append(
            f"metrics.jsonl lacks {missing:,} of {training['steps']:,} steps; what is said of training is of the rest."
        )
    start = time.perf_counter()
    measure = _of_task if isinstance(source, data.Task) else _of_text
    with Progress("evaluating", "token", large=True, shown=jax.process_index() == 0) as bar:
        measured = measure(model, experiment, source, bar, notes)
    _require_losses(measured)
    windows = _finite(measured.pop("windows"), [])
    lost: list[str] = []
    summary = {
        "run": provenance.run(workdir) | {"trained": _trained(workdir)},
        "model": {
            "parameters": parameter_count(model),
            "trained_length": experiment.training.stages[-1].length,
        },
        "train": _training(training),
        "corpus": _corpus(source, training) if isinstance(source, data.Corpus) and len(source.train) else None,
        **measured,
        "evaluation": {"seconds": time.perf_counter() - start, "tokens": bar.total},
        "device": provenance.device(),
        "versions": provenance.versions(),
        "config": _json(workdir / "config.json"),
    }
    summary = _finite(summary, lost)
    if lost:
        more = f" and {len(lost) - 8} more" * (len(lost) > 8)
        notes.append(f"Not finite, and left out therefore: {', '.join(lost[:8])}{more}.")
    summary["notes"] = notes
    if jax.process_index() == 0:
        report.write(workdir, summary, windows, name)
        print(report.table(summary), flush=True)
    return summary


def check(model: nnx.Module, experiment: config.Experiment, source: data.Source) -> None:
    """Traces every program that `evaluate` runs, so that what it would refuse is known before anything is written.

    Args:
      model: of shapes or of arrays, under the ambient mesh.
      experiment, source: as `evaluate` is given them.

    Raises:
      UsageError: a layer cannot compute rows of one of the lengths, or on this mesh.
    """
    at_once = _tokens_at_once(experiment)
    if isinstance(source, data.Task):
        reader = answers.Reader(model, at_once)
        for length, rows in _rows(experiment, source).items():
            with refused(f"evaluation of rows of {length} tokens (data)"):
                reader.trace(length, rows)
        return
    scorer = Scorer(model, at_once)
    for length, tail in _Plan.of(experiment, source).programs:
        with refused(f"evaluation of rows of {length} tokens (evaluation.factors)"):
            scorer.trace(length, tail)


def _rows(experiment: config.Experiment, task: data.Task) -> dict[int, int]:
    """How many rows of a task are read, by length."""
    options = experiment.evaluation
    return {n: answers.samples_of(n, options.samples, options.tokens) for n in sorted(task.lengths)}


def _of_task(
    model: nnx.Module, experiment: config.Experiment, task: data.Task, bar: Progress, notes: list[str]
) -> dict[str, Any]:
    """Answers to a synthetic task, by the length of rows."""
    rows = _rows(experiment, task)
    graphdef, params = nnx.split(model)
    heldout = HeldOut(graphdef, experiment, task)
    bar.begin(heldout.tokens + sum(length * count for length, count in rows.items()))
    loss = heldout(nnx.as_pure(params), bar.add)
    reader = answers.Reader(model, _tokens_at_once(experiment), bar.add)
    measured = {length: reader.measure(task, length, count, SEED) for length, count in rows.items()}
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
        "heldout": loss.summary(),
        "speed": speeds,
        "windows": {
            "final_block": pieces.EMPTY,
            "heldout": pieces.heldout(loss),
            "needle": {},
            "task": pieces.task(measured),
        },
    }


def _of_text(
    model: nnx.Module, experiment: config.Experiment, corpus: data.Corpus, bar: Progress, notes: list[str]
) -> dict[str, Any]:
    """Retrieval, perplexity and loss by position in held-out text, and speed."""
    options, facts = experiment.evaluation, experiment.data.needles.facts
    plan = _Plan.of(experiment, corpus)
    lengths, block, tail, shapes = plan.lengths, options.final_block, plan.tail, plan.shapes
    longest = max(shapes, default=0)
    if longest < lengths[-1]:
        notes.append(
            f"No held-out document has {lengths[-1] + block:,} tokens; "
            + (f"perplexity is measured up to a context of {longest:,}." if longest else "perplexity is not measured.")
        )
    windows = perplexity.windows(corpus.heldout.lengths, longest, block, options.documents) if longest else []
    # Facts are single words of the vocabulary that only training on them can teach.
    where = needle.depths(options.depths) if experiment.data.needles.rows else []
    if not where:
        notes.append("The training rows carried no facts (data.needles.rows is 0), so retrieval is not measured.")

    graphdef, params = nnx.split(model)
    heldout = HeldOut(graphdef, experiment, corpus)
    bar.begin(heldout.tokens + len(windows) * sum(shapes.values()) + len(where) * options.samples * sum(lengths))
    loss = heldout(nnx.as_pure(params), bar.add)
    if not loss.whole:
        notes.append(
            f"The held-out loss is of {loss.tokens.sum():,} of {corpus.heldout.size:,} held-out tokens, "
            "as evaluation.heldout_tokens says."
        )
    scorer = Scorer(model, _tokens_at_once(experiment), bar.add)
    measured: dict[str, Any] = {"needle": {"accuracy": {}}, "perplexity": {"final_block": {}}}
    found = {"final_block": pieces.EMPTY, "heldout": pieces.heldout(loss), "needle": {}, "task": {}}
    if where:
        hits, rows = needle.grid(scorer, corpus, lengths, options.samples, facts, where, tail=tail, seed=SEED)
        measured["needle"] = needle.summarise(hits, lengths, where, facts)
        found["needle"] = pieces.needles(lengths, hits, rows)
    measured["loss_by_position"] = []
    if windows:
        cut = [window.document for window in windows]
        blocks, whole = perplexity.final_block(scorer, corpus.heldout, windows, block, shapes)
        measured["perplexity"] = perplexity.summarise(blocks, cut) | {
            "block": block,
            "windows": len(windows),
            "documents": len(set(cut)),
        }
        if len(set(cut)) == 1:
            notes.append("All windows are of one held-out document, so perplexity has no standard error.")
        measured["loss_by_position"] = perplexity.by_position(whole, cut)
        found["final_block"] = pieces.final_block(corpus.heldout, windows, block, blocks)
    measured |= {"heldout": loss.summary(), "windows": found}
    measured["speed"] = speed(scorer, corpus.heldout.tokens, lengths, tail=tail)
    return measured


def _finite(tree: Any, lost: list[str], path: str = "") -> Any:
    """The tree with None for numbers that are not finite; their paths are added to `lost`."""
    if isinstance(tree, dict):
        return {key: _finite(value, lost, f"{path}.{key}" if path else key) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value, lost, f"{path}[{i}]") for i, value in enumerate(tree)]
    if isinstance(tree, float) and not math.isfinite(tree):
        lost.append(path)
        return None
    return tree


def _require_losses(measured: dict[str, Any]) -> None:
    """Raises FloatingPointError if no loss of the model is a finite number."""
    losses = [measured["heldout"]["loss"], *measured["perplexity"]["final_block"].values()]
    losses += measured.get("task", {}).get("loss", {}).values()
    if not any(map(math.isfinite, losses)):
        raise FloatingPointError(
            f"the losses of the model are {losses[0]}, of whatever length, so that there is nothing to report; "
            "its parameters are of no use. Train again with a lower training.learning_rate."
        )


class _Plan(NamedTuple):
    """Which rows of held-out text are scored.

    Attributes:
      lengths: tokens a row, of needles and of measurements of speed.
      tail: tokens scored of these, though the last one alone matters: the programs of the final blocks then serve.
      shapes: by tokens of context before a final block, those that its row is padded to, so that programs are shared;
        empty if no document is long enough.
      programs: (length, tail) of each program.
    """

    lengths: list[int]
    tail: int
    shapes: dict[int, int]
    programs: list[tuple[int, int]]

    @classmethod
    def of(cls, experiment: config.Experiment, corpus: data.Corpus) -> _Plan:
        options, stage = experiment.evaluation, experiment.training.stages[-1]
        lengths = sorted(factor * stage.length for factor in set(options.factors))
        block = options.final_block
        tail = min(block, lengths[0])
        longest = perplexity.longest_context(corpus.heldout.lengths, lengths[-1], block)
        contexts = perplexity.contexts(longest) if longest else []
        shapes = {c: min((n for n in lengths if n >= c + block), default=c + block) for c in contexts[:-1]}
        shapes |= {c: c + block - 1 for c in contexts[-1:]}
        scored = {(length, longest + block - 1 if context == longest else block) for context, length in shapes.items()}
        return cls(lengths, tail, shapes, sorted({(length, tail) for length in lengths} | scored))


def _tokens_at_once(experiment: config.Experiment) -> int:
    """As many as a step of training held at once, with its backward pass."""
    stage = experiment.training.stages[-1]
    return stage.batch * stage.length // experiment.training.accumulate


def _training(training: dict[str, Any] | None) -> dict[str, Any]:
    """The summary of training, under the report's names."""
    names = {"seconds": "wall_seconds", "loss": "final_loss"}
    return {names.get(key, key): value for key, value in (training or {}).items()}


def _corpus(corpus: data.Corpus, training: dict[str, Any] | None) -> dict[str, Any]:
    """What was trained on."""
    epochs = (training or {}).get("tokens", 0) / corpus.train.size
    return {"tokens": corpus.train.size, "documents": len(corpus.train), "epochs": epochs}


def _trained(workdir: Path) -> str | None:
    """The command that trained the run last, as WORKDIR/start.json has it."""
    run = _json(workdir / "start.json").get("run")
    command = run.get("command") if isinstance(run, dict) else None
    return command if isinstance(command, str) else None


def _json(file: Path) -> dict[str, Any]:
    """What the run wrote down; nothing where it is not there or cannot be read."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
