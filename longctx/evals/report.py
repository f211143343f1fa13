"""WORKDIR/report: summary.json, the pictures, a page that needs nothing else, and a table for the terminal."""

from __future__ import annotations

import base64
import html
import json
import os
import shutil
from pathlib import Path
from typing import Any

from longctx.evals.plots import Picture, pictures


def write(workdir: Path, summary: dict[str, Any]) -> Path:
    """Writes the report beside its place and moves it there: no reader finds half of one.

    Args:
      workdir: of the run; metrics.jsonl in it gives the curves of training.
      summary: what `evaluate` measured.

    Returns:
      The folder WORKDIR/report.
    """
    report, partial, old = (workdir / name for name in ("report", ".report.partial", ".report.old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    drawn = list(pictures(summary, history(workdir)))
    for picture in drawn:
        (partial / f"{picture.name}.png").write_bytes(picture.light)
    (partial / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (partial / "report.html").write_text(page(summary, drawn), encoding="utf-8")
    if report.exists():
        os.replace(report, old)
    os.replace(partial, report)
    shutil.rmtree(old, ignore_errors=True)
    return report


def history(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, those of whole steps; none if there is no such file."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What was measured, by number of tokens: a heading and rows of text."""
    task, needle, perplexity = summary.get("task", {}), summary["needle"], summary["perplexity"]

    def with_error(values, errors, form):
        return {length: f"{value:{form}} ± {errors[length]:{form}}" for length, value in values.items()}

    columns = {
        "accuracy": with_error(task.get("accuracy", {}), task.get("standard_error"), ".1%"),
        "rows without a mistake": {
            n: f"{share:.1%} of {task['rows'][n]}" for n, share in task.get("whole", {}).items()
        },
        "needle accuracy": with_error(needle["accuracy"], needle.get("standard_error"), ".1%"),
        "perplexity of final block": with_error(perplexity["final_block"], perplexity.get("standard_error"), ".2f"),
        "tokens/s": {n: f"{found['tokens_per_second']:,.0f}" for n, found in summary["speed"].items()},
        "peak memory": {n: f"{found['peak_bytes'] / 2**20:,.0f} MiB" for n, found in summary["speed"].items()},
    }
    columns = {name: column for name, column in columns.items() if column}
    lengths = sorted({int(length) for column in columns.values() for length in column})
    cells = [[f"{n:,}", *(column.get(str(n), "") for column in columns.values())] for n in lengths]
    return ["tokens", *columns], cells


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The headline: labels and values."""
    train, needle, gain = summary["train"], summary["needle"], summary["perplexity"].get("gain")
    found = [
        ("parameters", f"{summary['model']['parameters']:,}"),
        ("trained length", f"{summary['model']['trained_length']:,} tokens"),
    ]
    for key, label, form in (
        ("tokens", "tokens trained on", "{:,.0f}"),
        ("wall_seconds", "time of training", "{:,.0f} s"),
        ("tokens_per_second", "speed of training", "{:,.0f} tokens/s"),
        ("final_loss", "final training loss", "{:.3f} nats"),
    ):
        if train.get(key) is not None:
            found.append((label, form.format(train[key])))
    if task := summary.get("task"):
        longest = max(task["accuracy"], key=int)
        label = f"accuracy in {task['kind']} at {int(longest):,} tokens (guessing: {task['guessing'][longest]:.0%})"
        found.append((label, f"{task['accuracy'][longest]:.1%}"))
    if needle["accuracy"]:
        longest = max(needle["accuracy"], key=int)
        label = f"needle accuracy at {int(longest):,} tokens (guessing: {needle['guessing']:.0%})"
        found.append((label, f"{needle['accuracy'][longest]:.1%}"))
    if gain:
        label = f"perplexity saved by {gain['to']:,} tokens of context over {gain['from']:,}"
        found.append((label, f"{gain['fraction']:.1%} ± {gain['standard_error']:.1%}"))
    device = summary["device"]
    found.append(("device", f"{device['count']} x {device['kind']}"))
    found.append(("time of this evaluation", f"{summary['evaluation']['seconds']:,.0f} s"))
    return found


def table(summary: dict[str, Any]) -> str:
    """The headline and the measurements as text for a terminal."""
    labels = facts(summary)
    width = max(len(label) for label, _ in labels)
    lines = [f"{label:<{width}}  {value}" for label, value in labels]
    heading, cells = rows(summary)
    widths = [max(len(cell) for cell in column) for column in zip(heading, *cells, strict=True)]
    lines.append("")
    for row in (heading, ["─" * width for width in widths], *cells):
        lines.append("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    lines += ["", *(f"Note: {note}" for note in summary["notes"])] if summary["notes"] else []
    return "\n".join(lines)


def page(summary: dict[str, Any], drawn: list[Picture]) -> str:
    """The report as one HTML page, its pictures inside it."""
    heading, cells = rows(summary)
    text = html.escape
    tiles = "".join(f"<div><dt>{text(label)}</dt><dd>{text(value)}</dd></div>" for label, value in facts(summary))
    notes = "".join(f"<p class=note>{text(note)}</p>" for note in summary["notes"])
    head = "".join(f"<th scope=col>{text(cell)}</th>" for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    versions = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in summary["versions"].items())
    device = "".join(f"<tr><td>{text(k)}</td><td>{text(str(v))}</td></tr>" for k, v in summary["device"].items())
    config = text(json.dumps(summary["config"], indent=2))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>longctx report</title>
<style>{_CSS}</style>
</head>
<body>
<header><h1>longctx report</h1></header>
<main>
<dl class=tiles>{tiles}</dl>
{notes}
<section><h2>By length</h2>
<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>
{"".join(map(_figure, drawn))}
<section><h2>Configuration</h2>
<details><summary>The experiment as it was run</summary><pre>{config}</pre></details></section>
<section class=pair><div><h2>Versions</h2><table class=plain>{versions}</table></div>
<div><h2>Device</h2><table class=plain>{device}</table></div></section>
</main>
</body>
</html>
"""


def _figure(picture: Picture) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (picture.light, picture.dark))
    return (
        f"<section><h2>{html.escape(picture.title)}</h2><figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(picture.title)}"></picture>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure></section>\n"
    )


_CSS = """
:root { --paper: #ffffff; --page: #f6f7f9; --ink: #24292f; --soft: #5b6570; --line: #dfe3e8; --note: #fff6e0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161b22; --page: #0d1117; --ink: #dfe4ea; --soft: #98a2ad; --line: #30363d; --note: #2d2614; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main { max-width: 54rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 2rem 0 1rem; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
section, .tiles > div { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
section { padding: 1rem 1.25rem; margin: 1rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .6rem; margin: 0; }
.tiles > div { padding: .6rem .9rem; display: flex; flex-direction: column; justify-content: space-between; }
dt { color: var(--soft); font-size: .8rem; line-height: 1.3; }
dd { margin: .25rem 0 0; font-size: 1.05rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.note { background: var(--note); border-radius: 8px; padding: .6rem .9rem; margin: 1rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
.plain td:first-child { text-align: left; color: var(--soft); }
.plain td { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .6rem; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.4; }
summary { cursor: pointer; color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 0 2.5rem; }
"""
