"""Runs next to one another: what each measured, and by how much it differs from the first on the very same text.

The loss of a window depends more on the window than on the model, so that models that differ by little look the same
next to their standard errors. Their difference on the same windows does not hold what windows differ by. With d the
difference of a window, the standard error is that of the mean of d, clustered by document (`statistics.clustered`).

Runs whose configurations differ by seed alone are one column, the mean over them; to the variance of a difference
comes that of the means over seeds, where there are several. Shares of needles and of task rows that are found or
missed alike leave no variance; two halves of a pair each way are added to them (Agresti and Min, "Simple improved
confidence intervals for comparing matched proportions", 2005).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longctx.errors import UsageError
from longctx.evals.statistics import clustered
from longctx.folder import rows as log

FREE = ("seed", "mesh", "checkpoints", "evaluation")  # parts of the configuration that say nothing of the model


@dataclasses.dataclass(frozen=True)
class Item:
    """What one piece of what was measured gave: a window, a document, a needle, a row.

    Attributes:
      value: such as nats.
      cluster: what it hangs together with; pieces of two clusters are independent.
      weight: in the mean.
    """

    value: float
    cluster: Hashable
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run, as its report left it.

    Attributes:
      name: of the column.
      config: of the experiment.
      facts: numbers of its training, by `FACTS`; those that are known.
      origin: its folder, and when and with what code it was measured.
      history: the rows of its training.
      items: by (what, tokens), by identity, what each piece gave; equal identities are the same tokens.
    """

    name: str
    config: dict[str, Any]
    facts: dict[str, float]
    origin: str
    history: list[dict[str, Any]]
    items: dict[tuple[str, int | None], dict[Hashable, Item]]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """A column: one run, or several that differ by seed alone."""

    name: str
    runs: tuple[Run, ...]

    def items(self, key: tuple[str, int | None]) -> dict[Hashable, Item]:
        """Means over the runs of what all of them measured."""
        found = [run.items.get(key, {}) for run in self.runs]
        common = [name for name in found[0] if all(name in items for items in found[1:])]
        return {
            name: dataclasses.replace(found[0][name], value=float(np.mean([items[name].value for items in found])))
            for name in common
        }

    def variance(self, key: tuple[str, int | None], names: Iterable[Hashable]) -> float:
        """Of the mean over seeds; 0 of one run, of which nothing is known."""
        if len(self.runs) < 2:
            return 0.0
        names = list(names)
        means = [_mean([run.items[key][name] for name in names])[0] for run in self.runs]
        return float(np.var(means, ddof=1)) / len(means)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one group measured.

    Attributes:
      value, error: the mean and its standard error, None where none can be said.
      difference, difference_error: from the first group, on what both measured; None where that is nothing.
      pairs, clusters: that the difference is of.
    """

    value: float
    error: float | None
    difference: float | None = None
    difference_error: float | None = None
    pairs: int = 0
    clusters: int = 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
      groups: the columns.
      cells: by (what, tokens), a cell for each group, None where it did not measure this.
      notes: sentences.
    """

    groups: tuple[Group, ...]
    cells: dict[tuple[str, int | None], list[Cell | None]]
    notes: list[str]


BLOCK, BITS, LOSS, NEEDLE, TASK = (
    "final block, nats a token",
    "held-out text, bits a byte",
    "held-out rows, nats an answer",
    "needle accuracy",
    "task accuracy",
)
SHARES = (NEEDLE, TASK)
FACTS = ("parameters", "tokens trained on", "training, tokens/s", "final training loss, nats")


def load(path: Path, name: str) -> Run:
    """A run by its working directory, whose newest report is read, or by the folder of a report.

    Raises:
      UsageError: there is no report, or it does not hold what a comparison is made of.
    """
    folder = path if (path / "summary.json").is_file() else path / "report"
    if not (folder / "summary.json").is_file():
        raise UsageError(
            f"{path} holds no report; give the working directory of a run that was evaluated "
            f"(python -m longctx.evaluate --workdir={path}), or the folder of a report."
        )
    if not (folder / "windows.json").is_file():
        raise UsageError(
            f"{folder} does not hold the losses of windows, windows.json; measure the run anew: "
            f"python -m longctx.evaluate --workdir={folder.parent}"
        )
    try:
        summary, windows = (_json(folder / file) for file in ("summary.json", "windows.json"))
        run, history = summary["run"], log.read(folder.parent)
        origin = f"{run['workdir']}, measured {run['date']}" + (
            f" with commit {run['commit']}" if run["commit"] else ""
        )
        return Run(name, dict(summary["config"]), _facts(summary), origin, history, _items(windows))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UsageError(
            f"the report in {folder} cannot be read ({type(error).__name__}: {error}); measure the run anew: "
            f"python -m longctx.evaluate --workdir={folder.parent}"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    def refuse(constant):
        raise ValueError(f"{file.name} holds {constant}")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def _facts(summary: dict[str, Any]) -> dict[str, float]:
    train = summary["train"]
    values = (
        summary["model"]["parameters"],
        *(train.get(name) for name in ("tokens", "tokens_per_second", "final_loss")),
    )
    return {label: float(value) for label, value in zip(FACTS, values, strict=True) if value is not None}


def _items(windows: dict[str, Any]) -> dict[tuple[str, int | None], dict[Hashable, Item]]:
    """Of windows.json, as `longctx.evals.pieces` describes it; what is not finite (null) is left out."""
    found: dict[tuple[str, int | None], dict[Hashable, Item]] = {}
    block = windows["final_block"]
    for context, losses in block["nats"].items():
        pieces = zip(_apart(block["windows"]), block["documents"], losses, strict=True)
        found[BLOCK, int(context)] = {name: Item(float(nats), of) for name, of, nats in pieces if nats is not None}
    heldout = windows["heldout"]
    if heldout["bytes"] is None:
        pieces = zip(_apart(heldout["names"]), heldout["nats"], heldout["tokens"], strict=True)
        found[LOSS, None] = {name: Item(nats / n, name[0], n) for name, nats, n in pieces if n and nats is not None}
    else:
        pieces = zip(_apart(heldout["names"]), heldout["nats"], heldout["bytes"], strict=True)
        bits = {name: Item(nats / math.log(2) / n, name[0], n) for name, nats, n in pieces if n and nats is not None}
        found[BITS, None] = bits
    for length, needles in windows["needle"].items():
        hits = enumerate(hit for depth in needles["hits"] for hit in depth)
        found[NEEDLE, int(length)] = {(needles["rows"], i): Item(float(hit), i) for i, hit in hits}
    for length, rows in windows["task"].items():
        shares = enumerate(rows["shares"])
        found[TASK, int(length)] = {(rows["rows"], i): Item(share, i) for i, share in shares}
    return {key: items for key, items in found.items() if items}


def _apart(names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Each name with how often it came before: copies of a text are pieces of their own."""
    counted: collections.Counter[str] = collections.Counter()
    for name in names:
        yield name, counted[name]
        counted[name] += 1


def compare(runs: Sequence[Run]) -> Comparison:
    """Of at least one run; the first one's group is what the others differ from."""
    groups = _groups(runs)
    keys = sorted(
        {key for run in runs for key in run.items},
        key=lambda key: ((BLOCK, BITS, LOSS, TASK, NEEDLE).index(key[0]), key[1] or 0),
    )
    notes: dict[str, None] = {}
    cells = {key: [_cell(key, groups[0], group, notes) for group in groups] for key in keys}
    if any(len(group.runs) > 1 for group in groups) and any(len(group.runs) == 1 for group in groups):
        notes["Of columns with one seed it is not known how much seeds differ: their errors are of text alone."] = None
    return Comparison(groups, cells, list(notes))


def _groups(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Runs that differ by seed alone together, in the order of their first."""
    groups: list[list[Run]] = []
    for run in runs:
        fits = (group for group in groups if all(_alike(run, other) for other in group))
        group = next(fits, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return tuple(Group(_title(group), tuple(group)) for group in groups)


def _alike(one: Run, other: Run) -> bool:
    """Whether their configurations differ by seed, and by nothing else that makes a model."""
    first, second = ({k: v for k, v in run.config.items() if k not in FREE} for run in (one, other))
    return bool(first) and first == second and one.config.get("seed") != other.config.get("seed")


def _title(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{runs[0].name} ({len(runs)} seeds)"


def _cell(key: tuple[str, int | None], base: Group, group: Group, notes: dict[str, None]) -> Cell | None:
    items = group.items(key)
    if not items:
        return None
    share = key[0] in SHARES
    value, error = _mean(items.values())
    if share:
        error = math.sqrt(_agresti(value, len(items)))
    error = _with_seeds(error, group.variance(key, items))
    if group is base:
        return Cell(value, error)
    others = base.items(key)
    common = [name for name in items if name in others]
    if not common:
        if others:
            notes[_refusal(key[0], base, group)] = None
        return Cell(value, error)
    if len(common) < max(len(items), len(others)):
        notes[
            f"{key[0]}: '{group.name}' differs from '{base.name}' by what is given on {len(common)} pieces that both "
            f"measured, of {len(items)} and {len(others)}."
        ] = None
    pairs = [dataclasses.replace(items[name], value=items[name].value - others[name].value) for name in common]
    difference, spread = _mean(pairs)
    if share:  # each pair its own cluster
        n, differ = len(pairs), sum(pair.value**2 for pair in pairs)
        spread = math.sqrt(differ + 1 - (n * difference) ** 2 / (n + 2)) / (n + 2)
    spread = _with_seeds(spread, group.variance(key, common) + base.variance(key, common))
    return Cell(value, error, difference, spread, len(common), len({pair.cluster for pair in pairs}))


def _refusal(what: str, base: Group, group: Group) -> str:
    if what == BITS:
        return f"'{group.name}' and '{base.name}' were measured on other held-out text: nothing of it is compared."
    return (
        f"{what}: '{group.name}' was not measured on the pieces of '{base.name}' (another tokenizer, other held-out "
        "text, or other lengths), so that no difference is given; bits a byte compare tokenizers on the same text."
    )


def _mean(items: Iterable[Item]) -> tuple[float, float | None]:
    """The weighted mean and its standard error over clusters."""
    items = list(items)
    values, weights = (np.array([getattr(item, name) for item in items]) for name in ("value", "weight"))
    return clustered(values, [item.cluster for item in items], weights)


def _agresti(share: float, trials: int) -> float:
    """The variance of a share, two trials of each kind added to it, so that it is not 0 at 0 and 1."""
    share, trials = (share * trials + 2) / (trials + 4), trials + 4
    return share * (1 - share) / trials


def _with_seeds(error: float | None, variance: float) -> float | None:
    return error if error is None else math.sqrt(error**2 + variance)
