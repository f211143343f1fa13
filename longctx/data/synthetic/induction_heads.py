"""Induction heads (Olsson et al. 2022), as Mamba tests them (Gu and Dao 2023, arXiv:2312.00752, 4.1 and E.1).

A row of T tokens is uniform noise, in which the trigger, token 0, stands once with the content after it, and again at
the very end; the content, to be named there, is the one answer:

    tokens   5 9 0 7 3 3 ... 12 0        answer 7

The noise never is the trigger. Mamba is trained at 256 tokens and tested at 64 to 1,048,576.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from longctx.data.packing import Row
from longctx.data.synthetic.task import Task, row, short_lengths

TRIGGER = 0


@dataclasses.dataclass(frozen=True)
class InductionHeads(Task):
    """Which token followed the trigger?"""

    kind: ClassVar[str] = "induction_heads"

    vocab_size: int = 16  # the trigger, and tokens that are noise or content
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 4096, 16384, 65536)  # tokens of the rows tested

    def problems(self):
        yield from super().problems()
        yield from short_lengths(self.lengths, self.shortest())
        if self.vocab_size < 3:
            yield f"vocab_size is {self.vocab_size}; the trigger and two other tokens are needed at least"

    def shortest(self) -> int:
        """The trigger, the content, the trigger."""
        return 3

    def guessing(self, length: int) -> float:
        """One of the tokens that may follow the trigger."""
        return 1 / (self.vocab_size - 1)

    def rows(self, rng: np.random.Generator, batch: int, length: int) -> Row:
        """See the module; the content stands before the last token."""
        tokens = rng.integers(1, self.vocab_size, (batch, length), dtype=np.int32)
        place, each = rng.integers(0, length - 2, batch), np.arange(batch)
        tokens[each, place] = TRIGGER
        tokens[:, -1] = TRIGGER
        targets, answers = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        targets[:, :-1] = tokens[:, 1:]
        targets[:, -1] = tokens[each, place + 1]
        answers[:, -1] = True
        return row(tokens, targets, answers)
