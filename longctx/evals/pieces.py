"""REPORT/windows.json: what every piece of text gave, by which runs are compared on the very same pieces.

final_block  `windows`, an identity of each; `documents`, that of the text of each one's document; `nats`, by context,
             the mean loss of each window's final block
heldout      `names`, an identity of each document's text (of a task: of each row); `nats`, the sum of its losses;
             `tokens`; `bytes`, null of a task
needle       by length `rows`, an identity of all rows; `hits`, by depth, 1 for each row whose answer was right, else 0
task         by length `rows`, an identity of all rows; `shares`, of each row's answers that were right

An identity is a digest: of text whatever the tokenizer, and of tokens otherwise. Losses that are not finite are null.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from longctx import data
from longctx.evals.answers import Measured as Answers
from longctx.evals.heldout import Measured as HeldOut
from longctx.evals.perplexity import Window

EMPTY = {"windows": [], "documents": [], "nats": {}}  # final blocks, where none was measured


def digest(*tokens: np.ndarray) -> str:
    """16 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=8)
    for array in tokens:
        found.update(np.ascontiguousarray(array, "<i4").tobytes())
    return found.hexdigest()


def final_block(
    store: data.TokenStore, cut: Sequence[Window], block: int, blocks: Mapping[int, Float[np.ndarray, "windows block"]]
) -> dict[str, Any]:
    """Of the losses of the final blocks after every context; the position in the document is part of an identity."""
    tokens = [store.document(window.document)[window.end - block : window.end] for window in cut]
    texts = [store.texts[window.document] for window in cut]
    windows = zip(texts, cut, tokens, strict=True)
    return {
        "windows": [f"{text}-{window.end}-{digest(block)}" for text, window, block in windows],
        "documents": texts,
        "nats": {str(context): losses.mean(axis=1, dtype=np.float64).tolist() for context, losses in blocks.items()},
    }


def heldout(found: HeldOut) -> dict[str, Any]:
    """Of the held-out loss."""
    return {
        "names": list(found.names),
        "nats": found.nats.tolist(),
        "tokens": found.tokens.tolist(),
        "bytes": found.bytes.tolist() if found.bits_per_byte is not None else None,
    }


def needles(lengths: Sequence[int], hits: Bool[np.ndarray, "lengths depths samples"], rows: Sequence[str]):
    """Of right answers, and the identities of the rows of each length."""
    found = zip(lengths, hits, rows, strict=True)
    return {str(length): {"rows": name, "hits": right.astype(int).tolist()} for length, right, name in found}


def task(measured: Mapping[int, Answers]) -> dict[str, Any]:
    """Of the answers by length."""
    return {str(length): {"rows": found.rows, "shares": found.correct.tolist()} for length, found in measured.items()}
