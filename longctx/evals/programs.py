"""What a compiled program says of its own cost: the operations of its matrix products, loops included.

XLA's own analysis counts the body of a loop once. Here a body counts as often as the program says that its loop runs,
which it does where that was known while tracing.
"""

from __future__ import annotations

import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


def operations(text: str) -> int:
    """Additions and multiplications of the matrix products of a compiled program.

    Args:
      text: of the program, `compiled.as_text()`; matrix products that XLA hands to a library are not in it.

    Returns:
      2 m n k for each product of `[m, k]` and `[k, n]`, times the runs of the loops around it; of branches the most.

    Raises:
      ValueError: a loop with a matrix product runs a number of times that is known at run time only.
    """
    computations, entry = _parse(text)
    known: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in known:
            known[name] = sum(map(cost, computations[name]))
        return known[name]

    def cost(instruction) -> int:
        op, product, called, trips = instruction
        if op == "dot":
            return product
        inner = [of(name) for name in called]
        if op == "conditional":
            return max(inner, default=0)
        if op == "while" and any(inner):
            if trips is None:
                raise ValueError("a loop with matrix products runs a number of times known at run time only.")
            return trips * sum(inner)
        return sum(inner)

    return of(entry)


def _parse(text: str):
    """`(op, operations if it is a matrix product, computations it calls, runs if it is a loop)` by computation."""
    computations: dict[str, list] = {}
    shapes: dict[str, list[int]] = {}
    entry = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head["name"], [])
            entry = head["name"] if line.startswith("ENTRY") else entry
            shapes = {}
        elif found := _INSTRUCTION.match(line):
            shape = [int(n) for n in re.findall(r"\d+", found["type"].split("[")[-1].split("]")[0])]
            shapes[found["name"]] = shape
            product = 0
            if found["op"] == "dot":
                left = re.search(r"%([\w.\-]+)", found["rest"])[1]
                axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", found["rest"])[1]
                summed = math.prod(shapes[left][int(axis)] for axis in axes.split(",") if axis)
                product = 2 * math.prod(shape) * summed
            called = [
                name.strip(" %") for one, more in _CALLED.findall(found["rest"]) for name in (one or more).split(",")
            ]
            trips = _TRIPS.search(found["rest"])
            current.append((found["op"], product, called, int(trips[1]) if trips else None))
    return computations, entry
