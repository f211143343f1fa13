"""The input pipeline gives the same rows to whoever asks, resumes exactly, and shares them out without loss."""

import json

import numpy as np
import pytest
import tokenizers
from orbax.checkpoint import v1 as ocp
from tokenizers import models, pre_tokenizers

from longctx import config, data
from longctx.data import corpus as documents
from longctx.errors import UsageError

STAGE = config.Stage(steps=10, batch=4, length=64)
PLAIN = config.Data(needles=config.Needles(rows=0.0))
PLANTED = config.Data(needles=config.Needles(rows=0.5, facts=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    for i in range(40):
        name = chr(97 + i // 8) * 3 + chr(97 + i % 8) * 3
        (root / f"{i:02}.txt").write_text(f"document {i} has the name {name} in each line\n" * (2 + i % 7))
    return root


@pytest.fixture(scope="module")
def corpus(folder):
    return data.prepare(config.Data(path=str(folder), tokenizer="bytes", heldout=0.2), seed=0)


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


def _assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def _rows(batches):
    """Each row of the batches as something that can be compared."""
    return sorted(row.tobytes() for batch in batches for row in batch["tokens"])


def test_prepare_keeps_training_and_held_out_documents_apart(folder, corpus):
    train, heldout = documents.split(documents.read(str(folder)), 0.2)
    assert sorted(corpus.train.names) == [document.name for document in train]
    assert corpus.heldout.names == tuple(document.name for document in heldout)
    assert corpus.train.names != tuple(document.name for document in train)  # shuffled
    texts = {document.name: document.text for document in train}
    for i, name in enumerate(corpus.train.names):
        assert corpus.tokenizer.decode(corpus.train.document(i)) == texts[name]


def test_unseen(folder, corpus):
    """Other text is held out, all of it, and in the run's tokens; what they cannot represent is refused."""
    found = data.unseen(str(folder), corpus.tokenizer)
    assert found.heldout.names == tuple(f"{i:02}.txt" for i in range(40))
    assert (len(found.train), found.train.size, found.heldout_share) == (0, 0, 1.0)
    assert found.tokenizer is corpus.tokenizer
    letters = data.Tokenizer(tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "document": 1}, unk_token="<unk>")))
    with pytest.raises(UsageError, match="the run's tokenizer cannot represent 100% of the corpus' characters"):
        data.unseen(str(folder), letters)


def test_tokenizer_is_learnt_from_training_documents_and_kept(folder, tmp_path):
    """Fails when held-out documents are in what the tokenizer is learnt from: their names would be in it."""
    first = data.prepare(config.Data(path=str(folder), heldout=0.2), 0, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["tokenizer.json"]
    written = (tmp_path / "run" / "tokenizer.json").read_bytes()
    train, _ = documents.split(documents.read(str(folder)), 0.2)
    data.Tokenizer.train([document.text for document in train], 2048).save(tmp_path / "alone.json")
    assert written == (tmp_path / "alone.json").read_bytes()

    again = data.prepare(config.Data(path=str(folder), vocab_size=300, heldout=0.2), 0, tmp_path / "run")
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == written
    by_path = data.prepare(
        config.Data(path=str(folder), tokenizer=str(tmp_path / "run" / "tokenizer.json"), heldout=0.2), seed=0
    )
    np.testing.assert_array_equal(by_path.train.tokens, first.train.tokens)


@pytest.mark.parametrize(
    "given", [config.Data(path="/nowhere"), config.Data(path=__file__, tokenizer="/nowhere/tokenizer.json")]
)
def test_nothing_is_written_after_an_error(tmp_path, given):
    with pytest.raises(UsageError, match="nowhere"):
        data.prepare(given, 0, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_epoch_is_every_row_once_and_the_next_has_another_order(corpus):
    rows = corpus.train.size // STAGE.length
    stage = config.Stage(steps=1, batch=rows, length=STAGE.length)
    first, second = _take(data.batches(corpus, PLAIN, stage, 0, 0), 2)
    assert _rows([first]) == _rows([second])
    stream = corpus.train.tokens[: rows * STAGE.length].reshape(rows, -1)
    assert _rows([first]) == sorted(row.tobytes() for row in stream)
    assert (first["tokens"] != second["tokens"]).any()


def _prepared(root, texts, seed=0, **options):
    root.mkdir(exist_ok=True)
    for name, text in texts.items():
        (root / name).write_text(text)
    return data.prepare(config.Data(path=str(root), **{"tokenizer": "bytes", "heldout": 0.2} | options), seed)


def test_a_fingerprint_is_of_the_content(folder, corpus, tmp_path):
    """Fails when counts stand for it: two words of a document change places, or two documents."""
    texts = {file.name: file.read_text() for file in folder.iterdir()}
    before = corpus.fingerprint()
    assert json.loads(json.dumps(before)) == before
    assert _prepared(tmp_path / "copy", texts, seed=7).fingerprint() == before
    assert corpus.differences(before) == []
    kept = sorted(corpus.train.names)

    swapped = texts | {kept[0]: texts[kept[0]].replace("has the", "the has")}
    (told,) = _prepared(tmp_path / "text", swapped).differences(before)
    assert "the training documents hold another text" in told
    swapped = texts | {kept[0]: texts[kept[1]], kept[1]: texts[kept[0]]}
    (told,) = _prepared(tmp_path / "order", swapped).differences(before)
    assert "another order" in told
    assert _prepared(tmp_path / "order", swapped).differences(before, trained=False) == []


def test_what_was_trained_on_and_is_held_out_now_is_named(tmp_path):
    """A file that joins makes room for a long document on the other side."""
    texts = {"small.txt": "small " * 40} | {f"{i}.txt": f"document {i} " * 10 for i in range(4)}
    before = _prepared(tmp_path / "before", texts, heldout=0.3)
    texts["large.txt"] = "other text, much of it " * 300
    now = _prepared(tmp_path / "now", texts, heldout=0.3)
    trained = set(before.train.names) & set(now.heldout.names)
    told = now.differences(before.fingerprint(), trained=False)
    assert "held-out documents were not held out then ('" in told[-1]
    for name in trained:
        assert name in told[-1] or "..." in told[-1]
    old = {name: value for name, value in before.fingerprint().items() if name not in ("training", "heldout")}
    assert before.differences(old) == []
    for broken in (None, 3, {}, [[1], None]):
        assert before.differences(before.fingerprint() | {"heldout": broken, "training": broken})


def test_text_that_the_tokenizer_lacks_is_told_or_refused(tmp_path):
    """Fails when it becomes one unknown token in silence: perplexity 1.00."""
    words = {word: i for i, word in enumerate(["<unk>", "one", "two"])}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "words.json"))
    options = {"tokenizer": str(tmp_path / "words.json"), "heldout": 0.5}
    with pytest.raises(UsageError, match=r"words.json\) cannot represent 100% of the corpus' .* more than the 20%"):
        _prepared(tmp_path / "none", {"a.txt": "три four " * 30, "b.txt": "fünf six " * 30}, **options)
    some = _prepared(tmp_path / "some", {"a.txt": "one two one two six " * 30, "b.txt": "two one " * 30}, **options)
    assert some.lost == pytest.approx(3 * 30 / (15 * 30 + 6 * 30))
    told = data.notes(some, config.Data(needles=config.Needles(rows=0.0)), [STAGE])
    assert told[1] == "The tokenizer cannot represent 14.29% of the text's characters."
    whole = _prepared(tmp_path / "whole", {"a.txt": "one two " * 30})
    assert data.notes(whole, config.Data(needles=config.Needles(rows=0.0)), [STAGE]) == [
        "Held out: 1 of 2 documents ('a.txt (end)'), 20.2% of the text.",
        "The tokenizer represents all of the text.",
    ]


def test_facts_without_room_are_told_or_refused(tmp_path):
    """Fails when rows are left as they are in silence, and retrieval is measured of a model that saw no fact."""
    texts = {f"{i:02}.txt": f"{i:02} words" for i in range(40)}
    short = _prepared(tmp_path / "short", texts)
    with pytest.raises(UsageError, match=r"no row of training.stages\[0\] has a piece of 12 tokens"):
        data.batches(short, PLANTED, STAGE, 0, 0)
    data.batches(short, PLAIN, STAGE, 0, 0)
    some = _prepared(tmp_path / "some", texts | {f"{i:02}.txt": f"{i} more words " * 3 for i in range(8)})
    always = config.Data(needles=config.Needles(rows=1.0, facts=3))
    epoch = config.Stage(steps=1, batch=some.train.size // STAGE.length, length=STAGE.length)
    planted = next(data.batches(some, always, epoch, 0, 0))["answers"].sum(axis=1)
    (told,) = data.notes(some, always, [epoch])[2:]
    assert f"{np.mean(planted > 0):.1%} of the rows" in told
    assert f"{planted.mean():.1f} of the 3 asked for" in told
    assert "training.stages[0]" in told


def test_rows_depend_on_seed_and_stage_alone(corpus):
    def start(seed, stage_index):
        return _take(data.batches(corpus, PLANTED, STAGE, seed, stage_index), 5)

    _assert_same(start(0, 0), start(0, 0))
    for other in (start(1, 0), start(0, 1)):
        assert _rows(start(0, 0)) != _rows(other)


def test_batches_have_the_asked_shape_and_share_of_planted_rows(corpus):
    batches = _take(data.batches(corpus, PLANTED, STAGE, 0, 0), 200)
    dtypes = {name: array.dtype.name for name, array in batches[0].items()}
    assert dtypes == {
        "tokens": "int32",
        "targets": "int32",
        "weights": "float32",
        "answers": "bool",
        "segment_ids": "int32",
        "positions": "int32",
    }
    assert all(array.shape == (4, 64) for array in batches[0].values())
    planted = np.concatenate([batch["answers"].any(axis=1) for batch in batches])
    assert 0.43 < planted.mean() < 0.57  # of 800 rows: four standard deviations


def test_the_same_row_is_planted_anew_each_epoch(corpus):
    rows = corpus.train.size // STAGE.length
    stage = config.Stage(steps=1, batch=rows, length=STAGE.length)
    always = config.Data(needles=config.Needles(rows=1.0, facts=2))
    first, second = _take(data.batches(corpus, always, stage, 0, 0), 2)
    assert not set(_rows([first])) & set(_rows([second]))


@pytest.mark.parametrize("taken", [0, 3, 90])
def test_resumed_iterator_goes_on_where_it_was(corpus, taken):
    """Fails when the state names what was read ahead instead of what was given."""
    iterator = data.batches(corpus, PLANTED, STAGE, 0, 0)
    _take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = _take(iterator, 3)
    resumed = data.batches(corpus, PLANTED, STAGE, 0, 0)
    resumed.set_state(state)
    _assert_same(_take(resumed, 3), expected)
    iterator.set_state(state)
    _assert_same(_take(iterator, 3), expected)


def test_orbax_saves_and_restores_the_iterator(corpus, tmp_path):
    iterator = data.batches(corpus, PLANTED, STAGE, 0, 0)
    _take(iterator, 3)
    ocp.save_checkpointables(tmp_path / "step", {"data": iterator})
    expected = _take(iterator, 3)
    resumed = data.batches(corpus, PLANTED, STAGE, 0, 0)
    ocp.load_checkpointables(tmp_path / "step", {"data": resumed})
    _assert_same(_take(resumed, 3), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_are_the_batch(corpus, processes):
    """What each process gets is together what one process gets, planted facts included, at every step."""
    whole = data.batches(corpus, PLANTED, STAGE, 0, 0)
    shares = [data.batches(corpus, PLANTED, STAGE, 0, 0, p, processes) for p in range(processes)]
    for _ in range(30):
        expected, given = next(whole), [next(share) for share in shares]
        assert all(len(batch["tokens"]) == STAGE.batch // processes for batch in given)
        for name, array in expected.items():
            np.testing.assert_array_equal(np.stack([batch[name] for batch in given], axis=1).reshape(4, 64), array)


def test_a_batch_can_be_named(corpus):
    iterator = data.batches(corpus, PLANTED, STAGE, 0, 1)
    _take(iterator, 3)
    assert data.describe(iterator, STAGE, 1) == "batch 2 of stage 1 (its rows 8 to 11)"


def test_one_row_is_enough(corpus):
    stage = config.Stage(steps=1, batch=4, length=corpus.train.size)
    assert len(set(_rows(_take(data.batches(corpus, PLAIN, stage, 0, 0), 2)))) == 1


def test_what_cannot_be_batched_is_refused(corpus):
    size = corpus.train.size
    with pytest.raises(UsageError, match=rf"stages\[2\] has rows of {size + 1} tokens.* rows of at most {size} tokens"):
        data.batches(corpus, PLAIN, config.Stage(1, 4, size + 1), 0, 2)
    with pytest.raises(UsageError, match=r"stages\[0\] has a batch of 4 rows, which 3 processes"):
        data.batches(corpus, PLAIN, STAGE, 0, 0, 0, 3)
    with pytest.raises(UsageError, match="facts is 99, and the vocabulary has words for 31 keys"):
        data.batches(corpus, config.Data(needles=config.Needles(rows=0.1, facts=99)), STAGE, 0, 0)
