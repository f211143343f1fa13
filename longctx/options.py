"""The layers, and every option that an experiment can have, with its type, its default and what it means.

    python -m longctx.options                       # all of them: the page docs/layers.md
    python -m longctx.options attention yarn        # some kinds
    python -m longctx.options my_layers.py mine     # a layer of your own

Options are written in an experiment file, or on the command line as --config.model.blocks.NAME.mixer.heads=8.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import architecture, config, plugins
from longctx.data import TASKS
from longctx.errors import UsageError
from longctx.layers import MIXERS, MLPS
from longctx.layers.basic import QKNorm
from longctx.layers.positions import Positions
from longctx.ops.patterns.text import NAMES as PATTERNS
from longctx.schema import options_of

NOTATION = (
    "H heads, G heads of keys and values, K and V their widths, D the model's width, F a hidden width, N a state's "
    "size, T tokens of a row, C of a chunk or mini-batch, W of a window, L of the trained length."
)
# Parts of an experiment that are there whatever is chosen.
PARTS = {
    "experiment": config.Experiment,
    "model": config.Model,
    "group": architecture.Group,
    "block": architecture.Block,
    "norm": architecture.Norm,
    "qk_norm": QKNorm,
    "embedding": architecture.Embedding,
    "training": config.Training,
    "stage": config.Stage,
    "mesh": config.Mesh,
    "checkpoints": config.Checkpoints,
    "evaluation": config.Evaluation,
    "needles": config.Needles,
}


def groups() -> dict[str, Mapping[str, Any]]:
    """Everything that has options, by name, in groups."""
    return {
        "parts of an experiment": PARTS,
        "model.blocks.NAME.mixer": MIXERS,
        "model.blocks.NAME.mlp": MLPS,
        "positions of attention": Positions.kinds,
        "data": {config.Data.kind: config.Data, **TASKS},
        "patterns of attention": PATTERNS,
    }


FOLLOWS = "as many as make the model's width, at least the default"


_PAGE = """# Layers and options

`python -m longctx.options` prints this page from the registries of layers and their docstrings;
`python -m longctx.options attention yarn` prints some kinds. Options are written in an experiment file, or on the
command line as `--config.model.blocks.NAME.mixer.heads=8`.

In the tables, *bytes* is the whole state of the layer with its default options, D = 64, after 1,024 tokens in float32.
*Transition* is what a span does to the state, and *devices* what crosses the devices that share a sequence, in numbers
a device sends forward; P devices. Every mixer has a short convolution (`conv_width`), off where its paper has none; it
adds its last inputs to the state and log₂P hops of them.
"""


def page() -> str:
    """The layers by group, then the options of everything, in Markdown."""
    tables: dict[str, list[str]] = {}
    for name, cls in (MIXERS | MLPS).items():
        row = [f"[`{name}`](#{name})", said(cls, "Layer"), said(cls, "State") or "none", f"{_state_bytes(cls):,}"]
        row += [said(cls, "Transition"), said(cls, "Devices")]
        tables.setdefault(said(cls, "Group") or "MLPs", []).append(f"| {' | '.join(row)} |")
    head = ["| `kind` | layer | state | bytes | transition | devices |", "|---|---|---|---:|---|---|"]
    lines = [_PAGE, *textwrap.wrap(NOTATION, 120), ""]
    for group, rows in tables.items():
        lines += [f"## {group[0].upper()}{group[1:]}", "", *head, *rows, ""]
    for title, group in groups().items():
        lines += [f"## `{title}`" if "NAME" in title else f"## {title[0].upper()}{title[1:]}", ""]
        for name, cls in group.items():
            lines += [f"### {name}", "", "```text", _described(name, cls, whole=True).rstrip(), "```", ""]
    return "\n".join(lines)


def said(cls: type, name: str) -> str:
    """What a layer's docstring, else its module's, says behind `NAME:`; a "Layer" is what the module's begins with."""
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    if name == "Layer":
        return (module if "Group:" in module else inspect.getdoc(cls)).split("\n\n")[0].split(" as a")[0].rstrip(".,")
    for text in (inspect.getdoc(cls) or "", module):
        if found := re.search(rf"\b{name}: (.*?)(?=\n[A-Z]\w+: |\n\n|\Z)", text, re.DOTALL):
            return " ".join(found[1].split()).rstrip(".").replace("|", "\\|")
    return ""


def _state_bytes(cls: type) -> int:
    state = jax.eval_shape(lambda: cls(64, cls.Config(), nnx.Rngs(params=0)).init_state(1, 1024, jnp.float32))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def listed(names: list[str]) -> str:
    """The options of these kinds; all there is to know without any.

    Raises:
      UsageError: there is no such kind.
    """
    known = {name: cls for group in groups().values() for name, cls in group.items()}
    if unknown := [name for name in names if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        advice = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known)}"
        raise UsageError(f"'{unknown[0]}' is no kind; {advice}")
    if not names:
        return page()
    return "\n".join([*(_described(name, known[name]) for name in names), *textwrap.wrap(NOTATION, 120), ""])


def meanings(cls: type) -> dict[str, str]:
    """What the comment behind each field of a dataclass says, or that above it; of fields that it inherits too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _comments(base)
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(cls)}


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # made without a file
        return {}
    tokens = [one for one in tokenize.generate_tokens(io.StringIO(source).readline) if one.type == tokenize.COMMENT]
    comments = {one.start[0]: one.string.lstrip("# ") for one in tokens}
    alone = {one.start[0] for one in tokens if one.line.lstrip().startswith("#")}
    found = {}
    for field in ast.parse(source).body[0].body:
        if isinstance(field, ast.AnnAssign):
            above = list(itertools.takewhile(lambda line: line in alone, range(field.lineno - 1, 0, -1)))[::-1]
            lines = [line for line in range(field.lineno, field.end_lineno + 1) if line in comments] or above
            found[field.target.id] = " ".join(comments[line] for line in lines)
    return found


def _described(name: str, cls: Any, whole: bool = False) -> str:
    """A title with what the docstring begins with, or the whole of it, and a line for each option."""
    about = inspect.getdoc(cls) or ""
    if whole:
        lines = [*textwrap.indent(about, "    ").splitlines(), ""] if about else []
    else:
        about = " ".join(about.split("\n\n")[0].split())
        lines = textwrap.wrap(about, 100, initial_indent="    ", subsequent_indent="    ")
    rows = [*_rows(cls)]
    widths = [max((min(len(row[i]), 40) for row in rows), default=0) for i in range(2)]
    lines += [f"    {one:{widths[0]}}  {two:{widths[1]}}  {meaning}".rstrip() for one, two, meaning in rows]
    return "\n".join([f"{name}{inspect.signature(cls) if name in PATTERNS else ''}", *lines, ""])


def _rows(cls: Any) -> Iterator[tuple[str, str, str]]:
    options = options_of(cls)
    if not dataclasses.is_dataclass(options) or cls in PATTERNS.values():
        return
    meaning = meanings(options)
    for field in dataclasses.fields(options):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = "required" if required else _shown(field)
        kind = re.sub(r"\b(Tokens|Seed|Size|Taps)\b", "int", str(field.type).replace("Text", "str"))
        more = f"; left out, {FOLLOWS}" if field.name in config.following(options) else ""
        yield f"{field.name}: {kind}", default, meaning[field.name] + more


def _shown(field: dataclasses.Field) -> str:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if isinstance(default, tuple) and default and dataclasses.is_dataclass(default[0]):
        default = tuple(dataclasses.astuple(one) for one in default)
    if not dataclasses.is_dataclass(default):
        return f"= {default!r}"
    if not hasattr(default, "kind"):
        return "= its defaults"
    changed = {one.name: getattr(default, one.name) for one in dataclasses.fields(default)}
    changed = {name: value for name, value in changed.items() if value != getattr(type(default)(), name)}
    return f"= { ({'kind': default.kind} | changed)!r}"


def main() -> int:
    parser = argparse.ArgumentParser(
        "longctx.options", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", nargs="*", help="a kind or a part of an experiment; or a file with layers of your own")
    given = parser.parse_args().name
    try:
        plugins.load(name for name in given if name.endswith(".py"))
        print(listed([name for name in given if not name.endswith(".py")]), end="")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the list has gone, as `head` does
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
