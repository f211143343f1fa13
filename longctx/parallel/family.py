"""What a module of `longctx.ops` must have to be a family of recurrences that devices share."""

from __future__ import annotations

import difflib
import functools
import inspect
import types

NEEDED = ("recurrent", "chunked", "transition", "compose", "apply")
OPTIONAL = ("deferred", "gathers")


@functools.cache
def check(op: types.ModuleType) -> None:
    """Refuses a module that lacks a part of a family, or has one under a name that nobody looks for.

    Raises:
      ValueError: the same. Without this, devices would take turns where they need not, and say nothing.
    """
    functions = [name for name, value in vars(op).items() if inspect.isfunction(value) and name[0] != "_"]
    for name in functions:
        close = difflib.get_close_matches(name, NEEDED + OPTIONAL, n=1, cutoff=0.8)
        if close and name != close[0]:
            raise ValueError(f"{op.__name__} has a function `{name}`; call it `{close[0]}`, or less like that.")
    in_turn = getattr(op, "transition", check) is None
    for name in NEEDED[:2] if in_turn else NEEDED:
        if not hasattr(op, name):
            raise ValueError(
                f"{op.__name__} has no `{name}`; define {', '.join(NEEDED)}, or write `transition = None` where its "
                "states do not compose and devices are to take turns."
            )
