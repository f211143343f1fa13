"""Tokenizers: byte-level byte-pair encoding, bytes, or an existing `tokenizer.json`, with four special tokens.

Bytes are a byte-level vocabulary without merges. What a text says never yields a special token: a literal
"<|fact|>" in a document is encoded as its characters, and so is whatever a tokenizer.json calls special. Added tokens
that it does not call special, such as runs of spaces, are text.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from longctx.data import files
from longctx.data.stream import TextStream
from longctx.errors import UsageError
from longctx.progress import Progress

SPECIAL = ("<|padding|>", "<|document|>", "<|fact|>", "<|ask|>")

# Characters encoded as one and at once: the library takes some 150 bytes for each until the ids are arrays.
_PART, _LONGEST_PART, _AT_ONCE = 2**16, 2**20, 2**21
_CUTS = (re.compile(r"(?<=\S)(?=\s)"), re.compile(r"\b|(?<=\d)(?=\D)|(?<=\D)(?=\d)"))  # a part may end there
_AROUND = 200  # characters on each side that say whether it does
_LONGEST_WORD = 256  # bytes that merges are learnt from together: the time of learning goes with their square


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      vocab_size: ids are below it, the special tokens' among them.
      padding: id that fills rows, which no model looks at; 0 unless a tokenizer.json puts it elsewhere.
      document: id that begins each document, and is predicted at its end.
      fact, ask: ids that begin the statements and the questions of the retrieval task.
      special: ids that no text yields by their names, these four among them.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """Wraps `backend`, to which the special tokens are added where it lacks them."""
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens(list(SPECIAL))
        self._backend = backend
        description = json.loads(backend.to_str())
        self.special = frozenset(token["id"] for token in description["added_tokens"] if token["special"])
        self._unknown = _unknown(description["model"])
        self._complete = _is_complete(description)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.padding, self.document, self.fact, self.ask = (backend.token_to_id(token) for token in SPECIAL)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level byte-pair encoding (Sennrich et al. 2016; GPT-2) learnt from `texts`, of at most `vocab_size`."""
        backend = _byte_level(models.BPE(), use_regex=True)
        whole = backend.pre_tokenizer
        runs = pre_tokenizers.Split(tokenizers.Regex(f".{{{_LONGEST_WORD}}}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([whole, runs])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=sys.stderr.isatty(),
        )
        backend.train_from_iterator((part for text in texts for part in _between_words(text)), trainer)
        backend.pre_tokenizer = whole
        return cls(backend)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """The 256 bytes of UTF-8, each a token."""
        entries = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
        model = models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=[])
        return cls(_byte_level(model, use_regex=False))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """The tokenizer in a `tokenizer.json`.

        Raises:
          UsageError: when there is no such file, or it holds no tokenizer.
        """
        path = files.find(os.fspath(path), "the tokenizer")
        if not path.is_file():
            raise UsageError(
                f"the tokenizer '{path}' is not a file; give 'bpe', 'bytes', or the path of a tokenizer.json"
            )
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig")))
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(
                f"'{path}' holds no tokenizer ({error}); give a tokenizer.json of the tokenizers library"
            ) from error

    @property
    def digest(self) -> str:
        """Of all that it is: the SHA-256 of the file that `save` writes."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `tokenizer.json`, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(self._backend.to_str(), encoding="utf-8")
        os.replace(partial, path)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 `[tokens]`; none is special, and no `document` is put before them.

        Raises:
          UsageError: when a tokenizer.json has no token for what it does not know, and its library gives up.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for each of many texts, on all cores."""
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        parts = ((i, text[begin:end]) for i, text in enumerate(texts) for begin, end in self._parts(text))
        total = sum(map(len, texts))
        with Progress("encoding", "character", total, large=True, stays=False, shown=total > _AT_ONCE) as progress:
            for group in _groups(parts):
                encodings = self._encoded(self._reader.encode_batch_fast, [part for _, part in group])
                for (i, part), encoding in zip(group, encodings, strict=True):
                    ids[i].append(np.array(encoding.ids, np.int32))
                    progress.add(len(part))
        return [np.concatenate([np.zeros(0, np.int32), *some]) for some in ids]

    def _parts(self, text: str) -> Iterator[tuple[int, int]]:
        """Where the parts of a text begin and end that are encoded apart, for bounded memory, with the same ids.

        A part ends where the tokenizer ends a token whatever follows: at white space, else between letters, digits and
        other characters. Whether it does shows in a few words around. A text without such points is cut all the
        same after `_LONGEST_PART`.
        """
        begin = 0
        while len(text) - begin > _PART:
            end, following = self._cut(text, begin + _PART, begin + _LONGEST_PART)
            yield begin, end
            begin = following
        if begin < len(text):
            yield begin, len(text)

    def _cut(self, text: str, first: int, last: int) -> tuple[int, int]:
        """Where a part that ends at `first` or after ends, and where the next begins."""
        last = min(last, len(text))
        for pattern in _CUTS:
            for match in itertools.islice(pattern.finditer(text, first, last), 16):
                place = match.start()
                if place == last:  # where what is looked at ends, which says nothing
                    break
                left, right = text[max(place - _AROUND, 0) : place], text[place : place + _AROUND]
                whole = self._ids(left + right)
                # Where each text is begun with a space, one that is there stands for it.
                for skipped in (0, 1) if right[0] == " " else (0,):
                    if self._ids(left) + self._ids(right[skipped:]) == whole:
                        return place, place + skipped
        return last, last

    def _ids(self, text: str) -> list[int]:
        return self._encoded(self._reader.encode, text).ids

    def _encoded(self, encode, texts: str | Sequence[str]) -> Any:
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(
                f"the tokenizer cannot encode the text ({error}); give a tokenizer.json that has an unknown token, or "
                "'bpe' or 'bytes', which know every text"
            ) from error

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Special tokens are shown only with `special`."""
        return self._backend.decode([int(index) for index in ids], skip_special_tokens=not special)

    def stream(self) -> TextStream:
        """Decodes ids one at a time."""
        return TextStream(self)

    def check_prompt(self, text: str) -> None:
        """Raises UsageError naming the first part of `text` that the vocabulary cannot represent.

        A byte-level vocabulary represents every text; a tokenizer.json of another kind may not. What counts is the
        text as the tokenizer's own normalisation leaves it, without the white space that such tokenizers drop between
        words.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            self._refuse(text[error.start], error.start)
        if self._complete:
            return
        for start, stop in self._parts(text):
            part = text[start:stop]
            normal = self._normalised(part)
            is_lost = self._is_lost(normal)
            if is_lost.any():
                begin = place = int(np.argmax(is_lost))
                end = begin + int(np.argmin(np.append(is_lost[begin:], False)))
                if normal != part:  # the first character of which the normalised form holds it
                    found = (i for i, character in enumerate(part) if normal[begin] in self._normalised(character))
                    place = next(found, begin)
                self._refuse(normal[begin : min(end, begin + 40)], start + place)

    def _refuse(self, lost: str, place: int) -> None:
        code = f" (U+{ord(lost):04X})" if len(lost) == 1 else ""
        raise UsageError(
            f"the prompt holds {lost!r}{code} at character {place}, which the tokenizer's vocabulary of "
            f"{self.vocab_size} entries cannot represent; take it out"
        )

    def count_lost(self, texts: Iterable[str]) -> tuple[int, int]:
        """How many characters the vocabulary cannot represent, of how many.

        They are counted after normalisation, white space only where it is lost.
        """
        lost = total = 0
        for text in texts:
            if self._complete:
                total += len(text)
                continue
            for begin, end in self._parts(text):
                normal = self._normalised(text[begin:end])
                is_lost = self._is_lost(normal)
                lost += int(is_lost.sum())
                total += sum(gone or not character.isspace() for gone, character in zip(is_lost, normal, strict=True))
        return lost, total

    def _normalised(self, text: str) -> str:
        return text if self._backend.normalizer is None else self._backend.normalizer.normalize_str(text)

    def _is_lost(self, text: str) -> np.ndarray:
        """Which characters of a normalised text yield the unknown token, or none and are no white space; bool."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        blank = {ord(character) for character in set(text) if character.isspace()}
        # Byte-pair encoding without an unknown token drops what it does not know, and the offsets of what follows
        # are then too small by as much.
        dropped = {code for code in set(codes.tolist()) - blank if not self._checked(chr(code)).ids}
        lost = np.isin(codes, list(dropped))
        rest = codes[~lost]
        rest_lost = ~np.isin(rest, list(blank))
        encoding = self._checked(rest.tobytes().decode("utf-32-le"))
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            rest_lost[start:end] = index == self._unknown
        lost[~lost] = rest_lost
        return lost

    def _checked(self, text: str) -> tokenizers.Encoding:
        """A normalised text, encoded as it is."""
        return self._encoded(self._checker.encode, text)

    @functools.cached_property
    def _reader(self) -> tokenizers.Tokenizer:
        return _reader(json.loads(self._backend.to_str()))

    @functools.cached_property
    def _checker(self) -> tokenizers.Tokenizer:
        checker = tokenizers.Tokenizer.from_str(self._reader.to_str())
        checker.normalizer = None
        return checker

    @functools.cached_property
    def words(self) -> np.ndarray:
        """Ids that may serve as keys and values of the retrieval task, int32, ascending.

        A space and at least three letters; where the vocabulary has fewer than 64 of those, as bytes do, every
        token made of letters and digits.
        """
        texts = self._backend.decode_batch([[index] for index in range(self.vocab_size)], skip_special_tokens=True)
        words = [i for i, text in enumerate(texts) if text[:1] == " " and len(text) >= 4 and text[1:].isalpha()]
        if len(words) < 64:
            words = [index for index, text in enumerate(texts) if text.isalnum()]
        return np.array([index for index in words if index != self._unknown], np.int32)


def _between_words(text: str) -> Iterator[str]:
    """A text in parts that begin with white space, as words of byte-pair encoding do."""
    begin = 0
    while len(text) - begin > _PART:
        found = _CUTS[0].search(text, begin + _PART, begin + _LONGEST_PART)
        end = found.start() if found else min(begin + _LONGEST_PART, len(text))
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _groups(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Parts of texts together, up to `_AT_ONCE` characters or one part more."""
    group, size = [], 0
    for part in parts:
        group.append(part)
        size += len(part[1])
        if size >= _AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _reader(description: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer as text is read by: special tokens keep their ids and have names that no text holds.

    The library can be set not to look for special tokens in a text, but not to leave them out of the words and
    pieces that its models look up.
    """
    mark = secrets.token_hex(16)
    names = {token["content"]: token["content"] + mark for token in description["added_tokens"] if token["special"]}

    def renamed(name):
        return names.get(name, name)

    model = dict(description["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [[renamed(piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {renamed(entry): index for entry, index in model["vocab"].items()}
        model["unk_token"] = renamed(model["unk_token"])
    if model["type"] == "BPE":
        prefix = model["continuing_subword_prefix"] or ""
        pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [
            (left, right)
            for left, right in pairs
            if names.keys().isdisjoint((left, right, left + right[len(prefix) :]))
        ]
        model["dropout"] = None  # a text has the same tokens each time
    added = [token | {"content": renamed(token["content"])} for token in description["added_tokens"]]
    return tokenizers.Tokenizer.from_str(
        json.dumps(description | {"model": model, "added_tokens": added, "post_processor": None})
    )


def _unknown(model: dict[str, Any]) -> int | None:
    """The id of what the vocabulary does not know."""
    return model["unk_id"] if model["type"] == "Unigram" else model["vocab"].get(model["unk_token"])


def _is_complete(description: dict[str, Any]) -> bool:
    """Whether every text can be represented, by its bytes, of which none is a special token."""
    model = description["model"]
    entries = {entry for entry, _ in model["vocab"]} if model["type"] == "Unigram" else set(model["vocab"])
    entries -= {token["content"] for token in description["added_tokens"] if token["special"]}
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in entries for byte in range(256))
    is_byte_level = '"ByteLevel"' in json.dumps([description["pre_tokenizer"], description["normalizer"]])
    return is_byte_level and model["type"] == "BPE" and entries >= set(pre_tokenizers.ByteLevel.alphabet())


def _byte_level(model: models.BPE, use_regex: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend
