"""Rows are the documents' tokens in order, with the right targets, pieces and positions."""

import hashlib

import numpy as np
import pytest

from longctx.data import Tokenizer, TokenStore, pad, stretches
from longctx.data.corpus import Document
from longctx.data.packing import Rows

# Documents of 3, 2, 5 and 2 tokens (1 is the `document` token), and the token that closes the last.
STORE = TokenStore(
    tokens=np.array([1, 10, 11, 1, 20, 1, 30, 31, 32, 33, 1, 40, 1], np.int32),
    offsets=np.array([0, 3, 5, 10, 12]),
    names=("a", "b", "c", "d"),
    bytes=np.array([2, 1, 4, 1]),
    texts=("a", "b", "c", "d"),
)


def test_documents_are_encoded_end_to_end():
    tokenizer = Tokenizer.bytes()
    store = TokenStore.encode([Document("a", "ab"), Document("b", "c<|fact|>")], tokenizer)
    assert (len(store), store.size, store.names) == (2, 13, ("a", "b"))
    np.testing.assert_array_equal(store.bytes, [2, 9])
    assert store.texts[0] == hashlib.blake2b(b"ab", digest_size=8).hexdigest() != store.texts[1]
    assert tokenizer.decode(store.tokens, special=True) == "<|document|>ab<|document|>c<|fact|><|document|>"
    np.testing.assert_array_equal(store.lengths, [3, 10])
    assert tokenizer.decode(store.document(1), special=True) == "<|document|>c<|fact|>"


def test_rows_by_hand():
    """Each row cuts a document: the piece in the next row has its own id, and positions from 0."""
    rows = Rows(STORE, 4)
    assert len(rows) == 3
    expected = [
        ([1, 10, 11, 1], [10, 11, 1, 20], [1, 1, 1, 2], [0, 1, 2, 0]),
        ([20, 1, 30, 31], [1, 30, 31, 32], [1, 2, 2, 2], [0, 0, 1, 2]),
        ([32, 33, 1, 40], [33, 1, 40, 1], [1, 1, 2, 2], [0, 1, 0, 1]),
    ]
    for r, (tokens, targets, segment_ids, positions) in enumerate(expected):
        row = rows[r]
        np.testing.assert_array_equal(row["tokens"], tokens)
        np.testing.assert_array_equal(row["targets"], targets)
        np.testing.assert_array_equal(row["segment_ids"], segment_ids)
        np.testing.assert_array_equal(row["positions"], positions)
        assert row["weights"].tolist() == [1, 1, 1, 1]
        assert not row["answers"].any()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 12])
def test_rows_are_the_stream(length):
    rows = [Rows(STORE, length)[r] for r in range(STORE.size // length)]
    used = len(rows) * length
    np.testing.assert_array_equal(np.concatenate([row["tokens"] for row in rows]), STORE.tokens[:used])
    np.testing.assert_array_equal(np.concatenate([row["targets"] for row in rows]), STORE.tokens[1 : used + 1])
    for row in rows:
        dtypes = {name: array.dtype.name for name, array in row.items()}
        assert dtypes == {
            "tokens": "int32",
            "targets": "int32",
            "weights": "float32",
            "answers": "bool",
            "segment_ids": "int32",
            "positions": "int32",
        }
        begins = row["positions"] == 0
        np.testing.assert_array_equal(np.cumsum(begins), row["segment_ids"])
        np.testing.assert_array_equal(begins[1:], row["tokens"][1:] == 1)


def test_pad_by_hand():
    row = pad([np.array([1, 5]), np.array([1, 6, 7, 8]), np.array([1, 2, 3, 4, 5])], 4, closing=1)
    np.testing.assert_array_equal(row["tokens"], [[1, 5, 0, 0], [1, 6, 7, 8], [1, 2, 3, 4]])
    np.testing.assert_array_equal(row["targets"], [[5, 1, 0, 0], [6, 7, 8, 1], [2, 3, 4, 5]])
    np.testing.assert_array_equal(row["weights"], [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(row["segment_ids"], [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(row["positions"], [[0, 1, 0, 0], [0, 1, 2, 3], [0, 1, 2, 3]])


def test_pad_without_a_closing_token():
    row = pad([np.array([1, 5]), np.array([1, 6, 7, 8])], 4)
    np.testing.assert_array_equal(row["targets"], [[5, 0, 0, 0], [6, 7, 8, 0]])
    np.testing.assert_array_equal(row["weights"], [[1, 0, 0, 0], [1, 1, 1, 0]])


def test_stretches_run_on_from_any_document():
    """Every document gets its turn to be first, inner `document` tokens are gone, and the text starts again."""
    texts = stretches(STORE, 12, 100, seed=0)
    ring = [10, 11, 20, 30, 31, 32, 33, 40]
    starts = {row[1] for row in texts.tolist()}
    assert starts == {10, 20, 30, 40}
    for row in texts.tolist():
        start = ring.index(row[1])
        assert row == [1] + [ring[(start + i) % len(ring)] for i in range(11)]
    np.testing.assert_array_equal(texts, stretches(STORE, 12, 100, seed=0))
    assert (texts != stretches(STORE, 12, 100, seed=1)).any()
