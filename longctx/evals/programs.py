"""What a program says of its own cost: operations of its matrix products, bytes of its collectives, loops included.

XLA's own analysis counts the body of a loop once. Here a body counts as often as its loop runs, which a compiled
program says where that was known while tracing. Programs compiled for a CPU, a GPU and a TPU are understood.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all|reduce-scatter)"
    r"(-start)?"
)


class _Instruction(NamedTuple):
    name: str
    type: str
    op: str
    rest: str  # operands and attributes

    @property
    def called(self) -> list[str]:
        """Computations that it runs; of a loop the body."""
        return [name.strip(" %") for one, more in _CALLED.findall(self.rest) for name in (one or more).split(",")]


def operations(text: str) -> int:
    """Additions and multiplications of the matrix products of a compiled program.

    Args:
      text: of a program for a CPU, `compiled.as_text()`; matrix products that XLA hands to a library are not in it.

    Returns:
      2 m n k for each product of `[m, k]` and `[k, n]`, times the runs of the loops around it; of branches the most.

    Raises:
      ValueError: a loop with a matrix product runs a number of times that is known at run time only.
    """
    computations, entry = _parse(text)

    def product(instruction: _Instruction, inside: Mapping[str, _Instruction]) -> int:
        if instruction.op != "dot":
            return 0
        left = _sizes(inside[re.search(r"%([\w.\-]+)", instruction.rest)[1]].type)
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        summed = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
        return 2 * math.prod(_sizes(instruction.type)) * summed

    return _total(computations, entry, product, "matrix products")


def collectives(text: str, devices: int) -> dict[str, int]:
    """Bytes that a device sends in one run of a compiled program, by kind of collective.

    Of n devices and an array of s bytes, the whole one where parts are gathered or scattered, a device sends
    s (n - 1) / n for an all-gather, a reduce-scatter or an all-to-all, twice that for an all-reduce, and all of its
    array, s, in a permutation: what rings take, and no scheme takes less.

    Args:
      text: of the program, `compiled.as_text()`.
      devices: that it runs on.

    Raises:
      ValueError: a loop with a collective runs a number of times that is known at run time only.
    """
    computations, entry = _parse(text)
    kinds = {
        found[1] for body in computations.values() for x in body.values() if (found := _COLLECTIVE.fullmatch(x.op))
    }

    def of(kind: str) -> int:
        def sent(instruction: _Instruction, inside: Mapping[str, _Instruction]) -> float:
            found = _COLLECTIVE.fullmatch(instruction.op)
            if found is None or found[1] != kind:
                return 0
            return _sent(kind, bool(found[2]), instruction, _group(instruction.rest, devices))

        return int(_total(computations, entry, sent, "collectives"))

    return {kind: of(kind) for kind in sorted(kinds)}


def _sent(kind: str, start: bool, instruction: _Instruction, group: int) -> float:
    """Bytes that a device of `group` sends for one collective; `start`: its type has operands beside the results."""
    size = _bytes(instruction.type)
    if kind == "collective-permute":
        return size / 2 if start else size
    if kind == "reduce-scatter":
        size *= group / (group + 1) if start else group
    elif start and kind != "all-reduce":
        size *= group / (group + 1) if kind == "all-gather" else 1 / 2
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) / group


def _group(rest: str, devices: int) -> int:
    """Devices that a collective runs over, as its attributes say."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return devices


def _sizes(kind: str) -> list[int]:
    """`f32[2,3]{1,0}` as `[2, 3]`."""
    return [int(size) for size in _ARRAY.search(kind)[2].split(",") if size]


def _bytes(kind: str) -> int:
    """Of all arrays of a type, such as `(f32[2,3]{1,0}, u32[])`; scalars that a tuple has beside are no data."""
    arrays = _ARRAY.findall(kind)
    found = 0
    for name, sizes in arrays:
        if sizes or len(arrays) == 1 or name.startswith(("f", "bf")):
            found += math.prod(int(size) for size in sizes.split(",") if size) * _width(name)
    return found


def _width(name: str) -> int:
    """Bytes of a number of XLA's type `name`."""
    return 1 if name == "pred" else max(1, int(re.search(r"\d+", name)[0]) // 8)


def _total(computations, entry: str, own: Callable[[_Instruction, Mapping], float], what: str) -> float:
    """The sum of `own` over all that `entry` runs: loops as often as they run, of branches the most."""
    known: dict[str, float] = {}

    def of(name: str) -> float:
        if name not in known:
            body = computations[name]
            known[name] = sum(cost(instruction, body) for instruction in body.values())
        return known[name]

    def cost(instruction: _Instruction, inside) -> float:
        found = own(instruction, inside)
        if _under_way(instruction):
            return found
        inner = [of(name) for name in instruction.called]
        if instruction.op == "conditional":
            return max(inner, default=0)
        if instruction.op == "while" and any(inner):
            return _trips(instruction, computations, what) * sum(inner)
        return found + sum(inner)

    return of(entry)


def _under_way(instruction: _Instruction) -> bool:
    """Whether what it calls repeats a collective that another instruction began: a TPU's work while that goes on."""
    return instruction.name.startswith("async-collective-done") or any(
        name.startswith("async_collective_fusion") for name in instruction.called
    )


def _trips(loop: _Instruction, computations, what: str) -> int:
    """How often a loop runs: what it says, or the constant below which its condition keeps a count from 0 by 1."""
    if found := _TRIPS.search(loop.rest):
        return int(found[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    compared = [x for x in condition.values() if x.op == "compare" and "direction=LT" in x.rest]
    bounds = [
        condition[name]
        for x in compared
        for name in re.findall(r"%([\w.\-]+)", x.rest.split(")")[0])
        if condition[name].op == "constant"
    ]
    if len(bounds) != 1:
        raise ValueError(f"a loop with {what} runs a number of times known at run time only.")
    return int(bounds[0].rest.split(")")[0])


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Instructions by name, by computation, and the name of the computation that is the program."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head["name"], {})
            entry = head["name"] if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            current[found["name"]] = _Instruction(*found.groups())
    return computations, entry
