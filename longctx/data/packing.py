"""Documents as one stream of tokens, and the stream as rows.

Each document is preceded by the `document` token and all are laid end to end. Row r of length T is tokens r*T to
(r+1)*T, and the targets are the same one token later, so that a document's last token predicts the `document`
token. A row holds several *pieces*, one for each document in it; a document that the row's edge cuts goes on in the
next row as a new piece, with positions from 0.

A row is a dict of arrays `[T]` (stacked: `[B, T]`):
  tokens, targets: int32.
  weights: float32, what the target counts in the loss; 0 where there is none.
  answers: bool, true where the target is the answer of a retrieval question.
  segment_ids: int32, 1, 2, ... for the pieces of the row; 0 is padding.
  positions: int32, index in the piece.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from longctx.data.corpus import Document
from longctx.data.tokenizers import Tokenizer

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Documents, encoded and end to end.

    Attributes:
      tokens: int32 `[size + 1]`; each document begins with the `document` token, and one more closes the last.
      offsets: int64 `[documents + 1]`; document i is tokens `offsets[i]` to `offsets[i + 1]`.
      names: of the documents.
      bytes: int64 `[documents]`, of their texts in UTF-8.
      texts: digests of their texts, by which one is known whatever its name and the tokenizer.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...]
    bytes: np.ndarray
    texts: tuple[str, ...]

    @classmethod
    def encode(cls, documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStore:
        """The documents, in their order."""
        encoded = tokenizer.encode_batch([document.text for document in documents])
        offsets = np.cumsum([0, *(len(ids) + 1 for ids in encoded)], dtype=np.int64)
        tokens = np.full(offsets[-1] + 1, tokenizer.document, np.int32)
        for start, ids in zip(offsets[:-1], encoded, strict=True):
            tokens[start + 1 : start + 1 + len(ids)] = ids
        sizes, digests = np.empty(len(documents), np.int64), []
        for i, document in enumerate(documents):
            text = document.text.encode()
            sizes[i] = len(text)
            digests.append(hashlib.blake2b(text, digest_size=8).hexdigest())
        return cls(tokens, offsets, tuple(document.name for document in documents), sizes, tuple(digests))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """Tokens of all documents together."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 `[documents]`."""
        return np.diff(self.offsets)

    def digests(self) -> list[str]:
        """Of each document's tokens, 16 hexadecimal digits, in the order of their names: not that of a seed."""
        order = sorted(range(len(self)), key=lambda i: (self.names[i], i))
        return [hashlib.sha256(self.document(i).astype("<i4").tobytes()).hexdigest()[:16] for i in order]

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, the `document` token first, int32 `[tokens]`; a view."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


class Rows:
    """The rows of a store, made on demand; an incomplete row at the end is left out."""

    def __init__(self, store: TokenStore, length: int):
        self._store = store
        self._length = length

    def __len__(self) -> int:
        return self._store.size // self._length

    def longest(self) -> np.ndarray:
        """Tokens of the longest piece of each row, int64 `[rows]`."""
        end = len(self) * self._length
        starts = np.union1d(self._store.offsets, np.arange(0, end + 1, self._length))
        starts = starts[starts <= end]
        longest = np.zeros(len(self), np.int64)
        np.maximum.at(longest, starts[:-1] // self._length, np.diff(starts))
        return longest

    def __getitem__(self, r: int) -> Row:
        begin, end = r * self._length, (r + 1) * self._length
        offsets = self._store.offsets
        first = np.searchsorted(offsets, begin, side="right") - 1
        last = np.searchsorted(offsets, end, side="left")
        edges = np.clip(offsets[first : last + 1], begin, end) - begin
        lengths = np.diff(edges)
        return {
            "tokens": self._store.tokens[begin:end],
            "targets": self._store.tokens[begin + 1 : end + 1],
            "weights": np.ones(self._length, np.float32),
            "answers": np.zeros(self._length, bool),
            "segment_ids": np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths),
            "positions": np.arange(self._length, dtype=np.int32) - np.repeat(edges[:-1], lengths).astype(np.int32),
        }


def pad(documents: Sequence[np.ndarray], length: int, closing: int | None = None) -> Row:
    """One document a row: cut to `length`, or padded at the end.

    Args:
      documents: token ids, each int32 `[tokens]` with at least one token.
      length: T.
      closing: what the last token of a whole document predicts (`tokenizer.document`); None for nothing.

    Returns:
      Arrays `[documents, T]`; tokens, targets and positions are 0 where `segment_ids` are.
    """
    shape = (len(documents), length)
    row: Row = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
        "answers": np.zeros(shape, bool),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    for i, ids in enumerate(documents):
        count = min(len(ids), length)
        targets = ids[1 : length + 1]
        if closing is not None and len(ids) <= length:
            targets = np.append(targets, closing)
        row["tokens"][i, :count] = ids[:count]
        row["targets"][i, : len(targets)] = targets
        row["weights"][i, : len(targets)] = 1
        row["segment_ids"][i, :count] = 1
        row["positions"][i, :count] = np.arange(count)
    return row


def stretches(store: TokenStore, length: int, samples: int, seed: int | Sequence[int]) -> np.ndarray:
    """Running text of any length, as one document each.

    Documents follow one another from a random one on, without the `document` tokens between them, so that text
    longer than any document can be had; a store shorter than `length` starts again from its first.

    Args:
      store: where the text comes from.
      length: tokens, the `document` token at the start among them.
      samples: texts, each from its own random document on.
      seed: of the random documents; one or several numbers from 0 up.

    Returns:
      int32 `[samples, length]`.
    """
    begins = store.offsets[:-1]
    text = np.delete(store.tokens[: store.size], begins)
    starts = begins - np.arange(len(store))  # in `text`
    chosen = np.random.default_rng(seed).integers(len(store), size=samples)
    out = np.empty((samples, length), np.int32)
    out[:, 0] = store.tokens[0]
    for row, start in zip(out, starts[chosen], strict=True):
        row[1:] = text.take(np.arange(start, start + length - 1), mode="wrap")
    return out
