"""Planted facts: each is stated before it is asked for, the answer is in the row, and the text stays the text."""

import numpy as np
import pytest

from longctx.data import Tokenizer, TokenStore, needle_rows
from longctx.data.corpus import Document
from longctx.data.needles import Planter
from longctx.data.packing import Rows
from longctx.errors import UsageError

TOKENIZER = Tokenizer.bytes()
FACT, ASK = TOKENIZER.fact, TOKENIZER.ask
STORE = TokenStore.encode([Document(str(n), f"{n} text, " * n) for n in (3, 90, 7, 40, 200)], TOKENIZER)


def _read(tokens):
    """The statements and questions of a piece by reading it token by token: dicts of place and tokens, and the text."""
    statements, questions, text, i = {}, {}, [], 0
    while i < len(tokens):
        if tokens[i] in (FACT, ASK):
            found = statements if tokens[i] == FACT else questions
            assert tokens[i + 1] not in found
            found[tokens[i + 1]] = (i, tokens[i + 2])
            i += 3
        else:
            text.append(tokens[i])
            i += 1
    return statements, questions, text


def _plant(length, facts, seed, r=0):
    row = Rows(STORE, length)[r]
    return row, Planter(TOKENIZER, facts).plant(row, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("length", "r"), [(64, 1), (256, 0), (700, 1)])
def test_planted_facts_can_be_answered(length, r, seed):
    """Fails when a question comes before its fact, a key twice, or the answer is not the next token."""
    before, after = _plant(length, 5, seed, r)
    longest = np.argmax(np.bincount(before["segment_ids"]))
    inside = np.flatnonzero(before["segment_ids"] == longest)
    stream = [*after["tokens"][inside].tolist(), int(after["targets"][inside[-1]])]
    statements, questions, text = _read(stream)

    assert len(statements) == 5
    assert statements.keys() == questions.keys()
    answers = np.zeros(length, bool)
    weights = np.ones(length, np.float32)
    for key, (asked, value) in questions.items():
        stated, stated_value = statements[key]
        assert stated + 3 <= asked
        assert stated_value == value
        assert key in TOKENIZER.words[0::2]
        assert value in TOKENIZER.words[1::2]
        # The targets at i - 1 .. i + 1 are the three planted tokens; that of the question's key is the answer.
        weights[inside[0] + stated - 1 : inside[0] + stated + 2] = 0
        weights[inside[0] + asked - 1 : inside[0] + asked + 1] = 0
        answers[inside[0] + asked + 1] = True
    np.testing.assert_array_equal(after["answers"], answers)
    np.testing.assert_array_equal(after["weights"], weights)

    assert text == before["tokens"][inside][: len(text)].tolist()
    np.testing.assert_array_equal(after["targets"][inside], stream[1:])
    outside = before["segment_ids"] != longest
    for name in before:
        if name in ("segment_ids", "positions"):
            np.testing.assert_array_equal(after[name], before[name])
        np.testing.assert_array_equal(after[name][outside], before[name][outside])
        assert after[name].dtype == before[name].dtype


def test_planting_leaves_the_row_as_it_was():
    before, _ = _plant(64, 5, 0)
    np.testing.assert_array_equal(before["tokens"], STORE.tokens[:64])


@pytest.mark.parametrize(("length", "planted"), [(11, 0), (12, 1), (48, 4), (59, 4), (72, 5)])
def test_short_pieces_get_fewer_facts(length, planted):
    store = TokenStore.encode([Document("a", "x" * 100)], TOKENIZER)
    row = Planter(TOKENIZER, 5).plant(Rows(store, length)[0], np.random.default_rng(0))
    assert row["answers"].sum() == planted
    assert (row["tokens"] == FACT).sum() == planted


def test_places_are_spread_over_the_piece():
    """Two uniform places are a third of the piece apart; questions do not come in the order of the facts."""
    gaps, in_order, firsts = [], 0, []
    store = TokenStore.encode([Document("a", "-" * 600)], TOKENIZER)
    row, planter, rng = Rows(store, 600)[0], Planter(TOKENIZER, 4), np.random.default_rng(0)
    for _ in range(300):
        after = planter.plant(row, rng)
        statements, questions, _ = _read([*after["tokens"].tolist(), int(after["targets"][-1])])
        gaps += [(questions[key][0] - statements[key][0]) / 600 for key in statements]
        in_order += list(statements) == list(questions)
        firsts.append(min(place for place, _ in statements.values()))
    assert 0.31 < np.mean(gaps) < 0.36
    assert in_order < 60
    assert min(firsts) == 1  # right after the `document` token, which stays first


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_question_at_the_end(depth):
    length, facts, samples = 400, 6, 8
    rows = needle_rows(STORE, TOKENIZER, length, depth, samples, facts, seed=3)
    text = np.delete(STORE.tokens[: STORE.size], STORE.offsets[:-1]).tolist()
    ring = "".join(map(chr, text + text))
    asked, earlier = [], []
    for i in range(samples):
        tokens = rows["tokens"][i].tolist()
        stream = [*tokens, int(rows["targets"][i, -1])]
        statements, questions, words = _read(stream)
        ((key, (place, value)),) = questions.items()
        assert place == length - 2
        assert len(statements) == facts
        assert statements[key] == (1 + round(depth * (length - 6)), value)
        assert words[0] == TOKENIZER.document
        assert "".join(map(chr, words[1:])) in ring
        np.testing.assert_array_equal(rows["targets"][i], stream[1:])
        asked.append((key, value))
        earlier.append(sum(where < statements[key][0] for where, _ in statements.values()))
    assert len(set(asked)) > samples // 2  # each sample has its own
    assert abs(np.mean(earlier) - depth * (facts - 1)) < 1.2
    last = np.arange(length) == length - 1
    np.testing.assert_array_equal(rows["answers"], np.tile(last, (samples, 1)))
    np.testing.assert_array_equal(rows["weights"], np.tile(last.astype(np.float32), (samples, 1)))
    np.testing.assert_array_equal(rows["segment_ids"], np.ones((samples, length)))
    np.testing.assert_array_equal(rows["positions"], np.tile(np.arange(length), (samples, 1)))


def test_every_cell_has_its_own_samples():
    """Fails when the depth or the length is left out of the seed: cells would share their keys."""

    def keys(length=100, depth=0.5, seed=0):
        tokens = needle_rows(STORE, TOKENIZER, length, depth, 1, 3, seed)["tokens"][0]
        return tuple(sorted(tokens[np.flatnonzero(tokens == FACT) + 1].tolist()))

    assert keys() == keys()
    assert len({keys(length, depth, seed) for length in (100, 101) for depth in (0, 0.5) for seed in (0, 1)}) == 8


def test_longer_than_all_held_out_text():
    rows = needle_rows(STORE, TOKENIZER, 3 * STORE.size, 0.5, 2, 3, seed=0)
    assert rows["tokens"].shape == (2, 3 * STORE.size)
    assert (rows["tokens"] == TOKENIZER.document).sum() == 2


def test_what_cannot_be_planted_is_refused():
    with pytest.raises(UsageError, match="facts is 32, and the vocabulary has words for 31 keys"):
        Planter(TOKENIZER, 32)
    with pytest.raises(UsageError, match=r"20 tokens has no room for 6 facts .* at least 21 tokens"):
        needle_rows(STORE, TOKENIZER, 20, 0.5, 2, 6, seed=0)
    assert needle_rows(STORE, TOKENIZER, 21, 0.5, 2, 6, seed=0)["tokens"].shape == (2, 21)
