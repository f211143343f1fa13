"""Selective copying (Gu and Dao 2023, arXiv:2312.00752, section 4.1; copying is of Arjovsky et al. 2016).

A row of T tokens: T - M tokens of context, in which M data tokens stand at positions drawn uniformly without repetition
and all else is noise (token 0); then M times the token "write" (1). At the j-th of these, the j-th data token in their
order is asked for. What was written before is not shown: the model must count. For M = 3:

    tokens    0 5 0 0 9 0 0 2 0  1 1 1
    answers                      5 9 2

Mamba has T = 4,096 and a vocabulary of 16: noise, "write" and 14 data tokens.

Rows of one length always have the same amount of noise, and a layer may learn to count it instead of passing it over.
So documents of several lengths may be mixed in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from longctx.data.packing import Row
from longctx.data.synthetic.task import Task, end_to_end, row, short_lengths

NOISE, WRITE = 0, 1


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(Task):
    """Write the data tokens in their order, leaving out the noise."""

    kind: ClassVar[str] = "selective_copying"

    vocab_size: int = 16  # noise, "write", and data tokens
    items: int = 16  # M, data tokens a row
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)  # tokens of the rows tested, positions to write included
    train: tuple[int, ...] = ()  # tokens of the documents that fill the rows trained on; none: one as long as the row

    def problems(self):
        yield from super().problems()
        if self.items < 1:
            yield f"items is {self.items}; give at least 1"
        yield from short_lengths(self.lengths, 2 * self.items)
        yield from short_lengths(self.train, 2 * self.items, "train")
        if self.vocab_size < 4:
            yield f"vocab_size is {self.vocab_size}; noise, 'write' and two data tokens are needed at least"

    def shortest(self) -> int:
        """A document of `train`, or as many positions as items in the context, and to write."""
        return min(self.train, default=2 * self.items)

    def guessing(self, length: int) -> float:
        """One of the data tokens."""
        return 1 / (self.vocab_size - 2)

    def rows(self, rng: np.random.Generator, batch: int, length: int) -> Row:
        """Rows of documents, each of a length drawn from those of `train` that still fit; what is left is padding."""
        if not self.train:
            return self.test_rows(rng, batch, length)
        found = [end_to_end(self._documents(rng, length), length) for _ in range(batch)]
        return {name: np.stack([each[name] for each in found]) for name in found[0]}

    def _documents(self, rng: np.random.Generator, length: int) -> Iterator[Row]:
        """Documents `[1, T]` of at most `length` tokens together."""
        while fitting := [each for each in self.train if each <= length]:
            drawn = int(rng.choice(fitting))
            yield self.test_rows(rng, 1, drawn)
            length -= drawn

    def test_rows(self, rng: np.random.Generator, batch: int, length: int) -> Row:
        """Single documents; see the module."""
        items, context = self.items, length - self.items
        positions = np.stack([rng.choice(context, items, replace=False, shuffle=False) for _ in range(batch)])
        data = rng.integers(2, self.vocab_size, (batch, items), dtype=np.int32)
        tokens = np.full((batch, length), NOISE, np.int32)
        np.put_along_axis(tokens, np.sort(positions, axis=1), data, axis=1)
        tokens[:, context:] = WRITE
        targets, answers = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        targets[:, :-1] = tokens[:, 1:]
        targets[:, context:] = data
        answers[:, context:] = True
        return row(tokens, targets, answers)
