"""Text of token ids, as they arrive."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from longctx.data.tokenizers import Tokenizer

_WAITING = 6  # ids after the last text; three more than a character of four bytes can lack


class TextStream:
    """Text of token ids that arrive one at a time: what has been returned is never taken back.

    A character whose bytes are not all there waits for them, for a few ids at most: bytes that are no text come out
    as U+FFFD, and an id takes the same time however many came before.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # of the last text returned, and after it
        self._before = 0  # ids of the last text returned
        self._returned = 0  # characters of the text after it that have been returned too

    def push(self, index: int) -> str:
        """The text that `index` completes; empty while a character lacks bytes."""
        if index in self._tokenizer.special:
            return ""
        self._ids.append(int(index))
        text = self._rest()
        if text and not text.endswith("\ufffd"):
            # The ids of this text stay, since some tokenizers join words by what comes before.
            piece = text[self._returned :]
            self._ids, self._before, self._returned = self._ids[self._before :], len(self._ids) - self._before, 0
            return piece
        if len(self._ids) - self._before <= _WAITING:
            return ""
        # The bytes of a character that may still be completed are in the last three ids; one U+FFFD stands for them.
        waiting = int(text.endswith("\ufffd"))
        piece = text[self._returned : len(text) - waiting]
        self._ids, self._before = self._ids[-3:], 0
        self._returned = max(len(self._rest()) - waiting, 0)
        return piece

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character whose bytes never came."""
        text = self._rest()[self._returned :]
        self._before, self._returned = len(self._ids), 0
        return text

    def _rest(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._before])
        return self._tokenizer.decode(self._ids)[len(before) :]
