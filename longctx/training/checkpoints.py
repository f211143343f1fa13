"""Checkpoints: WORKDIR/checkpoints/<step>, written while training goes on, checked when they are read.

Orbax writes a checkpoint aside and renames it when it is whole, so a run that is killed while saving leaves the
checkpoint before as the newest. A save counts once every array in it was found again. What a disk, a copy or a hand may
do to it later is found by `SHA256SUMS`, the digests of its files (`sha256sum --check SHA256SUMS` reads it too): Orbax
alone would load some damage as numbers.

A checkpoint has two parts: `params`, which evaluation reads alone, and `optimizer`, the rest of the training state.
Where the input stands follows from the step. All processes write their shares into one folder and any number of them
reads it, each what its devices hold; process 0 chooses which checkpoint is read, digests and tidies.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from longctx.errors import RunError, UsageError
from longctx.folder import path as paths
from longctx.training.processes import from_first
from longctx.training.step import TrainState

SUMS = "SHA256SUMS"

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Checkpoints:
    """The checkpoints of a run that trains.

    Args:
      workdir: of the run.
      keep: how many of the newest are kept.
    """

    def __init__(self, workdir: Path, keep: int):
        self.directory = _directory(workdir)
        self._keep = keep
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: tuple[int, concurrent.futures.Future] | None = None

    def save(self, step: int, state: TrainState) -> None:
        """Saves in the background, once the state is copied off the devices; one save at a time.

        Raises:
          RunError: this save, or the one before, cannot be written.
        """
        self.wait()
        path = self.directory / str(step)
        parts = {"params": state.params, "optimizer": _rest(state)}
        with self._reported(step):
            self._prepare(path)
            response = ocp.save_checkpointables_async(path, parts, overwrite=True)
        self._saving = step, self._background.submit(self._finish, path, response, _kinds(parts))

    def wait(self) -> None:
        """Returns when what `save` began is on disk.

        Raises:
          RunError: it cannot be written.
        """
        if self._saving is not None:
            (step, saving), self._saving = self._saving, None
            with self._reported(step):
                saving.result()

    def newest(self) -> str:
        """Which checkpoint is the newest of those that count, in words."""
        saved = [step for step in self.steps() if (self.directory / str(step) / SUMS).exists()]
        return f"{self.directory / str(saved[-1])} is the last good checkpoint" if saved else "nothing is saved"

    @contextlib.contextmanager
    def _reported(self, step: int) -> Iterator[None]:
        """Reports a failed save in a sentence; Orbax raises many kinds of errors."""
        try:
            yield
        except Exception as error:
            what = str(error).splitlines() or [type(error).__name__]
            raise RunError(
                f"the checkpoint of step {step} cannot be written to {self.directory} ({what[0][:300]}); training "
                f"stops and {self.newest()}. Make room, then give the same command: it goes on from there."
            ) from error

    def steps(self) -> list[int]:
        """Of the checkpoints on disk, oldest first."""
        return _steps(self.directory)

    def check_room(self, abstract: TrainState) -> None:
        """Raises UsageError where there is no room for one more checkpoint of such a state."""
        if jax.process_index() == 0:
            leaves = jax.tree.leaves(abstract)
            paths.writable(self.directory, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves))

    def restore(self, abstract: TrainState) -> tuple[int, TrainState] | None:
        """The newest usable checkpoint, or None where there is no checkpoint.

        Damaged ones newer than it are named in a warning and moved to `checkpoints/damaged-<step>`.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Returns:
          Steps done, and the state.

        Raises:
          UsageError: there are checkpoints and all are damaged, or one is of another model.
        """

        found = _newest(self.directory, lambda path: _load_state(path, abstract))
        if found is None:
            return None
        step, state, damaged = found
        if jax.process_index() == 0:
            for path in damaged:
                path.rename(_damaged(path))
        return step, state

    def _prepare(self, path: Path) -> None:
        """Makes the directory, free of what a killed run left half-written and of what is no checkpoint at `path`."""
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for left in self.directory.glob("*.orbax-checkpoint-tmp*"):
                _remove(left)
            if os.path.lexists(path) and not path.is_dir():
                path.rename(_damaged(path))

    def _finish(self, path: Path, response: ocp.AsyncResponse, kinds: list[str]) -> None:
        """In the background: waits for the checkpoint, looks for its arrays, digests it, and removes the oldest."""
        response.result()
        if jax.process_index() == 0:
            found = ocp.checkpointables_metadata(path).metadata  # opens every array; None for a part it cannot read
            if _kinds(found) != kinds:
                raise OSError("what was written does not read back")
            lines = (f"{_digest(file)}  {file.relative_to(path).as_posix()}\n" for file in _files(path))
            temporary = path / f"{SUMS}.part"
            temporary.write_text("".join(lines), encoding="utf-8")
            temporary.rename(path / SUMS)
            for step in self.steps()[: -self._keep]:
                _remove(self.directory / str(step))


def steps(workdir: Path) -> list[int]:
    """Of the checkpoints of a run, oldest first."""
    return _steps(_directory(workdir))


def load_params(workdir: Path, abstract: Any, step: int | None = None) -> tuple[Any, int]:
    """The parameters of the newest usable checkpoint, and its step; damaged ones are named in a warning.

    Args:
      workdir: of the run.
      abstract: shapes, dtypes and shardings of the parameters.
      step: of the checkpoint, if it must be this one.

    Raises:
      UsageError: there is no usable checkpoint, or it is of another model.
    """
    return _load(workdir, lambda path: ocp.load_checkpointables(path, {"params": abstract})["params"], step)


def load_state(workdir: Path, abstract: TrainState, step: int) -> TrainState:
    """The whole state that a run saved; arguments and errors as of `load_params`."""
    return _load(workdir, lambda path: _load_state(path, abstract), step)[0]


def _load(workdir: Path, load: Callable[[Path], _T], step: int | None) -> tuple[_T, int]:
    directory = _directory(workdir)
    found = _newest(directory, load, step)
    if found is None:
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UsageError(f"{directory} holds {what}; train first, or name another --workdir.")
    return found[1], found[0]


def _load_state(path: Path, abstract: TrainState) -> TrainState:
    found = ocp.load_checkpointables(path, {"params": abstract.params, "optimizer": _rest(abstract)})
    return TrainState(params=found["params"], **found["optimizer"])


def _directory(workdir: Path) -> Path:
    return Path(workdir).absolute() / "checkpoints"


def _rest(state: TrainState) -> dict[str, Any]:
    """The training state without the parameters."""
    return {"step": state.step, "optimizer": state.optimizer}


def _kinds(parts: dict[str, Any]) -> list[str]:
    """Shapes and dtypes of all arrays, of a state or of what Orbax says of one."""
    return sorted(f"{name} {leaf.shape} {leaf.dtype}" for name in parts for leaf in jax.tree.leaves(parts[name]))


def _steps(directory: Path) -> list[int]:
    """Of the folders that are named as `save` names them: not 0999, digits of other scripts, or 5,000 digits."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be read ({error.strerror}); mend that, or name another --workdir."
        ) from error
    steps = [int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 10]
    return sorted(step for step in steps if str(step) in names and (directory / str(step)).is_dir())


def _damaged(path: Path) -> Path:
    """A free name for a damaged checkpoint: damaged-6, damaged-6-2, ..."""
    name = f"damaged-{path.name}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(place for place in map(path.with_name, names) if not os.path.lexists(place))


def _remove(path: Path) -> None:
    """A folder, or a file or link in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _newest(directory: Path, load: Callable[[Path], _T], only: int | None = None) -> tuple[int, _T, list[Path]] | None:
    """The newest checkpoint that `load` can load: its step, what was loaded, and the damaged ones newer than it.

    With `only`, no other step will do. What process 0 finds on the disk holds for all.
    """
    damaged = {}
    first = jax.process_index() == 0
    steps = [step for step in _steps(directory) if only in (None, step)] if first else []
    for i in range(from_first(len(steps))):
        step = from_first(steps[-1 - i] if first else 0)
        path = directory / str(step)
        problem = _damage(path) if first else "process 0 found it damaged"
        if from_first(problem is None):
            try:
                loaded = load(path)
            except Exception as error:  # Orbax raises many kinds
                what = str(error).splitlines() or [type(error).__name__]
                problem = f"it cannot be loaded ({what[0][:200]})"
                if (path / SUMS).exists():
                    raise UsageError(
                        f"the checkpoint {path} is whole but {problem}; it was made by another model or another "
                        "version. Use the WORKDIR's own config.json and tokenizer.json, or start in a new --workdir."
                    ) from error
            else:
                for bad, what in damaged.items() if first else ():
                    _log.warning("the checkpoint %s is damaged: %s. Step %d is used instead.", bad, what, step)
                return step, loaded, list(damaged)
        damaged[path] = problem
    if damaged:
        what = "; ".join(f"{path}: {problem}" for path, problem in damaged.items())
        raise UsageError(f"no checkpoint is usable ({what}). Restore one from a copy, or start in a new --workdir.")
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint. One without sums, killed before they were written, passes."""
    sums = path / SUMS
    if not os.path.lexists(sums):
        return None
    try:
        listed = dict(line.split("  ", 1)[::-1] for line in sums.read_text(encoding="utf-8").splitlines())
        for name, digest in listed.items():
            file = path / name
            if name.startswith("/") or ".." in Path(name).parts or not file.is_file():
                return f"{name!r} is missing"
            if _digest(file) != digest:
                return f"{name} is not as it was written"
        present = {file.relative_to(path).as_posix() for file in _files(path)}
    except (OSError, ValueError) as error:
        return f"its files cannot be read and compared with {SUMS} ({error})"
    extra = sorted(name for name in present - listed.keys() if not Path(name).name.startswith((".", SUMS)))
    return f"{extra[0]!r} is not in {SUMS}" if extra else None


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
