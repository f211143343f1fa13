"""Text survives the tokenizers, special tokens never come from it, and streaming gives the same text."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from longctx.data import Tokenizer
from longctx.errors import UsageError

TEXTS = [
    "def half(number):\n    return number / 2\n",
    "Ünïcödé, 漢字, emoji 🧑‍🚀 and \ufffd.\r\n\ttabs  and   spaces ",
    "<|document|><|fact|> <|ask|><|padding|>",
    "",
]
CORPUS = [f"the function number_{i} returns the number {i} of the document\n" * 3 for i in range(50)] + TEXTS


def _existing(path):
    """A word-level tokenizer.json without bytes to fall back on, with a special token of its own and truncation."""
    words = ["<unk>", "<|document|>", "the", "number", "one"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|document|>"])
    backend.enable_truncation(2)
    backend.save(str(path))
    return Tokenizer.load(path)


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request):
    return Tokenizer.train(CORPUS, 400) if request.param == "bpe" else Tokenizer.bytes()


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.max(initial=0) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, special=True) == text


def test_special_tokens_never_come_from_text(tokenizer):
    """Fails when `encode_special_tokens` is left unset: "<|fact|>" in a document would then be a fact."""
    special = {tokenizer.padding, tokenizer.document, tokenizer.fact, tokenizer.ask}
    assert special == {0, 1, 2, 3}
    assert tokenizer.padding == 0
    for ids in [tokenizer.encode(TEXTS[2]), *tokenizer.encode_batch(TEXTS)]:
        assert not special.intersection(ids.tolist())


def test_special_tokens_are_shown_on_request_only(tokenizer):
    ids = [tokenizer.document, *tokenizer.encode("a"), tokenizer.fact]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, special=True) == "<|document|>a<|fact|>"


def test_batch_is_each_text_alone(tokenizer):
    for ids, text in zip(tokenizer.encode_batch(CORPUS * 2), CORPUS * 2, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_training_is_deterministic():
    first, second = Tokenizer.train(CORPUS, 400), Tokenizer.train(CORPUS, 400)
    assert first.vocab_size == second.vocab_size == 400
    np.testing.assert_array_equal(
        np.concatenate(first.encode_batch(CORPUS)), np.concatenate(second.encode_batch(CORPUS))
    )


def test_saved_is_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert loaded.vocab_size == tokenizer.vocab_size
    for text in TEXTS:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_the_text_piece_by_piece(tokenizer, text):
    """Fails when an unfinished character is given out: the pieces would hold U+FFFD where the text has none."""
    stream = tokenizer.stream()
    pieces = [stream.push(index) for index in tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    assert stream.flush() == ""
    assert "\ufffd" in text or "\ufffd" not in "".join(pieces)


def test_stream_of_any_bytes_is_their_text():
    """What an untrained model writes: bytes that are no UTF-8, special tokens in between."""
    tokenizer = Tokenizer.bytes()
    ids = np.random.default_rng(0).integers(tokenizer.vocab_size, size=400)
    stream = tokenizer.stream()
    assert "".join(stream.push(index) for index in ids) + stream.flush() == tokenizer.decode(ids)


def test_words_are_words():
    pairs = [f" {chr(97 + i) * 2}{chr(97 + j) * 2}" for i in range(10) for j in range(10)]
    tokenizer = Tokenizer.train(CORPUS + pairs * 50, 700)
    words = [tokenizer.decode([index]) for index in Tokenizer.bytes().words]
    assert sorted(words) == sorted("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert tokenizer.words.dtype == np.int32
    texts = [tokenizer.decode([index]) for index in tokenizer.words]
    assert len(set(tokenizer.words.tolist())) == len(texts) >= 64
    assert all(text[0] == " " and len(text) >= 4 and text[1:].isalpha() for text in texts)


def test_existing_tokenizer_gets_the_special_tokens(tmp_path):
    tokenizer = _existing(tmp_path / "tokenizer.json")
    assert (tokenizer.document, tokenizer.vocab_size) == (1, 8)
    assert {tokenizer.padding, tokenizer.fact, tokenizer.ask} == {5, 6, 7}
    np.testing.assert_array_equal(tokenizer.encode("the number one"), [2, 3, 4])  # not truncated
    np.testing.assert_array_equal(tokenizer.encode("<|fact|>"), [0])


def test_prompt_that_cannot_be_represented_is_refused(tmp_path, tokenizer):
    tokenizer.check_prompt("".join(TEXTS))
    existing = _existing(tmp_path / "tokenizer.json")
    existing.check_prompt("the number  one\n")
    with pytest.raises(UsageError, match=r"'é' \(U\+00E9\) at character 11, .* vocabulary of 8 entries"):
        existing.check_prompt("the number é one é")
    with pytest.raises(UsageError, match=r"U\+DCFF\) at character 1,"):
        tokenizer.check_prompt("a\udcff")


def test_characters_that_are_dropped_are_refused(tmp_path):
    """Byte-pair encoding without an unknown token leaves out what it does not know, without a trace in the ids."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.decoder = decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"'c' \(U\+0063\) at character 2,"):
        Tokenizer.load(tmp_path / "tokenizer.json").check_prompt("abcab")


def test_stream_joins_words_as_decoding_does(tmp_path):
    """Fails when each id is decoded alone: the spaces between words come from the ids before."""
    tokenizer = _existing(tmp_path / "tokenizer.json")
    stream = tokenizer.stream()
    assert "".join(stream.push(index) for index in (2, 3, 4)) + stream.flush() == tokenizer.decode([2, 3, 4])
    assert tokenizer.decode([2, 3, 4]) == "the number one"


@pytest.mark.parametrize(
    ("content", "words"), [(None, "is not a file"), ("{", "holds no tokenizer"), (json.dumps({}), "holds no")]
)
def test_what_is_no_tokenizer_is_refused(tmp_path, content, words):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=words) as error:
        Tokenizer.load(file)
    assert str(file) in str(error.value)
