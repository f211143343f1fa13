"""Does the model use its context? Perplexity of a fixed final block, as the context before it grows.

Windows are cut from held-out documents: a context of C tokens, then a final block. The blocks are the same for
every C, so the curve shows the context's worth and nothing else: where it falls, the added context is used;
where it is flat, it is not; where it rises, the model breaks at that length (the measurement of the In-Place TTT
paper, arXiv 2604.06169, section 4). An average over a row's positions, in contrast, mixes easy blocks with hard ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

from longctx import data
from longctx.evals.scorer import Scorer
from longctx.evals.statistics import clustered

SHORTEST = 64  # tokens of the shortest context


@dataclasses.dataclass(frozen=True)
class Window:
    """Where a final block lies: tokens `end - block` to `end` of a document."""

    document: int
    end: int


def contexts(longest: int) -> list[int]:
    """Lengths of context: powers of two from 64 on, and `longest`."""
    powers = [2**k for k in range(SHORTEST.bit_length() - 1, longest.bit_length()) if 2**k < longest]
    return [*powers, longest]


def longest_context(lengths: Int[np.ndarray, " documents"], wanted: int, block: int, enough: int = 4) -> int:
    """The longest context, at most `wanted`, that held-out documents have room for before a final block.

    `wanted` if one document is long enough; otherwise the largest power of two for which `enough` documents are
    (all of them, if there are fewer). 0 if that is below the shortest context.
    """
    lengths = np.sort(lengths)[::-1]
    if not len(lengths):
        return 0
    if lengths[0] >= wanted + block:
        return wanted
    room = int(lengths[min(enough, len(lengths)) - 1]) - block
    return 2 ** (room.bit_length() - 1) if room >= SHORTEST else 0


def windows(lengths: Int[np.ndarray, " documents"], context: int, block: int, count: int) -> list[Window]:
    """At most `count` windows of `context + block` tokens whose final blocks do not overlap.

    They are shared out evenly among the documents that are long enough, and spread through each.
    """
    room = np.where(lengths >= context + block, 1 + (lengths - context - block) // block, 0)
    share = np.zeros_like(room)
    while share.sum() < min(count, room.sum()):
        open_ = np.flatnonzero(share < room)
        least = open_[share[open_] == share[open_].min()]
        share[least[: count - share.sum()]] += 1
    found = []
    for document, blocks in enumerate(share):
        starts = np.linspace(0, max(room[document] - 1, 0), blocks).round().astype(int)
        found += [Window(document, int(context + block + start * block)) for start in starts]
    return found


def final_block(
    scorer: Scorer, store: data.TokenStore, cut: list[Window], block: int, shapes: dict[int, int]
) -> tuple[dict[int, Float[np.ndarray, "windows block"]], Float[np.ndarray, "windows T"]]:
    """Losses of the final blocks after every context, and of whole rows with the longest one.

    Args:
      scorer: of the model.
      store: the held-out documents.
      cut: the windows.
      block: tokens of the final block.
      shapes: by context, the length that its rows are padded to.

    Returns:
      By context, losses `[windows, block]`; and `[windows, longest + block - 1]`, of all tokens but the first.
    """
    blocks, longest = {}, max(shapes)
    for context, length in shapes.items():
        rows = [store.document(w.document)[w.end - block - context : w.end] for w in cut]
        whole = scorer(rows, length, context + block - 1 if context == longest else block).losses
        blocks[context] = whole[:, -block:]
    return blocks, whole


def summarise(blocks: dict[int, Float[np.ndarray, "windows block"]], documents: Sequence[Hashable]) -> dict:
    """Perplexities with standard errors, and what the longest context gains on 256 tokens (or the shortest).

    Args:
      blocks: by context, the losses of the final blocks.
      documents: that the windows are of; windows of one are not independent, and all of one give no error (None).

    Returns:
      The error of the gain is of pairs: a window's loss after the one context and after the other.
    """
    nats = {context: losses.mean(axis=1, dtype=np.float64) for context, losses in blocks.items()}
    longest = max(nats)
    base = 256 if 256 in nats and longest > 256 else min(nats)
    means = {context: clustered(values, documents) for context, values in nats.items()}
    saved, error = clustered(nats[longest] - nats[base], documents)
    return {
        "final_block": {str(context): exponential(mean) for context, (mean, _) in means.items()},
        "standard_error": {
            str(context): None if error is None else exponential(mean) * error
            for context, (mean, error) in means.items()
        },
        "gain": {
            "from": base,
            "to": longest,
            "fraction": 1 - exponential(saved),
            "standard_error": None if error is None else exponential(saved) * error,
        },
    }


def exponential(nats: float) -> float:
    """Infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf + nats


def by_position(losses: Float[np.ndarray, "rows T"], documents: Sequence[Hashable]) -> list[dict]:
    """Mean loss of tokens in buckets of positions that double in length: 0 to 15, 16 to 31, 32 to 63, ...

    Column j holds the loss of the token at position j + 1, which has j + 1 tokens before it. `documents` are those that
    the rows are of; see `summarise`.
    """
    length = losses.shape[1]
    # The last bucket takes in what would be a short one after it.
    edges = [1, *(2**k for k in range(4, length.bit_length()) if 1.5 * 2**k <= length + 1), length + 1]
    buckets = []
    for start, stop in itertools.pairwise(edges):
        part = losses[:, start - 1 : stop - 1]
        mean, error = clustered(part.mean(axis=1, dtype=np.float64), documents)
        buckets.append({"from": start, "to": stop - 1, "loss": mean, "standard_error": error})
    return buckets
