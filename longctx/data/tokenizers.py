"""Tokenizers: byte-level byte-pair encoding, bytes, or an existing `tokenizer.json`, with four special tokens.

Bytes are a byte-level vocabulary without merges. What a text says never yields a special token: a literal
"<|fact|>" in a document is encoded as its characters.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from longctx.errors import UsageError

SPECIAL = ("<|padding|>", "<|document|>", "<|fact|>", "<|ask|>")

_ENCODED_AT_ONCE = 64  # documents; the library's encodings take some hundred bytes a token until they are arrays


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      vocab_size: ids are below it, the special tokens' among them.
      padding: id that fills rows, which no model looks at; 0 unless a tokenizer.json puts it elsewhere.
      document: id that begins each document, and is predicted at its end.
      fact, ask: ids that begin the statements and the questions of the retrieval task.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """Wraps `backend`, to which the special tokens are added where it lacks them."""
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens(list(SPECIAL))
        backend.encode_special_tokens = True  # as the text that they are
        self._backend = backend
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.padding, self.document, self.fact, self.ask = (backend.token_to_id(token) for token in SPECIAL)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level byte-pair encoding (Sennrich et al. 2016; GPT-2) learnt from `texts`, of at most `vocab_size`."""
        backend = _byte_level(models.BPE(), use_regex=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
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
        path = Path(path).expanduser()
        if not path.is_file():
            raise UsageError(
                f"the tokenizer '{path}' is not a file; give 'bpe', 'bytes', or the path of a tokenizer.json"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(
                f"'{path}' holds no tokenizer ({error}); give a tokenizer.json of the tokenizers library"
            ) from error
        return cls(backend)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `tokenizer.json`, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(self._backend.to_str(), encoding="utf-8")
        os.replace(partial, path)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 `[tokens]`; none is special, and no `document` is put before them."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for each of many texts, on all cores."""
        ids = []
        for i in range(0, len(texts), _ENCODED_AT_ONCE):
            encodings = self._backend.encode_batch_fast(texts[i : i + _ENCODED_AT_ONCE], add_special_tokens=False)
            ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Special tokens are shown only with `special`."""
        return self._backend.decode([int(index) for index in ids], skip_special_tokens=not special)

    def stream(self) -> TextStream:
        """Decodes ids one at a time."""
        return TextStream(self)

    def check_prompt(self, text: str) -> None:
        """Raises UsageError naming the first character of `text` that the vocabulary cannot represent.

        A byte-level vocabulary represents every text; a tokenizer.json of another kind may not. White space,
        which such tokenizers drop between words, is not looked at.
        """
        place = self._unknown(text)
        if place is not None:
            raise UsageError(
                f"the prompt holds {text[place]!r} (U+{ord(text[place]):04X}) at character {place}, which the "
                f"tokenizer's vocabulary of {self.vocab_size} entries cannot represent; take it out"
            )

    def _unknown(self, text: str) -> int | None:
        """Where `text` holds the first character that cannot be represented."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            return error.start
        model = json.loads(self._backend.to_str())["model"]
        unknown = model.get("unk_id", self._backend.token_to_id(model.get("unk_token") or ""))
        encoding = self._backend.encode(text, add_special_tokens=False)
        known = np.array([character.isspace() for character in text], bool)
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if index != unknown:
                known[start:end] = True
        if known.all():
            return None
        # Characters that are dropped without a token shift the offsets after them.
        dropped = (place for place, character in enumerate(text) if self._is_dropped(character))
        return next(dropped, int(np.argmin(known)))

    def _is_dropped(self, character: str) -> bool:
        return not character.isspace() and not self._backend.encode(character, add_special_tokens=False).ids

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
        return np.array(words, np.int32)


class TextStream:
    """Text of token ids that arrive one at a time: what has been returned is never taken back."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # of the last text returned, and after it
        self._returned = 0  # ids of which the text has been returned

    def push(self, index: int) -> str:
        """The text that `index` completes; empty while a character lacks bytes."""
        self._ids.append(int(index))
        text = self._rest()
        if not text or text.endswith("\ufffd"):
            return ""
        # The ids of this text stay, since some tokenizers join words by what comes before.
        self._ids, self._returned = self._ids[self._returned :], len(self._ids) - self._returned
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character whose bytes never came."""
        text = self._rest()
        self._returned = len(self._ids)
        return text

    def _rest(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._returned])
        return self._tokenizer.decode(self._ids)[len(before) :]


def _byte_level(model: models.BPE, use_regex: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend
