"""The loss on held-out text, packed as in training: nats a token, and bits a byte, so that tokenizers compare.

Held-out documents are laid end to end in rows of the trained length, and every token of them, with the `document`
token that ends each, is predicted once. With l the losses in nats and n the bytes of the text in UTF-8,

    bits a byte = sum of l / (n log 2)

Of more text than `evaluation.heldout_tokens`, whole documents are taken by their digest, and of the last one the
beginning, its bytes in proportion. A synthetic task has no text: new rows of it stand for the documents, with nats an
answer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from longctx import config, data
from longctx.evals.statistics import clustered
from longctx.ops.cross_entropy import cross_entropy
from longctx.parallel import mesh as meshes
from longctx.parallel import rules
from longctx.typing import Segments

ROWS = (4, 64)  # new rows of a synthetic task, at least and at most


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of every document, or row of a task.

    Attributes:
      nats: `[documents]` float64, the sum of the losses.
      tokens: `[documents]` int64, that were predicted.
      bytes: `[documents]` float64, of their text; 0 of a task.
      names: of the documents, digests of their text; of rows, of their tokens.
      whole: whether all held-out text was read.
    """

    nats: Float[np.ndarray, " documents"]
    tokens: Int[np.ndarray, " documents"]
    bytes: Float[np.ndarray, " documents"]
    names: tuple[str, ...]
    whole: bool

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float | None:
        """None without text."""
        return float(self.nats.sum() / math.log(2) / self.bytes.sum()) if self.bytes.sum() else None

    def summary(self) -> dict[str, Any]:
        """For the report, with standard errors over documents."""
        loss, error = clustered(self.nats / np.maximum(self.tokens, 1), range(len(self.nats)), self.tokens)
        found = {"loss": loss, "standard_error": error, "tokens": int(self.tokens.sum()), "whole": self.whole}
        if self.bits_per_byte is None:
            return found | {"rows": len(self.nats)}
        bits = self.nats / math.log(2) / np.maximum(self.bytes, 1)
        mean, error = clustered(bits, range(len(bits)), np.maximum(self.bytes, 1))
        found |= {"bits_per_byte": mean, "bits_per_byte_standard_error": error}
        return found | {"bytes": int(self.bytes.sum()), "documents": len(self.nats)}

    def scalars(self) -> dict[str, float]:
        """For the log of training."""
        found = {"heldout_loss": self.loss}
        return found if self.bits_per_byte is None else found | {"heldout_bits_per_byte": self.bits_per_byte}


class HeldOut:
    """Measures parameters on held-out text; compiled once, under the ambient mesh, whatever it is.

    Args:
      graphdef: of the model.
      experiment: whose last stage says how long rows are and how many are read at once.
      source: whose held-out documents are read, or the task of which new rows are made.
    """

    def __init__(self, graphdef: nnx.GraphDef, experiment: config.Experiment, source: data.Source):
        stage = experiment.training.stages[-1]
        if isinstance(source, data.Task):
            count = int(np.clip(experiment.evaluation.heldout_tokens // stage.length, *ROWS))
            rows = source.rows(data.heldout_rng(0, 0), count, stage.length)
            documents = np.broadcast_to(np.arange(count)[:, None], rows["tokens"].shape)
            names = tuple(hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows["tokens"])
            self._texts = (names, np.zeros(count), True)
        else:
            rows, documents, *self._texts = _rows(source.heldout, stage.length, experiment.evaluation.heldout_tokens)
        self._documents = np.where(rows["weights"] > 0, documents, -1)
        self._rows = rows
        mesh = jax.sharding.get_abstract_mesh()
        devices = meshes.size("data")
        self._batch = devices * max(1, stage.batch // experiment.training.accumulate // devices)
        self._length = -(-stage.length // meshes.context_size()) * meshes.context_size()
        whole = PartitionSpec() if mesh.size > 1 else None  # on every device, and so on every process
        self._losses = jax.jit(functools.partial(_losses, graphdef), out_shardings=whole)

    @property
    def tokens(self) -> int:
        """That are read."""
        return int(np.sum(self._rows["segment_ids"] > 0))

    def __call__(self, params: Any, progress: Callable[[int], object] = lambda _: None) -> Measured:
        """Of parameters as `nnx.as_pure` gives them; `progress` is called with the tokens read after every batch."""
        names, sizes, whole = self._texts
        nats, tokens = np.zeros(len(sizes)), np.zeros(len(sizes), np.int64)
        for first in range(0, len(self._documents), self._batch):
            here = slice(first, first + self._batch)
            losses = np.asarray(self._losses(params, self._batch_of(here)), np.float64)
            of = self._documents[here]
            losses, of = losses[: of.shape[0], : of.shape[1]][of >= 0], of[of >= 0]
            nats += np.bincount(of, losses, len(sizes))
            tokens += np.bincount(of, minlength=len(sizes))
            progress(int(np.sum(self._rows["segment_ids"][here] > 0)))
        return Measured(nats, tokens, sizes, names, whole)

    def _batch_of(self, here: slice) -> dict[str, np.ndarray]:
        """Rows, filled up with padding."""
        shape = (self._batch, self._length)
        found = {}
        for name in ("tokens", "targets", "segment_ids", "positions"):
            array = self._rows[name][here]
            found[name] = np.pad(array, [(0, size - given) for size, given in zip(shape, array.shape, strict=True)])
        return found


def _rows(store: data.TokenStore, length: int, most: int):
    """Held-out text as rows, the number of the document that each target belongs to, and of these documents the
    digests of text and bytes, and whether they are all there are."""
    chosen, whole = _chosen(store, most)
    pieces = [store.document(i)[:count] for i, count in chosen]
    counts = np.array([len(piece) for piece in pieces])
    size = int(counts.sum())
    padded = -(-size // length) * length
    tokens = np.concatenate([*pieces, np.full(padded - size + 1, store.tokens[-1], np.int32)])
    offsets = np.cumsum([0, *counts, padded - size] if padded > size else [0, *counts])
    sizes = np.array([store.bytes[i] * count / store.lengths[i] for i, count in chosen])
    made = data.Rows(dataclasses.replace(store, tokens=tokens, offsets=offsets), length)
    rows = [made[r] for r in range(len(made))]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    text = np.arange(padded).reshape(-1, length) < size
    stacked = {name: np.where(text, array, np.zeros((), array.dtype)) for name, array in stacked.items()}
    documents = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts) - 1  # their targets are the ends of documents, but where one was cut
    documents[ends[[count < store.lengths[i] for i, count in chosen]]] = -1
    documents = np.pad(documents, (0, padded - size)).reshape(-1, length)
    return stacked, documents, tuple(store.texts[i] for i, _ in chosen), sizes, whole


def _chosen(store: data.TokenStore, most: int) -> tuple[list[tuple[int, int]], bool]:
    """Documents and how many of their tokens are read, at most `most` together; and whether these are all."""
    lengths = store.lengths
    if store.size <= most:
        return [(i, int(count)) for i, count in enumerate(lengths)], True
    chosen, left = [], most
    for i in sorted(range(len(store)), key=lambda i: store.texts[i]):
        if left > 0:
            chosen.append((i, min(int(lengths[i]), left)))
            left -= chosen[-1][1]
    return sorted(chosen), False


def _losses(graphdef: nnx.GraphDef, params: Any, batch: dict[str, Array]) -> Float[Array, "B T"]:
    batch = {name: rules.constrain(array, ("batch", "time")) for name, array in batch.items()}
    model = nnx.merge(graphdef, params)
    hidden, _ = model(batch["tokens"], Segments.from_ids(batch["segment_ids"], batch["positions"]))
    return cross_entropy(hidden, model.unembedding, batch["targets"], batch["segment_ids"] > 0).losses
