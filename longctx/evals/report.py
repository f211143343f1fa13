"""WORKDIR/report: summary.json, windows.json, pictures, a page that needs nothing else, and a table for terminals."""

from __future__ import annotations

import base64
import html
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from longctx.evals.plots import Picture, pictures
from longctx.folder import rows as log

INTERVALS = "In brackets are intervals at 95 % (Wilson's) of what was counted."


def write(workdir: Path, summary: dict[str, Any], windows: dict[str, Any], name: str = "report") -> Path:
    """Writes a report beside its place and moves it there: no reader finds half of one.

    Args:
      workdir: of the run; metrics.jsonl in it gives the curves of training.
      summary: what `evaluate` measured; it holds no number that is not finite.
      windows: what it measured of each piece of text, see `longctx.evals.pieces`; likewise.
      name: of the report's folder. What has that name already is kept as `name.1`, `name.2`, ..., the oldest first.

    Returns:
      The folder WORKDIR/name.

    Raises:
      ValueError: a number is not finite.
    """
    texts = {
        "summary.json": json.dumps(summary, indent=2, allow_nan=False) + "\n",
        "windows.json": json.dumps(windows, allow_nan=False) + "\n",
    }
    report, partial = workdir / name, workdir / f".{name}.partial"
    _remove(partial)
    partial.mkdir(parents=True)
    drawn = list(pictures(summary, log.read(workdir)))
    for picture in drawn:
        (partial / f"{picture.name}.png").write_bytes(picture.light)
    for file, text in texts.items():
        (partial / file).write_text(text, encoding="utf-8")
    (partial / "report.html").write_text(page(summary, drawn), encoding="utf-8")
    if os.path.lexists(report):
        number = next(n for n in itertools.count(1) if not os.path.lexists(workdir / f"{name}.{n}"))
        os.replace(report, workdir / f"{name}.{number}")
    os.replace(partial, report)
    return report


def _remove(path: Path) -> None:
    """Whatever it is, that a killed evaluation left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What was measured, by number of tokens: a heading and rows of text."""
    task, needle, perplexity = summary.get("task", {}), summary["needle"], summary["perplexity"]

    def shares(found, name, interval, counts, what):
        return {
            n: f"{_share(value, found[interval][n])}, {counts[n]} {what}" for n, value in found.get(name, {}).items()
        }

    columns = {
        "accuracy": shares(task, "accuracy", "interval", task.get("rows"), "rows"),
        "rows without a mistake": shares(task, "whole", "whole_interval", task.get("rows"), "rows"),
        "needle accuracy": shares(
            needle, "accuracy", "interval", dict.fromkeys(needle["accuracy"], needle.get("asked")), "asked"
        ),
        "perplexity of final block": {
            n: _with_error(value, perplexity["standard_error"][n], ".2f")
            for n, value in perplexity["final_block"].items()
        },
        "tokens/s": {n: f"{found['tokens_per_second']:,.0f}" for n, found in summary["speed"].items()},
        "peak memory": {n: f"{found['peak_bytes'] / 2**20:,.0f} MiB" for n, found in summary["speed"].items()},
    }
    columns = {name: column for name, column in columns.items() if column}
    lengths = sorted({int(length) for column in columns.values() for length in column})
    cells = [[f"{n:,}", *(column.get(str(n), "") for column in columns.values())] for n in lengths]
    return ["tokens", *columns], cells


def _share(value: float, interval: list[float]) -> str:
    """With its interval at 95 %."""
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _with_error(value: float | None, error: float | None, form: str) -> str:
    """A value with its standard error, where there is one."""
    if value is None:
        return "not finite"
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form}}"


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
    heldout = summary["heldout"]
    if corpus := summary["corpus"]:
        size = f"{corpus['tokens']:,} tokens in {corpus['documents']:,} documents, {corpus['epochs']:,.3g} epochs"
        found.append(("corpus", size))
    text = "bits_per_byte" in heldout
    loss = _with_error(heldout["loss"], heldout["standard_error"], ".4f")
    found.append(("held-out loss", f"{loss} nats {'a token' if text else 'an answer'}"))
    if text:
        bits = _with_error(heldout["bits_per_byte"], heldout["bits_per_byte_standard_error"], ".4f")
        found.append(("the same in bits a byte", bits))
    if task := summary.get("task"):
        longest = max(task["accuracy"], key=int)
        label = f"accuracy in {task['kind']} at {int(longest):,} tokens (guessing: {task['guessing'][longest]:.0%})"
        found.append((label, _share(task["accuracy"][longest], task["interval"][longest])))
    if needle["accuracy"]:
        longest = max(needle["accuracy"], key=int)
        label = f"needle accuracy at {int(longest):,} tokens (guessing: {needle['guessing']:.0%})"
        found.append((label, _share(needle["accuracy"][longest], needle["interval"][longest])))
    if gain:
        label = f"perplexity saved by {gain['to']:,} tokens of context over {gain['from']:,}"
        found.append((label, _with_error(gain["fraction"], gain["standard_error"], ".1%")))
    device = summary["device"]
    found.append(("device", f"{device['count']} x {device['kind']}"))
    found.append(("time of this evaluation", f"{summary['evaluation']['seconds']:,.0f} s"))
    return found


def source(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the report comes from: labels and values."""
    run, versions = summary["run"], summary["versions"]
    commit = f", commit {run['commit']}" if run["commit"] else ""
    return [
        ("workdir", run["workdir"]),
        ("date", run["date"]),
        ("command", run["command"]),
        *([("trained by", run["trained"])] if run["trained"] not in (None, run["command"]) else []),
        ("versions", f"longctx {versions['longctx']}{commit}, jax {versions['jax']}, Python {versions['python']}"),
    ]


def table(summary: dict[str, Any]) -> str:
    """The headline and the measurements as text for a terminal."""
    labels = [("run", summary["run"]["name"]), *source(summary), *facts(summary)]
    width = max(len(label) for label, _ in labels)
    lines = [f"{label:<{width}}  {value}" for label, value in labels]
    lines += ["", *aligned(*rows(summary))]
    if "interval" in summary.get("task", {}) | summary["needle"]:
        lines += ["", INTERVALS]
    lines += ["", *(f"Note: {note}" for note in summary["notes"])] if summary["notes"] else []
    return "\n".join(lines)


def aligned(heading: list[str], cells: list[list[str]]) -> list[str]:
    """A table as lines of equal width, its columns ranged right."""
    widths = [max(len(cell) for cell in column) for column in zip(heading, *cells, strict=True)]
    table = (heading, ["─" * width for width in widths], *cells)
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in table]


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
    name = text(summary["run"]["name"])
    origin = "".join(f"<tr><td>{text(label)}</td><td>{text(value)}</td></tr>" for label, value in source(summary))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: longctx report</title>
<style>{_CSS}</style>
</head>
<body>
<header><h1>{name}</h1><table class=plain>{origin}</table></header>
<main>
<dl class=tiles>{tiles}</dl>
{notes}
<section><h2>By length</h2>
<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p class=soft>{INTERVALS} ± are standard errors.</p></section>
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
header .plain { font-size: .85rem; margin-bottom: 1rem; }
.plain td { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
.soft, figcaption { color: var(--soft); font-size: .88rem; margin-top: .6rem; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.4; }
summary { cursor: pointer; color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 0 2.5rem; }
"""
