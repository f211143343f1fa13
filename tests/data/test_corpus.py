"""Documents are read whole and in order, split for good, and refused in a sentence."""

import errno
import gzip
import json
import os

import numpy as np
import pytest

from longctx.data import Tokenizer, corpus
from longctx.errors import UsageError


def _documents(count):
    return [corpus.Document(f"{i}.txt", f"document {i} " * (i + 1)) for i in range(count)]


def test_folder_is_read_recursively_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")  # a byte order mark is no text
    (tmp_path / "c.rst.gz").write_bytes(gzip.compress(b"three", mtime=0))
    (tmp_path / "d.jsonl").write_text('{"text": "four", "id": 1}\n\n"five\\u2028"\n')
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.txt").write_text("no")
    assert corpus.read(str(tmp_path)) == [
        ("a.txt", "one"),
        ("b/two.md", "two"),
        ("c.rst.gz", "three"),
        ("d.jsonl:1", "four"),
        ("d.jsonl:3", "five\u2028"),
    ]


def test_numbers_of_any_length_are_passed_over(tmp_path):
    """Fails when they are read as integers, which Python does up to 4,300 digits only."""
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": ' + "1" * 5000 + "}\n")
    assert corpus.read(str(tmp_path)) == [("a.jsonl:1", "one")]


def test_links_to_folders_are_followed_once(tmp_path):
    """Fails when they are left out in silence, or when one that leads upwards is followed for ever."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "deep").mkdir(parents=True)
    root.mkdir()
    (outside / "deep" / "a.txt").write_text("one")
    (root / "b.txt").write_text("two")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (outside / "back").symlink_to(root)
    (root / "itself").symlink_to(root / "itself")
    assert corpus.read(str(root)) == [("b.txt", "two"), ("linked/deep/a.txt", "one")]
    (root / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"gone.txt' cannot be read"):
        corpus.read(str(root))


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("one")
    scandir = os.scandir

    def refusing(folder):
        if "closed" in str(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UsageError, match="closed' cannot be read \\(Permission denied\\)"):
        corpus.read(str(tmp_path))


def test_runs_among_the_documents_are_left_out(tmp_path):
    """Fails when a run's own log of steps and reports are text of its second start."""
    (tmp_path / "a.txt").write_text("one")
    for run in (tmp_path / "runs" / "first", tmp_path):
        (run / "report").mkdir(parents=True)
        (run / "config.json").write_text('{"model": {}, "training": {}}')
        (run / "data.json").write_text("{}")
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
        (run / "report" / "notes.md").write_text("a report")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"of": "somebody else"}')
    (tmp_path / "other" / "data.json").write_text("{}")
    (tmp_path / "other" / "b.txt").write_text("two")
    assert corpus.read(str(tmp_path)) == [("a.txt", "one"), ("other/b.txt", "two")]


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_no_regular_file_is_refused(tmp_path, folder):
    """Fails when it is read: a device has no end, and a pipe waits for a writer."""
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "pipe.txt")
    for file in (tmp_path / "endless.txt", tmp_path / "pipes" / "pipe.txt"):
        with pytest.raises(UsageError, match=f"{file.name}' cannot be read .*no regular file"):
            corpus.read(str(file.parent if folder else file))


CONTENTS = [b"text here", b"", bytes(range(256)), b'{"text": "a b"}\n"x"\n', b'{"text": 3}', b"null", b"[]", b"1e999"]
CONTENTS += [b'\xef\xbb\xbf"x"', b'"\\ud800"', b'{"text": "a", "n": NaN}', b'{"text": "a"} and more', b'{"a": [[[]]]}']


def test_any_folder_is_read_or_refused_in_a_sentence(tmp_path):
    """Files of every kind with every content, some compressed, a bit flipped in some."""
    rng, read = np.random.default_rng(0), 0
    for i in range(300):
        root = tmp_path / str(i)
        root.mkdir()
        for name in rng.choice(["a.txt", "b.jsonl", "c.txt.gz", "d.jsonl.gz", "e.md", "f.bin"], 3):
            content = bytearray(CONTENTS[rng.integers(len(CONTENTS))])
            if name.endswith("gz") and rng.random() < 0.8:
                content = bytearray(gzip.compress(content))
            if content and rng.random() < 0.2:
                content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            (root / name).write_bytes(content)
        try:
            corpus.split(corpus.read(str(root)), 0.3)
            read += 1
        except UsageError:
            pass
    assert 20 < read < 280


@pytest.mark.parametrize("path", ["x" * 5000, "/".join("x" * 5000), "~nobody_of_this_name/a.txt", "a\0b"])
def test_paths_that_no_file_has_are_refused(path):
    with pytest.raises(UsageError, match=r"data.path is '.*(cannot be read|no file can be)") as error:
        corpus.read(path)
    assert len(str(error.value)) < 400
    with pytest.raises(UsageError, match="the tokenizer is '"):
        Tokenizer.load(path)


def test_names_that_are_no_text_can_be_shown(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("one")
    ((name, _),) = corpus.read(str(tmp_path))
    assert name.encode() == b"caf\\udce9.txt"


def test_standard_library_is_the_default():
    documents = corpus.read("")
    names = [document.name for document in documents]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    assert 8_000_000 < sum(len(document.text) for document in documents) < 20_000_000


def test_split_is_of_the_asked_size_and_loses_nothing():
    documents = _documents(2000)
    train, heldout = corpus.split(documents, 0.1)
    assert sorted(train + heldout) == sorted(documents)
    assert 150 < len(heldout) < 250


def test_split_keeps_each_document_on_its_side_whatever_else_is_there():
    """Fails when the side depends on the order, the name or the number of documents."""
    documents = _documents(300)
    heldout = {document.text for document in corpus.split(documents, 0.1)[1]}
    some = [corpus.Document(f"elsewhere/{name}", text) for name, text in reversed(documents[::2])]
    assert {document.text for document in corpus.split(some, 0.1)[1]} == heldout & {text for _, text in some}


def test_split_is_the_same_in_every_process():
    """The hash is a stated one, so that a run that is resumed elsewhere holds out the same documents."""
    assert [document.name for document in corpus.split(_documents(100), 0.05)[1]] == [
        "0.txt",
        "20.txt",
        "62.txt",
        "86.txt",
    ]


@pytest.mark.parametrize("fraction", [1e-6, 0.05, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_neither_side_of_a_split_is_empty(count, fraction):
    documents = _documents(count)
    train, heldout = corpus.split(documents, fraction)
    assert train
    assert heldout
    assert sorted(_rejoined(train, heldout)) == sorted(documents)
    assert all(document.text.strip() for document in train + heldout)


def _rejoined(train, heldout):
    """The documents, those that were cut whole again."""
    ends = {name.removesuffix(" (end)"): text for name, text in heldout if name.endswith(" (end)")}
    starts = {name.removesuffix(" (start)"): text for name, text in train if name.endswith(" (start)")}
    assert ends.keys() == starts.keys()
    whole = [document for document in train + heldout if not document.name.endswith((" (start)", " (end)"))]
    return whole + [corpus.Document(name, text + ends[name]) for name, text in starts.items()]


def _share(train, heldout):
    size, kept = (sum(len(document.text) for document in side) for side in (heldout, train))
    return size / (size + kept)


@pytest.mark.parametrize("seed", range(60))
def test_held_out_is_a_share_of_the_text(seed):
    """Fails when documents are counted: of two, half of the text is held out, of ten with a long one most of it.

    Corpora of 1 to 40 documents, of one length or from ten characters to a hundred thousand, some of them copies.
    """
    rng = np.random.default_rng(seed)
    count, fraction = rng.integers(1, 40), rng.choice([0.01, 0.05, 0.2])
    sizes = 10 ** (rng.uniform(1.5, 4, count) if seed % 2 else np.full(count, 3.0))
    texts = [f"{i}: " + "".join(rng.choice(list("abc d"), int(size))) for i, size in enumerate(sizes)]
    texts += list(rng.choice(texts, rng.integers(0, 5))) if count > 1 else []
    documents = [corpus.Document(f"{i}.txt", text) for i, text in enumerate(texts)]
    train, heldout = corpus.split(documents, fraction)
    assert sorted(_rejoined(train, heldout)) == sorted(documents)
    slack = 5 / sum(map(len, texts))  # a character of each copy
    assert fraction / 2 - slack <= _share(train, heldout) <= 2 * fraction + slack
    assert not {document.text for document in train} & {document.text for document in heldout}  # copies on one side


def test_a_document_too_long_to_be_held_out_is_trained_on():
    """The other documents stay on their sides."""
    documents = _documents(300)
    heldout = corpus.split(documents, 0.1)[1]
    book = next(text for text in (f"book {i} " * 100_000 for i in range(1000)) if corpus._point(text) < 0.05)
    train, now = corpus.split([*documents, corpus.Document("book.txt", book)], 0.1)
    assert "book.txt" in {document.name for document in train}
    assert set(heldout) <= set(now)


def test_a_lone_document_is_cut():
    (train,), (heldout,) = corpus.split([corpus.Document("book.txt", "0123456789" * 10)], 0.2)
    assert train == ("book.txt (start)", "0123456789" * 8)
    assert heldout == ("book.txt (end)", "0123456789" * 2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing", None, ["does not exist", "leave it empty"]),
        ("paper.pdf", b"text", ["not a kind of file", ".jsonl"]),
        ("a.txt", b" \n\t", ["all empty"]),
        ("a.txt", b"abc\xff", ["not UTF-8", "0xff at 3"]),
        ("a.txt", b"ab\0c", ["NUL at character 2"]),
        ("a.txt.gz", b"plain", ["cannot be read"]),
        ("a.txt.gz", gzip.compress(b"long enough to be cut", mtime=0)[:-9], ["cannot be read"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        ("a.jsonl", b'"a"\n\n{"content": "a"}', ["line 3", "an object with ['content']", '"text"']),
        ("a.jsonl", b"[1, 2]", ["line 1", "is [1, 2]"]),
        ("a.jsonl", b"1" * 4301, ["line 1", "is 1111"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "nested too deeply"]),
        ("a.jsonl", b'{"text": ' * 100_000, ["line 1", "nested too deeply"]),
        ("a.jsonl", json.dumps("\ud800").encode(), ["line 1", "surrogate"]),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_what_cannot_be_read_is_named(tmp_path, name, content, words, folder):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    if folder and (content is None or name == "paper.pdf"):
        words = ["holds no documents", ".jsonl"]
    with pytest.raises(UsageError) as error:
        corpus.read(str(tmp_path if folder else file))
    for word in [*words, str(tmp_path)]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([corpus.Document("a.txt", "x")], ["'a.txt'", "1 characters", "more text"]),
        ([corpus.Document("a.txt", "same"), corpus.Document("b.txt", "same")], ["2 copies", "'a.txt'"]),
    ],
)
def test_what_cannot_be_split_is_refused(documents, words):
    with pytest.raises(UsageError) as error:
        corpus.split(documents, 0.05)
    for word in words:
        assert word in str(error.value)
