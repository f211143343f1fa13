"""Starting from a checkpoint of another run: `--init_from=WORKDIR[@STEP][:all]`.

The new run begins at its own step 0, with its own stages, rates and documents, and with the other's parameters; with
`:all` its optimiser goes on with the other's moments as well. Text is read with the other's tokenizer.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from flax import nnx

from longctx import data
from longctx.errors import UsageError
from longctx.folder import path as paths
from longctx.training import checkpoints
from longctx.training.step import Program, TrainState, abstract_model

if TYPE_CHECKING:
    from longctx.training.workdir import Run

_MOST = 8  # parameters named that differ


class Origin(NamedTuple):
    """What a run starts from.

    Attributes:
      workdir: of the other run, absolute.
      step: of its checkpoint; None for the newest.
      everything: whether the optimiser's state is taken as well.
    """

    workdir: Path
    step: int | None
    everything: bool

    @classmethod
    def parse(cls, text: str) -> Origin:
        """What `WORKDIR[@STEP][:all]` names."""
        path, step, everything = re.fullmatch(r"(.+?)(?:@([0-9]{1,9}))?(:all)?", text, re.DOTALL).groups()
        return cls(Path(os.path.expanduser(path)).absolute(), int(step) if step else None, bool(everything))

    def __str__(self):
        step = "" if self.step is None else f"@{self.step}"
        return f"{self.workdir}{step}{':all' if self.everything else ''}"


def pinned(text: str) -> str:
    """The same with the step that it names today, or "" for "".

    Raises:
      UsageError: there is no such run, or it has no such checkpoint.
    """
    if not text:
        return ""
    origin = Origin.parse(text)
    paths.check(origin.workdir, "--init_from")
    steps = checkpoints.steps(origin.workdir)
    if not steps:
        raise UsageError(f"--init_from={text}: {origin.workdir} holds no checkpoint; give the folder of a trained run.")
    if origin.step not in (None, *steps):
        raise UsageError(
            f"--init_from={text}: {origin.workdir} has no checkpoint of step {origin.step}; there are those of steps "
            f"{', '.join(map(str, steps))}."
        )
    return str(origin._replace(step=steps[-1] if origin.step is None else origin.step))


def names(text: str, other: str) -> bool:
    """Whether `text` names what the pinned `other` does."""
    if not text or not other:
        return text == other
    given, kept = Origin.parse(text), Origin.parse(other)
    return given._replace(step=kept.step if given.step is None else given.step) == kept


def tokenizer(text: str) -> Path | None:
    """The folder with the tokenizer that text is read with; None where the other run has none, or for ""."""
    folder = Origin.parse(text).workdir if text else None
    return folder if folder and (folder / "tokenizer.json").exists() else None


def check(text: str, run: Run, program: Program, source: data.Source) -> None:
    """Whether a run can start there; nothing is loaded.

    Args:
      text: from `pinned`.
      run: what it names.
      program, source: of the new run.

    Raises:
      UsageError: the model is not that of the other run, or text was tokenized in another way.
    """
    if differ := _differences(run, program):
        more = f"; and {len(differ) - _MOST} more" * (len(differ) > _MOST)
        raise UsageError(
            f"--init_from={text} has another model ({'; '.join(differ[:_MOST])}{more}); give the model that "
            f"{run.path / 'config.json'} describes."
        )
    if isinstance(source, data.Corpus) and run.tokenizer and source.tokenizer.digest != run.tokenizer.digest:
        raise UsageError(
            f"--init_from={text} was trained on the tokens of another tokenizer, and parameters of tokens mean nothing "
            f"for others; give --config.data.tokenizer={run.path / 'tokenizer.json'}."
        )


def load(text: str, program: Program) -> TrainState:
    """The state before the first step of a run that passed `check`.

    Raises:
      UsageError: the checkpoint cannot be loaded.
    """
    origin = Origin.parse(text)
    if origin.everything:
        return program.restarted(checkpoints.load_state(origin.workdir, program.abstract, origin.step))
    params, _ = checkpoints.load_params(origin.workdir, program.abstract.params, origin.step)
    return program.begin(params)


def _differences(run: Run, program: Program) -> list[str]:
    """Parameters that the other run's model has in other shapes, or one of the two does not have."""
    there = _shapes(nnx.as_pure(abstract_model(run.experiment, run.vocab_size)[1]))
    here = _shapes(program.abstract.params)
    return [
        f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def _shapes(params: Any) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape) for path, leaf in leaves}
