"""Compares runs that were evaluated: one table, with differences from the first run on the very same text.

    python -m longctx.compare runs/attention runs/gla runs/gla-seed1 --out=runs/comparison

Runs that differ by seed alone are one column. `--out` names a folder for the table as Markdown and CSV, and for
pictures of training, of the final block and of needles, as PNG and SVG.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from longctx import commands
from longctx.errors import UsageError
from longctx.evals import compare, compared

_OUT = flags.DEFINE_string("out", None, "A folder for the table as Markdown and CSV, and the pictures.")


def main() -> None:
    given = commands.words()
    if len(given) < 2:
        raise UsageError(f"{len(given)} runs are given; name two or more, such as runs/a runs/b.")
    if len({Path(word).absolute() for word in given}) < len(given):
        raise UsageError(f"a run is given twice ({' '.join(given)}); name each once.")
    if _OUT.value and Path(_OUT.value).exists() and not Path(_OUT.value).is_dir():
        raise UsageError(f"--out={_OUT.value} is a file; name a folder.")
    names = [_name(Path(word).absolute()) for word in given]
    if len(set(names)) < len(names):
        names = [word.rstrip("/") for word in given]
    found = compare.compare([compare.load(Path(word), name) for word, name in zip(given, names, strict=True)])
    print(compared.table(found), flush=True)
    if _OUT.value:
        compared.write(found, Path(_OUT.value))
        print(f"written to {_OUT.value}: comparison.md, comparison.csv and pictures")


def _name(path: Path) -> str:
    """A run has the name of its folder; one of its reports has the run's and its own."""
    return f"{path.parent.name}/{path.name}" if (path / "summary.json").is_file() else path.name


if __name__ == "__main__":
    commands.run(main, words=True)
