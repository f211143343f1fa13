"""A comparison as a table, a Markdown page, records of numbers, and pictures."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from longctx.evals import plots, report
from longctx.evals.compare import BLOCK, FACTS, NEEDLE, SHARES, TASK, Cell, Comparison, Group, Run
from longctx.evals.statistics import wilson

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#24292f")  # after Okabe and Ito
LINES = ("-", "--", "-.", ":")
FORMS = ("png", "svg")


def write(found: Comparison, folder: Path) -> None:
    """Writes comparison.md, comparison.csv and the pictures, each as PNG and SVG, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = dict(pictures(found))
    for name, draw in drawn.items():
        for form in FORMS:
            (folder / f"{name}.{form}").write_bytes(plots.save(draw, plots.LIGHT, form))
    (folder / "comparison.md").write_text(markdown(found, drawn), encoding="utf-8")
    with (folder / "comparison.csv").open("w", encoding="utf-8", newline="") as file:
        lines = records(found)
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """The one table: a heading and rows of text."""
    heading = ["measured", "tokens", *(group.name for group in found.groups)]
    cells = []
    for label in FACTS:
        values = [[run.facts.get(label) for run in group.runs] for group in found.groups]
        if any(value is not None for of_group in values for value in of_group):
            form = "{:.3f}" if "loss" in label else "{:,.0f}"
            texts = ("" if None in of_group else form.format(np.mean(of_group)) for of_group in values)
            cells.append([label, "", *texts])
    for (what, tokens), of_groups in found.cells.items():
        texts = ["" if cell is None else _text(cell, what in SHARES) for cell in of_groups]
        cells.append([what, "" if tokens is None else f"{tokens:,}", *texts])
    return heading, cells


def _text(cell: Cell, share: bool) -> str:
    form, plus = (".1%", "+.1%") if share else (".4f", "+.4f")
    if cell.difference is None:
        return f"{cell.value:{form}}"
    error = "" if cell.difference_error is None else f" ± {cell.difference_error:{form}}"
    return f"{cell.value:{form}} ({cell.difference:{plus}}{error})"


def explanation(found: Comparison) -> str:
    """How the table is read."""
    return (
        f"In brackets: the difference from '{found.groups[0].name}' on the same text, ± its standard error over "
        "documents (of shares, over rows); below 0 is better of losses and bits, above 0 of accuracies."
    )


def table(found: Comparison) -> str:
    """For a terminal."""
    lines = report.aligned(*rows(found))
    return "\n".join([*lines, "", explanation(found), *(f"Note: {note}" for note in found.notes)])


def markdown(found: Comparison, pictures: Iterable[str]) -> str:
    """The same as Markdown, with its pictures by name."""
    heading, cells = rows(found)

    def line(cells):
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    lines = ["# Comparison", "", line(heading), line(["---", *["---:"] * (len(heading) - 1)]), *map(line, cells)]
    lines += ["", explanation(found), *(f"\n{note}" for note in found.notes)]
    lines += [f"\n![{name}]({name}.svg)" for name in pictures]
    for group in found.groups:
        lines += [f"\n{group.name}:\n", *(f"- {run.origin}" for run in group.runs)]
    return "\n".join(lines) + "\n"


def records(found: Comparison) -> list[Mapping[str, Any]]:
    """A record for every cell, for a CSV file; numbers as they are."""
    fields = [field.name for field in dataclasses.fields(Cell)]
    return [
        {"measured": what, "tokens": tokens, "run": group.name, "seeds": len(group.runs)}
        | {name: getattr(cell, name) for name in fields}
        for (what, tokens), cells in found.cells.items()
        for group, cell in zip(found.groups, cells, strict=True)
        if cell is not None
    ]


def pictures(found: Comparison) -> Iterator[tuple[str, Callable[[Figure, plots.Style], None]]]:
    """Names, and what draws them; those for which there is something to show."""
    looks = dict(zip(found.groups, itertools.cycle(itertools.product(LINES, COLORS)), strict=False))
    if any(run.history for group in found.groups for run in group.runs):
        yield "training", lambda figure, style: _training(figure, looks)
    for what, name, draw in (
        (BLOCK, "final_block", _final_block),
        (NEEDLE, "needles", _shares),
        (TASK, "task", _shares),
    ):
        cells = {tokens: of_groups for (measured, tokens), of_groups in found.cells.items() if measured == what}
        if cells:
            yield name, lambda figure, style, draw=draw, cells=cells, what=what: draw(figure, looks, cells, what)


Looks = Mapping[Group, tuple[str, str]]


def _training(figure: Figure, looks: Looks) -> None:
    """Running means of every run's loss; held-out losses as dots."""
    axes = figure.subplots()
    for group, (line, color) in looks.items():
        for i, run in enumerate(group.runs):
            steps, losses = _curve(run, "loss")
            if len(steps):
                label = group.name if i == 0 else None
                single = "o" if len(steps) == 1 else None
                axes.plot(*plots.running_mean(steps, losses), line, color=color, marker=single, label=label)
            axes.plot(*_curve(run, "heldout_loss"), "o", color=color, markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats)")
    plots.number_axis(axes.xaxis, whole=True)
    plots.number_axis(axes.yaxis)
    _legend(figure, axes)


def _curve(run: Run, name: str):
    """Steps and values of the rows that have this one."""
    found = [(row["step"], row[name]) for row in run.history if isinstance(row.get(name), int | float)]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], float)


def _final_block(figure: Figure, looks: Looks, cells: Mapping[int, list[Cell | None]], what: str) -> None:
    """Perplexities on the left, differences in nats with their errors on the right."""
    left, right = figure.subplots(1, 2)
    for i, (group, (line, color)) in enumerate(looks.items()):
        of_group = {tokens: column[i] for tokens, column in sorted(cells.items()) if column[i] is not None}
        values = np.exp([min(cell.value, 700) for cell in of_group.values()])
        left.plot(list(of_group), values, line, color=color, marker="o", label=group.name)
        paired = {tokens: cell for tokens, cell in of_group.items() if cell.difference is not None}
        errors = [0 if cell.difference_error is None else cell.difference_error for cell in paired.values()]
        differences = [cell.difference for cell in paired.values()]
        right.errorbar(
            list(paired), differences, errors, linestyle=line, color=color, marker="o", capsize=3, elinewidth=1
        )
    right.axhline(0, color=next(iter(looks.values()))[1], linewidth=1)
    left.set(title="perplexity of the final block", xlabel="tokens of context")
    right.set(title="difference, nats", xlabel="tokens of context")
    for axes in (left, right):
        plots.number_axis(axes.yaxis)
        plots.length_axis(axes, list(cells))
    _legend(figure, left)


def _shares(figure: Figure, looks: Looks, cells: Mapping[int, list[Cell | None]], what: str) -> None:
    """Accuracies with intervals at 95 %, side by side at each length."""
    axes = figure.subplots()
    for i, (group, (line, color)) in enumerate(looks.items()):
        of_group = {tokens: column[i] for tokens, column in sorted(cells.items()) if column[i] is not None}
        values = np.array([cell.value for cell in of_group.values()])
        edges = np.array([wilson(cell.value, len(group.items((what, tokens)))) for tokens, cell in of_group.items()])
        bars = np.maximum([values - edges[:, 0], edges[:, 1] - values], 0) if len(values) else None
        beside = 2 ** (min(0.12, 0.6 / len(looks)) * (i - (len(looks) - 1) / 2))  # so that equal ones are apart
        lengths = [tokens * beside for tokens in of_group]
        axes.errorbar(
            lengths, values, bars, linestyle=line, color=color, marker="o", capsize=3, elinewidth=1, label=group.name
        )
    axes.set(xlabel="tokens", ylabel=what, ylim=(-0.03, 1.05), yticks=np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    plots.length_axis(axes, list(cells))
    _legend(figure, axes)


def _legend(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), fontsize=9)
