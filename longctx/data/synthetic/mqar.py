"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv:2312.04927).

A document of T tokens begins with N pairs of a key and its value. After them, at even distances, each key stands once
more, and there, as the next token, its value is asked for; the value is not shown:

    tokens   k1 v1 k2 v2 k3 v3  k2 . . . k1 . . . . . k3 .
    answers                     v2       v1           v3

Keys are tokens 1 to V/2 - 1, values tokens V/2 to V - 1, each drawn without repetition. Key i is asked for in the
2g-th token after the pairs, with its gap g below (T - 2N) / 2 drawn without repetition, p(g) ∝ (g + 1)^(a - 1), a =
0.01: most are asked for soon. Positions without a key hold filler: token 0, or any token but 0 and the document's keys.
(In Zoology random filler may equal a key, whose value is then ambiguous.)

Zoology trains on a mixture of lengths and numbers of pairs, and tests up to (1024, 256). Here each row draws one of
`train` and is filled with documents of it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from longctx.data.packing import Row
from longctx.data.synthetic.task import Task, end_to_end, row
from longctx.schema import Options

FILLER = 0


@dataclasses.dataclass(frozen=True)
class Setting(Options):
    """How long a document is, and how many pairs it holds; (length, pairs) in an experiment file."""

    length: int  # T, even
    pairs: int  # N, at most T / 4

    def problems(self):
        if self.pairs < 1 or self.length % 2 or 4 * self.pairs > self.length:
            yield f"length is {self.length} and pairs is {self.pairs}; give an even length of at least 4 tokens a pair"


@dataclasses.dataclass(frozen=True)
class MQAR(Task):
    """Which value stood after this key?"""

    kind: ClassVar[str] = "mqar"

    vocab_size: int = 8192  # V: filler, keys in the lower half, values in the upper
    # Documents trained on, (length, pairs) each; a row draws one of them and is filled with such.
    train: tuple[Setting, ...] = tuple(Setting(*each) for each in ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64)))
    # Documents tested, each length once.
    test: tuple[Setting, ...] = tuple(
        Setting(*each) for each in ((64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
    )
    power: float = 0.01  # a: of the law of the gaps; 1 draws them uniformly
    random_filler: bool = True  # tokens that are no key of the document, rather than token 0

    def problems(self):
        keys = self.vocab_size // 2 - 1
        if not self.train:
            yield "train is empty; give at least one (length, pairs)"
        if not self.test or len(set(self.lengths)) < len(self.lengths):
            yield f"test is {self.test}; give (length, pairs), each length once"
        if any(setting.pairs > keys for setting in (*self.train, *self.test)):
            yield f"vocab_size is {self.vocab_size}, which has {max(keys, 0)} keys; give a larger one, or fewer pairs"
        if self.power <= 0:
            yield f"power is {self.power}; it must be above 0"

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(setting.length for setting in self.test)

    def shortest(self) -> int:
        """The longest document of `train`."""
        return max((setting.length for setting in self.train), default=0)

    def guessing(self, length: int) -> float:
        """One of the document's values."""
        return 1 / self._test(length).pairs

    def rows(self, rng: np.random.Generator, batch: int, length: int) -> Row:
        """Each row is filled with documents of one setting of `train`, drawn for the row; what is left is padding."""
        found = [self._filled(rng, self.train[i], length) for i in rng.integers(len(self.train), size=batch)]
        return {name: np.stack([each[name] for each in found]) for name in found[0]}

    def test_rows(self, rng: np.random.Generator, batch: int, length: int) -> Row:
        """Single documents of the setting in `test` that has this length."""
        return self._documents(rng, batch, self._test(length))

    def _test(self, length: int) -> Setting:
        return next(setting for setting in self.test if setting.length == length)

    def _filled(self, rng, setting: Setting, length: int) -> Row:
        """One row `[length]` of documents end to end."""
        return end_to_end([self._documents(rng, length // setting.length, setting)], length)

    def _documents(self, rng, batch: int, setting: Setting) -> Row:
        length, pairs, half = setting.length, setting.pairs, self.vocab_size // 2
        keys = _distinct(rng, 1, half, batch, pairs)
        values = _distinct(rng, half, self.vocab_size, batch, pairs)
        # The first N of a random order in which p(g) says who comes early: the order of log p(g) + Gumbel noise.
        law = (self.power - 1) * np.log(np.arange(1, (length - 2 * pairs) // 2 + 1))
        order = np.argsort(-(law + rng.gumbel(size=(batch, len(law)))), axis=1)
        positions = 2 * pairs + 2 * order[:, :pairs]
        tokens = self._filler(rng, keys, length)
        tokens[:, 0 : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = values
        np.put_along_axis(tokens, positions, keys, axis=1)
        targets, answers = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        targets[:, :-1] = tokens[:, 1:]
        np.put_along_axis(targets, positions, values, axis=1)
        np.put_along_axis(answers, positions, True, axis=1)
        return row(tokens, targets, answers)

    def _filler(self, rng, keys: np.ndarray, length: int) -> np.ndarray:
        shape = (len(keys), length)
        if not self.random_filler:
            return np.full(shape, FILLER, np.int32)
        others = np.ones((len(keys), self.vocab_size), bool)
        others[:, FILLER] = False
        np.put_along_axis(others, keys, False, axis=1)
        allowed = np.nonzero(others)[1].reshape(len(keys), -1)
        return np.take_along_axis(allowed, rng.integers(allowed.shape[1], size=shape), axis=1).astype(np.int32)


def _distinct(rng, low: int, high: int, batch: int, count: int) -> np.ndarray:
    """`[batch, count]` numbers from `low` to `high` - 1, distinct in each row."""
    return rng.permuted(np.tile(np.arange(low, high), (batch, 1)), axis=1)[:, :count]
