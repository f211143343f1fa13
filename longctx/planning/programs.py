"""The cost of a compiled program: operations of its matrix products, bytes of its collectives and of its memory.

XLA's own analysis counts the body of a loop once. Here a body counts as often as its loop runs, which a compiled
program says where that was known while tracing. Programs compiled for a CPU, a GPU and a TPU are understood.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_ELSEWHERE = re.compile(r"\b\w+\[[\d,]*\]\{[^{}]*S\([1-9]\d*\)\}")  # an array on the chip or in the host's memory
STEPS = re.compile(r"at_most_(\d+)_steps")  # the scope of a loop that ends at run time, see longctx.ops.blockwise
_ENTERED = ("while", "conditional", "call")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all|reduce-scatter)"
    r"(-start)?"
)


class Instruction(NamedTuple):
    """A line of a compiled program.

    Attributes:
      name: of the result.
      type: of the result.
      op: such as "dot".
      rest: operands and attributes.
    """

    name: str
    type: str
    op: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def called(self) -> list[str]:
        """Computations that it runs; of a loop the body."""
        return [name.strip(" %") for one, more in _CALLED.findall(self.rest) for name in (one or more).split(",")]


class Run(NamedTuple):
    """An instruction that a program runs, and that amounts to something.

    Attributes:
      instruction: what runs.
      amount: of one time.
      times: it runs.
      open: whether that is in a loop whose rounds are known at run time only; of these one counts.
    """

    instruction: Instruction
    amount: float
    times: int
    open: bool


def operations(text: str) -> int:
    """Additions and multiplications of the matrix products of a compiled program.

    Args:
      text: of a program for a CPU, `compiled.as_text()`; matrix products that XLA passes to a library are not in it.

    Returns:
      2 m n k for each product of `[m, k]` and `[k, n]`, times the runs of the loops around it; of branches the most.

    Raises:
      ValueError: a loop with a matrix product runs a number of times that is known at run time only.
    """

    def product(instruction: Instruction, inside: Mapping[str, Instruction]) -> int:
        if instruction.op != "dot":
            return 0
        left = _sizes(inside[instruction.operands[0]].type)
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        summed = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
        return 2 * math.prod(_sizes(instruction.type)) * summed

    return int(_total(_runs(*parse(text), product), "matrix products"))


def messages(text: str, devices: int) -> list[Run]:
    """The collectives of a compiled program, and the bytes that a device sends for each.

    Of n devices and an array of s bytes, the whole one where parts are gathered or scattered, a device sends
    s (n - 1) / n for an all-gather, a reduce-scatter or an all-to-all, twice that for an all-reduce, and all of its
    array, s, in a permutation: what rings take, and no scheme takes less.

    Args:
      text: of the program, `compiled.as_text()`.
      devices: that it runs on.
    """

    def sent(instruction: Instruction, inside: Mapping[str, Instruction]) -> float:
        found = _COLLECTIVE.fullmatch(instruction.op)
        return _sent(found[1], bool(found[2]), instruction, _group(instruction.rest, devices)) if found else 0

    return _runs(*parse(text), sent)


def collectives(text: str, devices: int) -> dict[str, int]:
    """Bytes that a device sends in one run of a compiled program, by kind of collective; arguments as of `messages`.

    Raises:
      ValueError: a loop with a collective runs a number of times that is known at run time only.
    """
    kinds: dict[str, list[Run]] = {}
    for run in messages(text, devices):
        kinds.setdefault(run.instruction.op.removesuffix("-start"), []).append(run)
    return {kind: int(_total(kinds[kind], "collectives")) for kind in sorted(kinds)}


def moved(text: str, share: float = 1.0) -> int:
    """Bytes that a device reads from its memory and writes to it in one run of a compiled program.

    Every instruction reads its operands and writes its results, but for what it leaves alone of them: a slice reads its
    result, an update in place writes what is new, and so they do inside a fusion, whose other values stay on the chip.
    Arrays that the compiler keeps on the chip count for nothing.

    Args:
      text: of the program, `compiled.as_text()`.
      share: of the rounds that the scope of a loop allows, those that it makes, if they are known at run time only; a
        loop without such a scope counts once.
    """
    computations, entry = parse(text)

    def reads(name: str, index: int) -> float:
        """Bytes that a fused computation reads of its parameter `index`."""
        inside = computations[name]
        found = [x for x in inside.values() if x.op == "parameter" and x.rest.startswith(f"{index})")]
        return read_of(found[0], inside) if found else 0

    def read_of(value: Instruction, inside: Mapping[str, Instruction]) -> float:
        """Bytes that the users of a value read of it, the value itself at most."""
        whole, total = _held(value.type), 0.0
        if value is list(inside.values())[-1]:  # it leaves the computation as it is
            return whole
        for user in inside.values():
            for place in [i for i, operand in enumerate(user.operands) if operand == value.name]:
                if user.op in ("slice", "dynamic-slice", "gather") and place == 0:
                    total += _held(user.type)
                elif user.op == "dynamic-update-slice" and place == 0:
                    continue
                elif user.op == "bitcast":
                    total += read_of(user, inside)
                elif user.op == "fusion":
                    total += reads(user.called[0], place)
                else:
                    return whole
        return min(whole, total)

    def written(value: Instruction, inside: Mapping[str, Instruction]) -> float:
        """Bytes that a computation writes for a value that leaves it."""
        if value.op == "tuple":
            return sum(written(inside[name], inside) for name in value.operands)
        if value.op == "dynamic-update-slice":
            return _held(inside[value.operands[1]].type)
        if value.op == "bitcast" and value.operands[0] in inside:
            return written(inside[value.operands[0]], inside)
        if value.op == "fusion":
            inner = computations[value.called[0]]
            return written(list(inner.values())[-1], inner)
        return 0 if value.op in ("parameter", "constant") else _held(value.type)

    def amount(instruction: Instruction, inside: Mapping[str, Instruction]) -> float:
        op = instruction.op
        if op in _FREE or op in _ENTERED or op.endswith(("-done", "-update")) or "AllocateBuffer" in instruction.rest:
            return 0
        if instruction.name.startswith("async-collective-done"):
            return 0
        if op == "fusion" or (op.endswith("-start") and instruction.called):
            name = instruction.called[0]
            last = list(computations[name].values())[-1]
            own = [_held(inside[operand].type) for operand in instruction.operands]
            return sum(min(size, reads(name, i)) for i, size in enumerate(own)) + written(last, computations[name])
        if op.endswith("-start"):
            return _held(instruction.type)
        if op in ("slice", "dynamic-slice", "gather"):
            return 2 * _held(instruction.type)
        if op == "dynamic-update-slice":
            return 2 * _held(inside[instruction.operands[1]].type)
        return _held(instruction.type) + sum(_held(inside[x].type) for x in instruction.operands if x in inside)

    def entered(instruction: Instruction) -> list[str]:
        return instruction.called if instruction.op in _ENTERED else []

    def rounds(loop: Instruction) -> int | None:
        found = STEPS.findall(loop.rest)
        return max(1, round(share * int(found[-1]))) if found else None

    return int(sum(run.amount * run.times for run in _runs(computations, entry, amount, entered, rounds)))


def _held(kind: str) -> int:
    """Bytes of a type's arrays in the device's memory."""
    return _bytes(_ELSEWHERE.sub("", kind))


def _sent(kind: str, start: bool, instruction: Instruction, group: int) -> float:
    """Bytes that a device of `group` sends for one collective; `start`: its type has operands beside the results."""
    size = _bytes(instruction.type)
    if kind == "collective-permute":
        return size / 2 if start else size
    if kind == "reduce-scatter":
        size *= group / (group + 1) if start else group
    elif start and (kind != "all-reduce" or instruction.type.startswith("((")):  # a sum of older XLA: the results alone
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


def _total(runs: list[Run], what: str) -> float:
    if any(run.open for run in runs):
        raise ValueError(f"a loop with {what} runs a number of times known at run time only.")
    return sum(run.amount * run.times for run in runs)


def _runs(
    computations: Mapping[str, Mapping[str, Instruction]],
    entry: str,
    amount: Callable[[Instruction, Mapping[str, Instruction]], float],
    entered: Callable[[Instruction], list[str]] = lambda instruction: instruction.called,
    rounds: Callable[[Instruction], int | None] = lambda loop: None,
) -> list[Run]:
    """What a program runs that has an `amount`: in loops as often as they run, of branches those with the most.

    Args:
      computations, entry: from `parse`.
      amount: of one run of an instruction, by itself and the instructions of its computation.
      entered: the computations of an instruction that are looked into.
      rounds: of a loop that ends at run time.
    """

    @functools.cache
    def of(name: str) -> list[Run]:
        inside = computations[name]
        return [run for instruction in inside.values() for run in at(instruction, inside)]

    def at(instruction: Instruction, inside: Mapping[str, Instruction]) -> list[Run]:
        own = amount(instruction, inside)
        found = [Run(instruction, own, 1, False)] if own else []
        if _under_way(instruction):
            return found
        inner = [_scattered(name, of(name)) for name in entered(instruction)]
        if instruction.op == "conditional":
            return max(inner, key=lambda branch: sum(run.amount * run.times for run in branch), default=[])
        found += itertools.chain(*inner)
        if instruction.op == "while" and found:
            trips = _trips(instruction, computations)
            trips = rounds(instruction) if trips is None else trips
            if trips is None:
                return [run._replace(open=True) for run in found]
            return [run._replace(times=run.times * trips) for run in found]
        return found

    return of(entry)


def _under_way(instruction: Instruction) -> bool:
    """Whether what it calls repeats a collective that another instruction began: a TPU's work while that goes on."""
    return instruction.name.startswith("async-collective-done") or any(
        name.startswith("async_collective_fusion") for name in instruction.called
    )


def _scattered(name: str, runs: list[Run]) -> list[Run]:
    """A TPU's scattered sums as what they are: to the eye sums over all, of which each device then takes a part."""
    if not name.startswith("all-reduce-scatter"):
        return runs
    return [
        run._replace(instruction=run.instruction._replace(op="reduce-scatter"), amount=run.amount / 2)
        if run.instruction.op == "all-reduce"
        else run
        for run in runs
    ]


def _trips(loop: Instruction, computations) -> int | None:
    """How often a loop runs: what it says, or the constant below which its condition keeps a count from 0 by 1.

    None where that is known at run time only.
    """
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
    return int(bounds[0].rest.split(")")[0]) if len(bounds) == 1 else None


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Instructions by name, by computation, and the name of the computation that is the program."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head["name"], {})
            entry = head["name"] if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            current[found["name"]] = Instruction(*found.groups())
    return computations, entry
