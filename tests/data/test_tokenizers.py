"""Text survives the tokenizers, special tokens never come from it, and streaming gives the same text."""

import json
import time

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from longctx.data import Tokenizer
from longctx.data import tokenizers as module
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


PROSE = "\n".join(
    f"It's line {i}, don't   stop: x{i}=({i * 7919 % 1000}/3);\r\n\n\tünïcödé 漢字、かな。🧑‍🚀 "
    + ("a" * (i % 130)) + ")\n\n" * (i % 3)
    for i in range(200)
)  # fmt: skip


def _gpt2(path):
    return Tokenizer.train([PROSE, *CORPUS], 700)


def _cl100k(path):
    """Punctuation takes the line ends after it, digits come in threes."""
    backend = tokenizers.Tokenizer(models.BPE())
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    return _trained(backend, trainer, path)


def _trained(backend, trainer, path):
    backend.train_from_iterator([PROSE, *CORPUS], trainer)
    backend.save(str(path))
    return Tokenizer.load(path)


def _llama(path):
    """No words: merges over the whole text, which is begun with a space."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    _trained(backend, trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=["<unk>"]), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": None}))
    return Tokenizer.load(path)


def _unigram(path):
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    return _trained(backend, trainer, path)


def _bert(path):
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, show_progress=False, special_tokens=["[UNK]"])
    return _trained(backend, trainer, path)


@pytest.mark.parametrize("make", [_gpt2, _cl100k, _llama, _unigram, _bert, lambda path: Tokenizer.bytes()])
def test_parts_of_a_text_have_the_ids_of_the_whole(monkeypatch, tmp_path, make):
    """Fails when a part ends within a word, or each part is begun with a space that the text does not have."""
    tokenizer = make(tmp_path / "tokenizer.json")
    whole = tokenizer.encode(PROSE)
    assert whole.tolist() == tokenizer._reader.encode(PROSE, add_special_tokens=False).ids
    for part in (100, 137, 1000):
        monkeypatch.setattr(module, "_PART", part)
        ends = [end for _, end in tokenizer._parts(PROSE)]
        assert len(PROSE) / part / 4 < len(ends) <= len(PROSE) / part
        np.testing.assert_array_equal(tokenizer.encode(PROSE), whole)


ODD = ["a", " ", "\n", "\r\n", "é", "e\u0301", "漢", "\ufb01", "\u200d", "🧑", "</s>", "<unk>", "<|fact|>", "[UNK]"]
ODD += ["\ud800", "\0", "\x01", "▁", "12", "'s", "\ufeff", "\ufffd"]


@pytest.mark.parametrize("make", [_gpt2, _cl100k, _llama, _unigram, _bert, _existing])
def test_any_text_is_encoded_or_refused_in_a_sentence(monkeypatch, tmp_path, make):
    """No special token, no other error, and the stream of its ids is their text."""
    tokenizer, rng = make(tmp_path / "tokenizer.json"), np.random.default_rng(0)
    for i in range(300):
        monkeypatch.setattr(module, "_PART", (5, 20, 2**16)[i % 3])
        text = "".join(rng.choice(ODD, rng.integers(1, 20)))
        try:
            tokenizer.check_prompt(text)
        except UsageError:
            pass
        else:
            assert tokenizer._unknown not in tokenizer.encode(text)
        if "\ud800" in text:
            continue
        ids = tokenizer.encode(text)
        assert not (tokenizer.special - {tokenizer._unknown}).intersection(ids.tolist())
        stream = tokenizer.stream()
        assert "".join(stream.push(index) for index in ids) + stream.flush() == tokenizer.decode(ids)


def test_long_texts_are_encoded_in_parts(monkeypatch):
    """Fails when a document is encoded as one: 150 bytes a character, 7.5 GiB of a file of 50 MB."""
    monkeypatch.setattr(module, "_PART", 100)
    monkeypatch.setattr(module, "_LONGEST_PART", 400)
    monkeypatch.setattr(module, "_AT_ONCE", 1000)
    tokenizer, given = Tokenizer.train(CORPUS, 400), []
    encoded = tokenizer._encoded
    monkeypatch.setattr(
        tokenizer, "_encoded", lambda encode, texts: given.append(len("".join(texts))) or encoded(encode, texts)
    )
    texts = [PROSE, "a" * 5000, " " * 5000, "x", "", "12" * 3000]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
    assert max(given) <= 1400


def test_long_texts_are_learnt_from_in_parts(monkeypatch, tmp_path):
    """The merges are those of the whole, for which the library takes 100 bytes a character."""
    for name, part in (("whole", 2**16), ("parts", 100)):
        monkeypatch.setattr(module, "_PART", part)
        assert len(list(module._between_words(PROSE))) >= len(PROSE) // (part + 200)
        Tokenizer.train([PROSE, *CORPUS], 700).save(tmp_path / name)
    assert (tmp_path / "whole").read_text() == (tmp_path / "parts").read_text()


def test_learning_from_an_unbroken_run_takes_a_moment():
    """Fails when merges are learnt from the run as one word: 12 seconds, four times as many of twice the letters."""
    letters = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), 150_000))
    before = time.process_time()
    tokenizer = Tokenizer.train([letters, *CORPUS], 1000)
    assert time.process_time() - before < 6
    assert tokenizer.vocab_size == 1000
    assert tokenizer.decode(tokenizer.encode(letters)) == letters


def _counted(monkeypatch, tokenizer):
    """The ids that each call of `decode` was given, by number."""
    calls, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, special=False: calls.append(len(ids)) or decode(ids, special))
    return calls


@pytest.mark.parametrize("content", [b"\xff", b"\xe2\x82", b"a\xf0\x9f", b"", b"\xf0\x9f\xa7\x91\xff"])
def test_stream_of_no_text_is_written_in_constant_time(monkeypatch, tmp_path, content):
    """Fails when ids wait until their bytes are text: nothing is written, and each id decodes all before it."""
    tokenizer = Tokenizer.bytes()
    names = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    names |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - names.keys()))}  # GPT-2's
    tokenizer.save(tmp_path / "tokenizer.json")
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    ids = [vocabulary[names[byte]] for byte in content] or [tokenizer.padding]
    ids, calls, stream = ids * (1000 // len(ids)), _counted(monkeypatch, tokenizer), tokenizer.stream()
    pieces = [stream.push(index) for index in ids]
    assert max(calls, default=0) < 16
    assert len(calls) <= 3 * len(ids)
    assert max(len(piece) for piece in pieces) < 16
    assert "".join(pieces) + stream.flush() == content.decode(errors="replace") * (1000 // max(len(content), 1))


@pytest.mark.parametrize("seed", range(5))
def test_stream_of_broken_text_is_its_text(seed):
    """Characters of every width with bytes taken out and put in."""
    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer.train(CORPUS, 400) if seed % 2 else Tokenizer.bytes()
    ids = np.concatenate([tokenizer.encode(c) for c in rng.choice(["a", "é", "€", "🧑", "\ufffd"], 300)])
    ids = np.where(rng.random(len(ids)) < 0.3, rng.choice(ids, len(ids)), ids)[rng.random(len(ids)) < 0.9]
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


def _pieces(words):
    return [(word, -1.0 - index) for index, word in enumerate(words)]


def _word_piece(words):
    return models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>")


LETTERS = ["▁", *"abdeocumntf<>/|k", "##b", "##e"]
NAMES = ["<unk>", "</s>", "<|fact|>", "</"]
MODELS = {
    "WordLevel": lambda words: models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"),
    "WordPiece": _word_piece,
    "Unigram": lambda words: models.Unigram(_pieces(words), 0, False),
    "BPE, merged": lambda words: models.BPE(
        {word: i for i, word in enumerate([*words, "s>", "s"])}, [("<", "/"), ("s", ">"), ("</", "s>")]
    ),
    "BPE, words as they are": lambda words: models.BPE(
        {word: i for i, word in enumerate([*words, "s"])}, [], unk_token="<unk>", ignore_merges=True
    ),
}
SPLITS = {"words": pre_tokenizers.WhitespaceSplit, "pieces": pre_tokenizers.Metaspace, "nothing": lambda: None}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", MODELS)
def test_no_vocabulary_yields_special_tokens_from_text(tmp_path, kind, split):
    """Fails when the library alone is told: its models look up "</s>" among words and pieces all the same."""
    backend = tokenizers.Tokenizer(MODELS[kind]([*NAMES, *LETTERS]))
    if split != "nothing":
        backend.pre_tokenizer = SPLITS[split]()
    backend.add_special_tokens(["</s>", "<s>", "a<unk>"])
    backend.add_tokens(["<|ask|>", "mm"])  # the last is text, as the file says
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    names = ["</s>", "<s>", "a<unk>", "<|padding|>", "<|document|>", "<|fact|>", "<|ask|>"]
    special = {backend.token_to_id(name) for name in names[:3]} | {backend.token_to_id(name) for name in ("<|fact|>",)}
    special |= {tokenizer.padding, tokenizer.document, tokenizer.fact, tokenizer.ask}
    assert special <= tokenizer.special
    for text in ("a </s> b", *names, *(f"a{name}b" for name in names), *(f"▁{name} " for name in names)):
        assert not tokenizer.special.intersection(tokenizer.encode(text).tolist()), text
    assert backend.token_to_id("mm") in tokenizer.encode("a mm b")
    for name in names:
        assert tokenizer.decode([backend.token_to_id(name)] if backend.token_to_id(name) else []) == ""
    tokenizer.save(tmp_path / "again.json")
    again = Tokenizer.load(tmp_path / "again.json")
    np.testing.assert_array_equal(again.encode("a </s> b"), tokenizer.encode("a </s> b"))
    assert again.decode([tokenizer.fact], special=True) == "<|fact|>"


def test_what_text_says_keeps_its_ids(tmp_path):
    """The library's own ids, where the text names nothing special."""
    for kind, make in MODELS.items():
        backend = tokenizers.Tokenizer(make([*NAMES, *LETTERS]))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.add_special_tokens(["</s>", "<unk>"])
        backend.save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
        for text in ("a b", "abde document", "unfound <| a|", "a<b>c</d>e"):
            assert tokenizer.encode(text).tolist() == backend.encode(text).ids, (kind, text)


def test_a_text_has_the_same_tokens_each_time(tmp_path):
    """Fails when the dropout of a tokenizer.json, which is for training, is used."""
    vocabulary = {character: i for i, character in enumerate("abcdefgh")}
    merges = [(left, right) for left in "abcd" for right in "efgh"]
    vocabulary |= {left + right: 8 + i for i, (left, right) in enumerate(merges)}
    tokenizers.Tokenizer(models.BPE(vocabulary, merges, dropout=0.5)).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert len(tokenizer.encode("aebfcgdh" * 50)) == 200


@pytest.mark.parametrize("form", ["NFC", "NFKC", "NFD", "Lowercase", "StripAccents after NFD"])
def test_prompts_are_looked_at_as_the_tokenizer_normalises_them(tmp_path, form):
    words = {"NFC": ["é", "x"], "NFKC": ["é", "fi", "x"], "NFD": ["e\u0301", "x"], "Lowercase": ["e\u0301", "x"]}
    words = ["<unk>", *words.get(form, ["e", "x"])]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.normalizer = normalizers.Sequence(
        [getattr(normalizers, name)() for name in reversed(form.split(" after "))]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    tokenizer.check_prompt("x e\u0301\n")
    if form == "NFKC":
        tokenizer.check_prompt("x ﬁ")
    if form == "Lowercase":
        tokenizer.check_prompt("X")
    with pytest.raises(UsageError, match=r"'q' \(U\+0071\) at character 5,"):
        tokenizer.check_prompt("x e\u0301 q x")


def test_a_byte_that_is_a_special_token_is_not_there_for_text(tmp_path):
    """Fails when it is dropped in silence, since vocabularies of bytes have every text otherwise."""
    Tokenizer.train(CORPUS, 400).save(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["!"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.count_lost(["the number!!"]) == (2, 11)
    with pytest.raises(UsageError, match=r"'!!' at character 10,"):
        tokenizer.check_prompt("the number!!")


def test_what_cannot_be_represented_is_counted(tmp_path, tokenizer):
    assert tokenizer.count_lost(TEXTS)[0] == 0
    assert _existing(tmp_path / "tokenizer.json").count_lost(["the number", "of one", " "]) == (2, 14)


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "Unigram"])
def test_a_vocabulary_that_gives_up_is_told_in_a_sentence(tmp_path, kind):
    model = {
        "WordLevel": models.WordLevel({"a": 0}),
        "WordPiece": models.WordPiece({"a": 0}, unk_token="[UNK]"),
        "Unigram": models.Unigram([("a", -1.0)], None, False),
    }[kind]
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    for use in (tokenizer.encode, tokenizer.check_prompt, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(UsageError, match=r"cannot encode the text .*unknown token"):
            use("b")


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
