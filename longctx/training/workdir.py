"""The working directory of a run, and what a trained one gives back.

config.json      the experiment, written when training first starts
tokenizer.json   the tokenizer; none for a synthetic task
data.json        what the tokenizer and the corpus were, to notice when they change
start.json       what training said of itself when it last started, see longctx.training.start
checkpoints/     see longctx.training.checkpoints
metrics.jsonl    see longctx.training.metrics
logs/            TensorBoard's
report/          see longctx.evals
training.lock    there while a run trains, evaluating.lock while a report is made, see longctx.training.lock
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from longctx import config, plugins
from longctx.data import TASKS, Source, Task, Tokenizer
from longctx.errors import UsageError
from longctx.folder import files
from longctx.folder import path as paths
from longctx.layers import MIXERS, MLPS
from longctx.models import LanguageModel
from longctx.parallel import mesh as meshes
from longctx.training import checkpoints, origin
from longctx.training.step import abstract_model, placed

# What may change between the starts of one run: where it runs and finds layers, how often it saves and logs, and what
# is measured.
FREE = ("mesh", "checkpoints", "evaluation", "plugins", "training.log_every")

LARGEST = 2**24  # bytes of config.json and data.json; training writes thousands


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that was trained, or is being trained.

    Attributes:
      path: its WORKDIR.
      experiment: what it is made from.
      tokenizer: of its corpus; None for a synthetic task.
    """

    path: Path
    experiment: config.Experiment
    tokenizer: Tokenizer | None

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self.experiment.data.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size


def settled(workdir: Path, experiment: config.Experiment) -> config.Experiment:
    """`experiment` as it starts or goes on in `workdir`, with all that it leaves open; to be given to `check`.

    What `init_from` names gets its step. Where stages were appended, or the last one lengthened, the learning rate of
    the steps done stays what it was: unless `training.schedule_steps` is given, it has fallen where it would have
    before, and keeps its final value from there on.

    Raises:
      UsageError: there is no checkpoint to start from.
    """
    workdir = Path(workdir)
    paths.check(workdir)
    _check_forms(workdir)
    if not (workdir / "config.json").exists():
        return dataclasses.replace(experiment, init_from=origin.pinned(experiment.init_from))
    before, training = _read_config(workdir), experiment.training
    done, stages = _done(workdir), before.training.stages
    if done and not training.schedule_steps and _until(done, stages) == _until(done, training.stages):
        horizon = before.training.horizon
        training = dataclasses.replace(training, schedule_steps=0 if training.steps == horizon else horizon)
    init_from = experiment.init_from
    init_from = before.init_from if origin.names(init_from, before.init_from) else init_from
    return dataclasses.replace(experiment, training=training, init_from=init_from)


def check(workdir: Path, experiment: config.Experiment) -> list[str]:
    """Whether `experiment` may start, or go on, in `workdir`; nothing is written.

    What may change is what leaves the steps of the newest checkpoint as they were: `FREE`, stages after it, and where
    the learning rate ends its fall, as long as nothing is saved.

    Returns:
      What differs and may, in sentences.

    Raises:
      UsageError: another experiment was started there, with the fields that differ; or no run can be there; or its
        plugins are there.
    """
    workdir = Path(workdir)
    paths.check(workdir)
    paths.writable(workdir)
    _check_forms(workdir)
    plugins.apart(experiment.plugins, workdir)
    if not (workdir / "config.json").exists():
        if (workdir / "checkpoints").exists():
            raise UsageError(
                f"--workdir={workdir} holds checkpoints but no config.json, so what they are of is not known; "
                "put the file back, or name another folder."
            )
        return []
    started = _read_config(workdir)
    before, now = _flat(config.to_dict(started)), _flat(config.to_dict(experiment))
    changed = {
        name: f"{name}: {_show(before, name)} in the workdir, {_show(now, name)} given"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    free, done = FREE, _done(workdir)
    if _until(done, started.training.stages) == _until(done, experiment.training.stages):
        free += ("training.stages",)
    if not done or started.training.horizon == experiment.training.horizon:
        free += ("training.schedule_steps",)
    refused = [text for name, text in changed.items() if not f"{name}.".startswith(tuple(f"{each}." for each in free))]
    if refused:
        raise UsageError(
            f"--workdir={workdir} was started with another experiment ({'; '.join(refused)}); "
            f"give the same experiment, or another --workdir, in which --init_from={workdir} goes on from this run's "
            f"parameters. Only {', '.join(FREE)} may change, and stages that are not begun."
        )
    if not isinstance(experiment.data, Task):
        _check_tokenizer(workdir)
    return list(changed.values())


def agree(workdir: Path, experiment: config.Experiment, source: Source) -> list[str]:
    """As `check`, and whether the corpus is the one that the run was started with; nothing is written."""
    workdir = Path(workdir)
    changes = check(workdir, experiment)
    if (workdir / "config.json").exists():
        changes += compare_source(workdir, source)
    return changes


def start(workdir: Path, experiment: config.Experiment, source: Source) -> list[str]:
    """Writes what a run begins with, or what may have changed since.

    Returns:
      As `agree`.

    Raises:
      UsageError: the corpus is not what this run was started with, or see `check`; nothing has been written then.
    """
    workdir = Path(workdir)
    changes = agree(workdir, experiment, source)
    if jax.process_index() == 0:
        if not (workdir / "config.json").exists():
            workdir.mkdir(parents=True, exist_ok=True)
            facts = {"tokenizer": None} | source.fingerprint()
            if not isinstance(source, Task):
                source.tokenizer.save(workdir / "tokenizer.json")
                facts["tokenizer"] = _digest(workdir / "tokenizer.json")
            files.replace(workdir / "data.json", _json(facts))
        # Last: with it the workdir counts as started.
        files.replace(workdir / "config.json", _json(config.to_dict(experiment)))
    return changes


def compare_source(workdir: Path, source: Source, trained: bool = True) -> list[str]:
    """Whether `source` is, by content, what the run was started with.

    Args:
      workdir: of the run.
      source: from `longctx.data.prepare`.
      trained: whether the training documents are compared; without, only what is held out, as evaluation needs.

    Returns:
      A sentence if an earlier version wrote data.json, without what most of this compares.

    Raises:
      UsageError: it is not, with what differs.
    """
    found = _read_data(workdir)
    if differ := source.differences(found, trained):
        why = "training cannot go on where it stopped" if trained else "what would be measured may have been trained on"
        raise UsageError(
            f"the corpus is not the one that {workdir} was started with ({'; '.join(differ)}), so {why}; bring the "
            "documents back, or name another --workdir."
        )
    if source.fingerprint().keys() <= found.keys():
        return []
    return [f"{workdir / 'data.json'} is of an earlier version, without digests: only the corpus' sizes were compared"]


def open_run(workdir: str | Path) -> Run:
    """The run in a working directory.

    Raises:
      UsageError: there is none, or its files are missing, damaged, or not of one run.
    """
    workdir = Path(workdir)
    paths.check(workdir)
    _check_forms(workdir)
    if not (workdir / "config.json").exists():
        what = "holds no config.json" if workdir.is_dir() else "does not exist"
        raise UsageError(f"--workdir={workdir} {what}; give the folder of a run that longctx.train started.")
    experiment = _read_config(workdir)
    if isinstance(experiment.data, Task):
        return Run(workdir, experiment, None)
    _check_tokenizer(workdir)
    return Run(workdir, experiment, Tokenizer.load(workdir / "tokenizer.json"))


def load_model(run: Run, mesh: jax.sharding.Mesh | None = None) -> tuple[LanguageModel, int]:
    """The model of the newest usable checkpoint, and its step.

    Args:
      run: from `open_run`.
      mesh: what the parameters are split over, from `parallel.mesh.make`; by default the first device alone.

    Raises:
      UsageError: there is no usable checkpoint.
    """
    mesh = meshes.make(config.Mesh(1, 1, 1)) if mesh is None else mesh
    graphdef, params = abstract_model(run.experiment, run.vocab_size)
    loaded, step = checkpoints.load_params(run.path, placed(params, mesh))
    return nnx.merge(graphdef, loaded), step


def _done(workdir: Path) -> int:
    """Steps of the newest checkpoint."""
    return max(checkpoints.steps(workdir), default=0)


def _until(step: int, stages: Sequence[config.Stage]) -> list[tuple[int, int, int]]:
    """The stages of the first `step` steps: the steps of each, and its rows."""
    found = []
    for stage in stages:
        if step > 0:
            found.append((min(step, stage.steps), stage.batch, stage.length))
        step -= stage.steps
    return found


def _check_forms(workdir: Path) -> None:
    """Raises UsageError where something else has the name of what a run needs; a log is not needed."""
    for name in ("config.json", "data.json", "tokenizer.json", "checkpoints"):
        path = workdir / name
        right, form = (path.is_dir(), "a folder") if name == "checkpoints" else (path.is_file(), "a file")
        if os.path.lexists(path) and not right:
            raise UsageError(f"{path} is not {form}; restore it from a copy, or name another --workdir.")


def _check_tokenizer(workdir: Path) -> None:
    """Raises UsageError unless the tokenizer is the one that the run was started with."""
    tokenizer = workdir / "tokenizer.json"
    if not tokenizer.exists():
        raise UsageError(f"{tokenizer} is missing, without which the model's tokens have no meaning; put it back.")
    if _digest(tokenizer) != _read_data(workdir).get("tokenizer"):
        raise UsageError(
            f"{tokenizer} is not the one that the model was trained with (data.json has its digest); "
            "put the original back."
        )


def _read_config(workdir: Path) -> config.Experiment:
    tree = _read_json(workdir / "config.json")
    try:
        plugins.apart(tree.get("plugins"), workdir)
        return config.parse(tree, MIXERS, MLPS, TASKS)
    except UsageError as error:
        raise UsageError(f"{workdir / 'config.json'} cannot be used: {error}") from error


def _read_data(workdir: Path) -> dict[str, Any]:
    if not (workdir / "data.json").exists():
        raise UsageError(f"{workdir / 'data.json'} is missing, which training wrote at its start; put it back.")
    return _read_json(workdir / "data.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=_not_json)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read ({error}); restore it from a copy.") from error
    if not isinstance(value, dict):
        raise UsageError(f"{file} holds a {type(value).__name__}, not an object; restore it from a copy.")
    return value


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    if not isinstance(tree, dict):
        return {path: tree}
    leaves = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{path}.{key}" if path else key)
    return leaves


def _show(flat: dict[str, Any], name: str) -> str:
    return repr(flat[name]) if name in flat else "not there"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
