"""State tracking: words over a group of permutations (Liu et al. 2022, arXiv:2210.10749; Merrill et al. 2024,
arXiv:2404.08819; Grazzi et al. 2024, arXiv:2411.12537).

Token x_t is an element of the group, drawn uniformly, and at every position the product so far is asked for:

    s_t = x_1 · x_2 ⋯ x_t,    (a · b)[i] = b[a[i]]: first a, then b

The group is that of all permutations of n symbols, numbered in lexicographic order, so that 0 is the identity:

- "parity" (n = 2): is the number of ones so far odd? A diagonal recurrence needs a negative eigenvalue.
- "s3": not commutative, solvable; products of reflections do it.
- "s5": not solvable, complete for NC¹: no layer whose transitions are diagonal can, and none of fixed depth in TC⁰.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import ClassVar

import numpy as np

from longctx.data.packing import Row
from longctx.data.synthetic.task import Task, row, short_lengths

SYMBOLS = {"parity": 2, "s3": 3, "s4": 4, "s5": 5}


@dataclasses.dataclass(frozen=True)
class StateTracking(Task):
    """What is the product of the word so far?"""

    kind: ClassVar[str] = "state_tracking"

    group: str = "s3"  # "parity", "s3", "s4" or "s5"
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)  # tokens of the rows tested

    def problems(self):
        yield from super().problems()
        yield from short_lengths(self.lengths, self.shortest())
        if self.group not in SYMBOLS:
            yield f"group is '{self.group}'; choose one of {', '.join(SYMBOLS)}"

    @property
    def vocab_size(self) -> int:
        """Elements of the group: 2, 6, 24 or 120."""
        return math.factorial(SYMBOLS[self.group])

    def shortest(self) -> int:
        return 1

    def guessing(self, length: int) -> float:
        """One of the elements."""
        return 1 / self.vocab_size

    def rows(self, rng: np.random.Generator, batch: int, length: int) -> Row:
        """See the module."""
        tokens = rng.integers(self.vocab_size, size=(batch, length), dtype=np.int32)
        return row(tokens, products(tokens, multiplication(SYMBOLS[self.group])), np.ones(tokens.shape, bool))


@functools.cache
def multiplication(symbols: int) -> np.ndarray:
    """`table[a, b]`, the number of a · b."""
    elements = np.array(list(itertools.permutations(range(symbols))))
    ranks = symbols ** np.arange(symbols)  # of a permutation as a number, unique
    number = np.zeros(symbols**symbols, np.int32)
    number[elements @ ranks] = np.arange(len(elements))
    return number[elements[:, elements].transpose(1, 0, 2) @ ranks]


def products(tokens: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The products of all beginnings of the words `[batch, T]`, by doubling the span that each position covers."""
    found, reach = tokens, 1
    while reach < tokens.shape[1]:
        found = np.concatenate([found[:, :reach], table[found[:, :-reach], found[:, reach:]]], axis=1)
        reach *= 2
    return found
