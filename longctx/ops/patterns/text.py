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
    "RandomBlocks": sparse.RandomBlocks,
    "Blocks": sparse.Blocks,
}
_OPERATORS = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.Add: operator.add}


def parse(text: str) -> Pattern | Heads:
    """The pattern that a text describes: `Window(512) | Sinks(4)`.

    Args:
      text: names of patterns with numbers, `&`, `|`, `+`, `~` and parentheses, with Python's precedence. Several,
        separated by commas, are `Heads`, which take them in turn.

    Raises:
      ValueError: the text is not of this form, or a pattern in it cannot be.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"'{text}' is not a pattern: {error.msg}; write such as 'Window(512) | Sinks(4)'.") from error
    if isinstance(tree, ast.Tuple):
        return Heads(tuple(_pattern(one, text) for one in tree.elts))
    return _pattern(tree, text)


def causal(pattern: Pattern | Heads) -> Pattern | Heads:
    """What `pattern` shows of the query's own token and those before it."""
    if isinstance(pattern, Heads):
        return Heads(tuple(causal(one) for one in pattern.patterns))
    return pattern if isinstance(pattern, bands.Causal) else bands.Causal() & pattern


def _pattern(tree: ast.expr, text: str) -> Pattern:
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        return _OPERATORS[type(tree.op)](_pattern(tree.left, text), _pattern(tree.right, text))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Invert):
        return ~_pattern(tree.operand, text)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in NAMES:
        try:
            values = [ast.literal_eval(one) for one in tree.args]
            return NAMES[tree.func.id](*values, **{one.arg: ast.literal_eval(one.value) for one in tree.keywords})
        except (TypeError, ValueError) as error:
            raise ValueError(f"'{ast.unparse(tree)}' is not a pattern: {error}") from error
    raise ValueError(
        f"'{text}' is not a pattern at '{ast.unparse(tree)}'; write {', '.join(NAMES)} with their numbers, "
        "joined by &, |, + or ~."
    )
