"""One compiled program per length of rows, from which every measurement is made.

A row is running text from the start of a document. It is scored in one full pass from the empty state, which is
what the model was trained to do, what shards along the sequence over a mesh, and linear in memory in every layer:
no second mechanism is needed for long rows. What is scored, a final block or one answer, stands at the end of
its row; shorter rows are padded at the front, so the scored tokens are always the last columns and rows of
several lengths share a program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from longctx.ops.cross_entropy import cross_entropy
from longctx.parallel import mesh
from longctx.typing import Segments


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the model makes of the last tokens of N rows.

    Attributes:
      losses: `[N, tail]`, -log p(token) in nats.
      correct: `[N, tail]`, true where the token is the most likely of the vocabulary.
    """

    losses: Float[np.ndarray, "N tail"]
    correct: Bool[np.ndarray, "N tail"]


class Scorer:
    """Scores rows with a model, in batches of about equal numbers of tokens.

    Args:
      model: a language model, placed where it is to run; the ambient mesh (`jax.set_mesh`) is used.
      tokens_per_batch: tokens that fit in memory at once; a row longer than that goes alone.
      progress: called with the tokens scored after every batch.
    """

    def __init__(self, model: nnx.Module, tokens_per_batch: int, progress: Callable[[int], object] = lambda _: None):
        graphdef, params = nnx.split(model)
        self._score, self._params = functools.partial(_score, graphdef), nnx.as_pure(params)
        self._tokens_per_batch = tokens_per_batch
        self._progress = progress
        self._programs: dict[tuple[int, int], jax.stages.Compiled] = {}

    def __call__(self, rows: Sequence[Int[np.ndarray, " n"]], length: int, tail: int) -> Scores:
        """Scores the last `tail` tokens of every row.

        Args:
          rows: each of at most `length + 1` tokens and more than `tail`: all but the last are read, all but the
            first may be scored.
          length: tokens a row is padded to.
          tail: tokens scored.
        """
        batch, program = self.batch(length), self.program(length, tail)
        losses, correct = [], []
        for first in range(0, len(rows), batch):
            arrays = self.arrays(rows[first : first + batch], length, tail)
            for out, values in zip((losses, correct), program(self._params, *arrays), strict=True):
                out.append(np.asarray(values))
            self._progress(min(batch, len(rows) - first) * length)
        return Scores(np.concatenate(losses)[: len(rows)], np.concatenate(correct)[: len(rows)])

    def batch(self, length: int) -> int:
        """Rows scored at once; a multiple of the devices that share the batch."""
        devices = mesh.size("data")
        return devices * max(1, self._tokens_per_batch // (length * devices))

    def arrays(self, rows: Sequence[Int[np.ndarray, " n"]], length: int, tail: int):
        """A batch of rows as `(tokens[B, length], positions[B, length], targets[B, tail])`; -1 positions pad."""
        shape = self.batch(length), self._padded(length)
        tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        targets = np.zeros((shape[0], tail), np.int32)
        for i, row in enumerate(rows):
            if not tail < len(row) <= length + 1:
                raise ValueError(f"A row has {len(row)} tokens; to score {tail} it needs {tail + 1} to {length + 1}.")
            read = len(row) - 1
            tokens[i, shape[1] - read :] = row[:-1]
            positions[i, shape[1] - read :] = np.arange(read)
            targets[i] = row[-tail:]
        return tokens, positions, targets

    def program(self, length: int, tail: int) -> jax.stages.Compiled:
        """The compiled program for rows of `length` tokens; call it as `program(params, *arrays)`."""
        key = (length, tail)
        if key not in self._programs:
            self._programs[key] = self.trace(length, tail).lower().compile()
        return self._programs[key]

    def trace(self, length: int, tail: int) -> jax.stages.Traced:
        """The same before it is compiled; shapes serve as the model's parameters.

        Raises:
          ValueError: a layer cannot compute rows of this length, or on this mesh.
        """
        shape = self.batch(length), self._padded(length)
        tokens, targets = (jax.ShapeDtypeStruct(each, np.int32) for each in (shape, (shape[0], tail)))
        # Whole on every device (and so on every process), for the host to read.
        replicated = PartitionSpec() if jax.sharding.get_abstract_mesh().size > 1 else None
        return jax.jit(self._score, out_shardings=replicated).trace(self._params, tokens, tokens, targets)

    def run(self, arrays, length: int, tail: int) -> None:
        """Scores one batch and waits for it, for measurements of time."""
        jax.block_until_ready(self.program(length, tail)(self._params, *arrays))

    @staticmethod
    def _padded(length: int) -> int:
        """`length` rounded up to equal shares for the devices that share a sequence."""
        return -(-length // mesh.context_size()) * mesh.context_size()


def _score(graphdef, params, tokens, positions, targets):
    model = nnx.merge(graphdef, params)
    segments = Segments.from_ids(positions >= 0, positions)
    hidden, _ = model(tokens, segments)
    hidden = hidden[:, -targets.shape[1] :]
    out = cross_entropy(hidden, model.unembedding, targets, jnp.ones(targets.shape, jnp.float32))
    return out.losses, out.correct
