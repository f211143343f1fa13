"""Does the model solve its synthetic task? Accuracy of the answers by the length of rows, in new rows.

Rows are read in spans, the state passed from each to the next, as a prompt is: a million tokens need the memory of one
span and the state. One program serves every length at least as long as a span, unless the state grows with the length.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from longctx import data
from longctx.evals.statistics import independent, wilson
from longctx.ops.cross_entropy import cross_entropy
from longctx.parallel import mesh
from longctx.typing import Segments

SPAN = 1024  # tokens of a row a call, at most
FEWEST = 4  # rows of a length, at least


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the model makes of N rows of one length.

    Attributes:
      correct: `[N]`, the fraction of the row's answers that have the largest logit.
      rows: a digest of the rows' tokens.
      loss: nats, mean over the answers.
      answers: in all rows.
      tokens_per_second: of reading, compilation and the making of rows not counted.
      peak_bytes: of a call on one device, by the compiler's account.
    """

    correct: Float[np.ndarray, " N"]
    rows: str
    loss: float
    answers: int
    tokens_per_second: float
    peak_bytes: int


class Reader:
    """Reads rows span by span and counts right answers.

    Args:
      model: a language model, placed where it is to run; the ambient mesh (`jax.set_mesh`) is used.
      tokens_per_call: tokens that fit in memory at once.
      progress: called with the tokens read, after every call.
    """

    def __init__(self, model: nnx.Module, tokens_per_call: int, progress: Callable[[int], object] = lambda _: None):
        graphdef, params = nnx.split(model)
        self._params = nnx.as_pure(params)
        self._tokens_per_call, self._progress = tokens_per_call, progress
        # Counts whole on every device (and so on every process), for the host to read.
        whole = PartitionSpec() if jax.sharding.get_abstract_mesh().size > 1 else None
        read, init = (functools.partial(each, graphdef) for each in (_read, _init))
        self._read = jax.jit(read, donate_argnums=2, out_shardings=(whole, None))
        self._init = jax.jit(init, static_argnums=(1, 2))
        self._programs: dict = {}

    def of(self, params: object) -> Reader:
        """The same programs, for other parameters of the same model, as `nnx.as_pure` gives them."""
        other = copy.copy(self)
        other._params = params
        return other

    def measure(self, task: data.Task, length: int, samples: int, seed: int) -> Measured:
        """Reads `samples` rows of a task.

        Args:
          task: whose test rows are read.
          length: of them; one of the task's `lengths`.
          samples: rows.
          seed: equal seeds give equal rows.
        """
        span, batch, capacity = self._sizes(length, samples)
        rng = data.heldout_rng(seed, length)
        counts, seconds, peak, digest = [], 0.0, 0, hashlib.blake2b(digest_size=8)
        for first in range(0, samples, batch):
            row = task.test_rows(rng, batch, length)
            digest.update(row["tokens"][: samples - first].tobytes())
            state = self._init(self._params, batch, capacity)
            sums = np.zeros((3, batch))
            for piece in _spans(row, span):
                program = self._program(piece, state)
                start = time.perf_counter()
                found, state = program(self._params, piece, state)
                sums += np.asarray(found)
                seconds += time.perf_counter() - start
                self._progress(min(batch, samples - first) * int(np.sum(piece[1][0] >= 0)))
            counts.append(sums[:, : samples - first])
            memory = program.memory_analysis()
            peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        hits, asked, loss = np.concatenate(counts, axis=1)
        speed = len(counts) * batch * length / seconds
        return Measured(
            hits / asked, digest.hexdigest(), float(loss.sum() / asked.sum()), int(asked.sum()), speed, peak
        )

    def trace(self, length: int, samples: int) -> None:
        """Traces what `measure` will run, without arrays: shapes serve as the model's parameters.

        Raises:
          ValueError: a layer cannot read rows of this length, or on this mesh.
        """
        span, batch, capacity = self._sizes(length, samples)
        dtypes = (np.int32, np.int32, np.int32, np.bool_)
        piece = tuple(jax.ShapeDtypeStruct((batch, span), dtype) for dtype in dtypes)
        state = self._init.eval_shape(self._params, batch, capacity)
        self._read.trace(self._params, piece, state)

    def _program(self, piece, state) -> jax.stages.Compiled:
        """Compiled once for all spans and states that are alike."""
        key = piece[0].shape, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(state))
        if key not in self._programs:
            self._programs[key] = self._read.lower(self._params, piece, state).compile()
        return self._programs[key]

    def _sizes(self, length: int, samples: int) -> tuple[int, int, int]:
        """Tokens of a span, rows of a call, and tokens that a state has room for."""
        span = -(-min(SPAN, length) // mesh.context_size()) * mesh.context_size()
        return span, min(samples, max(1, self._tokens_per_call // span)), -(-length // span) * span


def samples_of(length: int, samples: int, tokens: int) -> int:
    """Rows read at one length: `samples`, or as many as have `tokens` tokens together, but never below `FEWEST`."""
    return min(samples, max(FEWEST, tokens // length))


def summarise(task: data.Task, measured: dict[int, Measured]) -> dict:
    """By length: accuracy, and the share of rows without a mistake, with their intervals at 95 %."""

    def by_length(value):
        return {str(length): value(length, found) for length, found in measured.items()}

    return {
        "kind": task.kind,
        "accuracy": by_length(lambda _, found: float(found.correct.mean())),
        "interval": by_length(
            lambda _, found: wilson(float(found.correct.mean()), independent(found.correct, found.answers))
        ),
        "whole": by_length(lambda _, found: float((found.correct == 1).mean())),
        "whole_interval": by_length(lambda _, found: wilson(float((found.correct == 1).mean()), len(found.correct))),
        "loss": by_length(lambda _, found: found.loss),
        "rows": by_length(lambda _, found: len(found.correct)),
        "answers": by_length(lambda _, found: found.answers),
        "guessing": by_length(lambda length, _: task.guessing(length)),
    }


def _spans(row: dict[str, np.ndarray], span: int) -> Iterator[tuple[np.ndarray, ...]]:
    """`(tokens, positions, targets, answers)` of each span, the last one filled up with padding, position -1."""
    length = row["tokens"].shape[1]
    for begin in range(0, length, span):
        rest = max(0, begin + span - length)
        yield tuple(
            np.pad(row[name][:, begin : begin + span], ((0, 0), (0, rest)), constant_values=filler)
            for name, filler in (("tokens", 0), ("positions", -1), ("targets", 0), ("answers", False))
        )


def _init(graphdef, params, batch: int, capacity: int):
    """The state before a row."""
    return nnx.merge(graphdef, params).init_state(batch, capacity)


def _read(
    graphdef,
    params,
    piece: tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"], Bool[Array, "B T"]],
    state,
):
    """`[3, B]`: right answers, answers, and the sum of their losses; and the state after the span."""
    tokens, positions, targets, answers = piece
    model = nnx.merge(graphdef, params)
    hidden, state = model(tokens, Segments.from_ids(positions >= 0, positions), state)
    found = cross_entropy(hidden, model.unembedding, targets, answers)
    sums = (found.correct & answers, answers, jnp.where(answers, found.losses, 0))
    return jnp.stack([jnp.sum(each, axis=1, dtype=jnp.float32) for each in sums]), state
