"""Patterns as experiment files have them: written as text, and causal."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

from longctx.ops.patterns import bands, sparse
from longctx.ops.patterns.algebra import Heads, Pattern

NAMES: dict[str, Callable[..., Pattern]] = {
    "Causal": bands.Causal,
    "Window": bands.Window,
    "Chunked": bands.Chunked,
    "ShiftedGroups": bands.ShiftedGroups,
    "Strided": sparse.Strided,
    "Fixed": sparse.Fixed,
    "Dilated": sparse.Dilated,
    "Sinks": sparse.Sinks,
    "Global": sparse.Global,
    "Keys": sparse.Keys,
    "Queries": sparse.Queries,
    "RandomBlocks": sparse.RandomBlocks,
    "Blocks": sparse.Blocks,
}
_LETTERS = 4096  # of a text
# Names and signs of one head's pattern: what is distributed over unions doubles with each.
_PARTS, _COUNTED = 32, (ast.Call, ast.BinOp, ast.UnaryOp)
_OPERATORS = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.Add: operator.add}


def parse(text: str | Pattern | Heads) -> Pattern | Heads:
    """The pattern that a text describes: `Window(512) | Sinks(4)`; a pattern is returned as it is.

    Args:
      text: names of patterns with numbers, `&`, `|`, `+`, `~` and parentheses, with Python's precedence. Several,
        separated by commas, are `Heads`, which take them in turn.

    Raises:
      ValueError: the text is not of this form, or a pattern in it cannot be.
    """
    if isinstance(text, Pattern | Heads):
        return text
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not a pattern; give one, or a text such as 'Window(512) | Sinks(4)'.")
    if len(text) > _LETTERS:
        raise ValueError(f"a pattern of {len(text):,} letters is too long; write at most {_LETTERS:,}.")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        parts = max(sum(isinstance(node, _COUNTED) for node in ast.walk(one)) for one in _heads(tree) or [tree])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = getattr(error, "msg", None) or str(error) or "it is too deep"
        raise ValueError(f"'{_cut(text)}' is not a pattern: {why}; write such as 'Window(512) | Sinks(4)'.") from error
    if parts > _PARTS:
        raise ValueError(f"a pattern of {parts} names and signs is too large; write at most {_PARTS} for a head.")
    return Heads(tuple(_pattern(one, text) for one in _heads(tree))) if _heads(tree) else _pattern(tree, text)


def causal(pattern: Pattern | Heads) -> Pattern | Heads:
    """What `pattern` shows of the query's own token and those before it."""
    if isinstance(pattern, Heads):
        return Heads(tuple(causal(one) for one in pattern.patterns))
    return pattern if isinstance(pattern, bands.Causal) else bands.Causal() & pattern


def _heads(tree: ast.expr) -> list[ast.expr]:
    """The patterns that are separated by commas; none if there is no comma."""
    return tree.elts if isinstance(tree, ast.Tuple) else []


def _number(tree: ast.expr) -> object:
    try:
        return ast.literal_eval(tree)
    except ValueError as error:
        raise ValueError(f"'{_cut(ast.unparse(tree))}' is no number") from error


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}..."


def _pattern(tree: ast.expr, text: str) -> Pattern:
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        return _OPERATORS[type(tree.op)](_pattern(tree.left, text), _pattern(tree.right, text))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Invert):
        return ~_pattern(tree.operand, text)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in NAMES:
        try:
            return NAMES[tree.func.id](*map(_number, tree.args), **{k.arg: _number(k.value) for k in tree.keywords})
        except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"'{_cut(ast.unparse(tree))}' is not a pattern: {error}") from error
    raise ValueError(
        f"'{_cut(text)}' is not a pattern at '{_cut(ast.unparse(tree))}'; write {', '.join(NAMES)} with their numbers, "
        "joined by &, |, + or ~."
    )
