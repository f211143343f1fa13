"""The retrieval task, planted in real text: single-token facts stated once and asked for later.

A statement is the tokens `fact key value`, a question `ask key` with `value` as the next token. In text:

    ... text <|fact|> key value text ... text <|ask|> key value text ...

Keys and values are words of the vocabulary, from two disjoint halves of it; the keys of a row are distinct. What is
planted counts nothing in the loss, since no model can foresee it, except the answers. The task is multi-query
associative recall (Arora et al. 2023, arXiv:2312.04927) with real text in place of filler; at evaluation one fact of
several is asked for at a chosen depth, as in RULER's niah_multikey (Hsieh et al. 2024, arXiv:2404.06654).
"""

from __future__ import annotations

import numpy as np

from longctx.data.packing import Row, TokenStore, stretches
from longctx.data.tokenizers import Tokenizer
from longctx.errors import UsageError

_STATEMENT = 3  # tokens of a statement, and of a question with its answer
ROOM = 4 * _STATEMENT  # tokens of a piece for each fact, half of them text


def pools(tokenizer: Tokenizer, facts: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of keys and ids of values, int32: every other word of the vocabulary each.

    Raises:
      UsageError: when there are fewer keys than `facts`.
    """
    keys, values = tokenizer.words[0::2], tokenizer.words[1::2]
    if len(values) < facts:
        raise UsageError(
            f"data.needles.facts is {facts}, and the vocabulary has words for {len(values)} keys and as many values; "
            "ask for fewer facts or a larger vocabulary"
        )
    return keys, values


class Planter:
    """Plants facts and their questions into rows."""

    def __init__(self, tokenizer: Tokenizer, facts: int):
        """At most `facts` facts a row; raises UsageError when the vocabulary has no words for that many."""
        self._keys, self._values = pools(tokenizer, facts)
        self._fact, self._ask = tokenizer.fact, tokenizer.ask
        self._facts = facts

    def plant(self, row: Row, rng: np.random.Generator) -> Row:
        """The row with facts planted in the longest of its pieces, which keeps its length: its text is cut short.

        Each fact and its question stand at two positions drawn uniformly. At most half of the piece is planted, by
        fewer facts if need be; a piece of fewer than `ROOM` tokens is left alone.
        """
        begin, length = _longest(row["segment_ids"])
        facts = min(self._facts, length // ROOM)
        if facts == 0:
            return row
        keys = rng.choice(self._keys, facts, replace=False)
        values = rng.choice(self._values, facts, replace=False)
        statements = np.stack([np.full(facts, self._fact), keys, values], axis=1)
        questions = np.stack([np.full(facts, self._ask), keys, values], axis=1)
        # A fact is at the lesser of two positions, its question at the greater; the piece's first token stays first.
        text = length + 1 - 2 * _STATEMENT * facts
        positions = np.sort(rng.random((2, facts)), axis=0)
        gaps = 1 + (positions.ravel() * text).astype(np.int64)
        order = np.argsort(positions.ravel(), kind="stable")
        end = begin + length
        tokens, planted = _weave(
            row["tokens"][begin : begin + text],
            np.concatenate([statements, questions])[order],
            gaps[order],
        )
        is_answer = np.zeros(length + 1, bool)
        is_answer[planted.reshape(-1, _STATEMENT)[order >= facts, -1]] = True
        is_planted = np.zeros(length + 1, bool)
        is_planted[planted] = True
        row = {name: array.copy() for name, array in row.items()}
        row["tokens"][begin:end] = tokens[:-1]
        row["targets"][begin:end] = tokens[1:]
        row["answers"][begin:end] = is_answer[1:]
        row["weights"][begin:end] = ~is_planted[1:] | is_answer[1:]
        return row


def needle_rows(
    store: TokenStore, tokenizer: Tokenizer, length: int, depth: float, samples: int, facts: int, seed: int
) -> Row:
    """One question at the end of held-out text, about a fact at a chosen depth.

    The text is `packing.stretches`: documents one after another as a single segment, of any length. Every sample has
    its own text, keys, values and positions, and so have other depths, lengths and seeds.

    Args:
      store: held-out documents.
      tokenizer: of the store.
      length: T; the last two tokens are the question.
      depth: of the fact asked for, from 0 (start of the context) to 1 (just before the question).
      samples: B.
      facts: stated in each sample, the one asked for among them; the others stand at random positions.
      seed: from 0 up.

    Returns:
      Arrays `[B, T]`; the last target is the answer, the one target of weight 1.

    Raises:
      UsageError: when the facts do not fit the length or the vocabulary.
    """
    keys, values = pools(tokenizer, facts)
    text = length - _STATEMENT * facts - 2
    if text < 1:
        raise UsageError(
            f"a context of {length} tokens has no room for {facts} facts and a question; "
            f"give at least {_STATEMENT * facts + 3} tokens or fewer facts"
        )
    seeds = (seed, length, round(depth * 10**6))
    rng = np.random.default_rng(seeds)
    tokens = np.empty((samples, length + 1), np.int32)
    for row, context in zip(tokens, stretches(store, text, samples, (*seeds, 1)), strict=True):
        statements = np.full((facts, _STATEMENT), tokenizer.fact)
        statements[:, 1] = rng.choice(keys, facts, replace=False)
        statements[:, 2] = rng.choice(values, facts, replace=False)
        # So many distractors come before the asked fact, whose first token is at `place` of the row.
        before = rng.binomial(facts - 1, depth)
        place = 1 + round(depth * (length - 2 - _STATEMENT - 1))
        gap = np.clip(place - _STATEMENT * before, 1, text)
        gaps = np.concatenate(
            [
                np.sort(rng.integers(1, gap, size=before, endpoint=True)),
                [gap],
                np.sort(rng.integers(gap, text, size=facts - 1 - before, endpoint=True)),
            ]
        )
        row[:-3], _ = _weave(context, statements, gaps)
        row[-3:] = tokenizer.ask, *statements[before, 1:]
    last = np.zeros((samples, length), bool)
    last[:, -1] = True
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": last.astype(np.float32),
        "answers": last,
        "segment_ids": np.ones((samples, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (samples, 1)),
    }


def _longest(segment_ids: np.ndarray) -> tuple[int, int]:
    """Where the longest piece of a row begins, and its length."""
    edges = np.concatenate([[0], np.flatnonzero(np.diff(segment_ids)) + 1, [len(segment_ids)]])
    lengths = np.diff(edges)
    longest = np.argmax(lengths)
    return int(edges[longest]), int(lengths[longest])


def _weave(text: np.ndarray, items: np.ndarray, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`items` put into `text`.

    Args:
      text: int32 `[text]`.
      items: `[items, width]` tokens.
      gaps: `[items]` ascending; item i goes before token `gaps[i]` of the text.

    Returns:
      int32 `[text + items * width]`, and the positions of the items' tokens in it, in order, `[items * width]`.
    """
    positions = np.repeat(gaps, items.shape[1]) + np.arange(items.size)
    out = np.empty(len(text) + items.size, np.int32)
    is_text = np.ones(len(out), bool)
    is_text[positions] = False
    out[is_text] = text
    out[positions] = items.ravel()
    return out, positions
