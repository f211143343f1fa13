"""What every synthetic task is, and what their rows have in common."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from longctx.data.packing import Row
from longctx.schema import Options


class Task(Options, abc.ABC):
    """A task's options, and its rows; subclasses are frozen dataclasses.

    Attributes:
      kind: its name in `config.data.kind`.
      vocab_size: tokens are below it.
      lengths: tokens of the rows that evaluation measures, each once.
    """

    kind: ClassVar[str]
    vocab_size: int
    lengths: tuple[int, ...]

    def fingerprint(self) -> dict[str, Any]:
        """As of a corpus; a task's rows follow from its options and the seed."""
        return {"vocab_size": self.vocab_size}

    def differences(self, found: Mapping[str, Any], trained: bool = True) -> list[str]:
        """What differs from another fingerprint, in sentences."""
        del trained
        size = found.get("vocab_size")
        return [] if size == self.vocab_size else [f"vocab_size: {size} then, {self.vocab_size} now"]

    @abc.abstractmethod
    def rows(self, rng: np.random.Generator, batch: int, length: int) -> Row:
        """Rows to train on, `[batch, length]` each, as `data.packing` describes them; loss on the answers alone."""

    def test_rows(self, rng: np.random.Generator, batch: int, length: int) -> Row:
        """Rows to evaluate on, for one of `lengths`: each a single document without padding."""
        return self.rows(rng, batch, length)

    @abc.abstractmethod
    def guessing(self, length: int) -> float:
        """Accuracy in test rows of `length` tokens of guessing among what may be an answer."""

    @abc.abstractmethod
    def shortest(self) -> int:
        """Tokens that a row must have at least."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the options."""
        if not self.lengths or len(set(self.lengths)) < len(self.lengths):
            yield f"lengths is {self.lengths}; give lengths to be tested, each once"


_TESTS = 2**32 - 1  # stands where training has the number of a stage


def training_rng(seed: int, stage_index: int, i: int) -> np.random.Generator:
    """The random numbers of row i of a stage of training."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stage_index, i)))


def heldout_rng(seed: int, length: int) -> np.random.Generator:
    """The random numbers of test rows of one length, which no row of training shares."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_TESTS, length)))


def row(tokens: np.ndarray, targets: np.ndarray, answers: np.ndarray) -> Row:
    """Single documents `[batch, T]` as a row: tokens, what follows each, and where that is asked for."""
    return {
        "tokens": tokens.astype(np.int32),
        "targets": targets.astype(np.int32),
        "weights": answers.astype(np.float32),
        "answers": answers,
        "segment_ids": np.ones(tokens.shape, np.int32),
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape).copy(),
    }


def end_to_end(documents: Iterable[Row], length: int) -> Row:
    """Documents, some `[n, T]` of each length T, after one another as one row `[length]`; what is left is padding."""
    found, count = list(documents), 0
    for some in found:
        n = len(some["tokens"])
        some["segment_ids"] = some["segment_ids"] * np.arange(count + 1, count + n + 1, dtype=np.int32)[:, None]
        count += n
    joined = {name: np.concatenate([some[name].reshape(-1) for some in found]) for name in found[0]}
    return {name: np.pad(array, (0, length - len(array))) for name, array in joined.items()}


def short_lengths(lengths: tuple[int, ...], shortest: int, name: str = "lengths") -> Iterator[str]:
    """A problem if one of `lengths` is below `shortest`."""
    if lengths and min(lengths) < shortest:
        yield f"{name} is {lengths}; rows of these options have at least {shortest} tokens"
