"""Can the model find a fact again? Accuracy by the length of the text and the fact's depth in it.

A row is held-out text in which facts (key, value) are planted: the one asked for at a fraction `depth` of the
text (0 its start, 1 its end), the others, distractors, anywhere. It ends in a question with the key. The answer
is right if the value is the most likely of the whole vocabulary. Picking one of the row's values at random would
be right once in `facts` times: nothing below that shows retrieval.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Bool

from longctx import data
from longctx.evals.scorer import Scorer
from longctx.evals.statistics import wilson


def depths(count: int) -> list[float]:
    """`count` depths evenly from 0 to 1; a single one is in the middle."""
    return np.linspace(0, 1, count).tolist() if count > 1 else [0.5]


def grid(
    scorer: Scorer, corpus, lengths: list[int], samples: int, facts: int, where: list[float], tail: int, seed: int
):
    """Whether the answers are right, bool `[len(lengths), len(where), samples]`, and digests of the rows by length.

    Args:
      scorer: of the model.
      corpus: whose held-out text and tokenizer are used.
      lengths: tokens a row.
      samples: rows per length and depth.
      facts: facts a row.
      where: depths.
      tail: tokens the scorer's programs score; the answer is the last of them.
      seed: of the facts and their positions.
    """
    hits, digests = np.zeros((len(lengths), len(where), samples), bool), []
    for i, length in enumerate(lengths):
        rows = []
        for j, depth in enumerate(where):
            batch = data.needle_rows(
                corpus.heldout, corpus.tokenizer, length, depth, samples, facts, seed + len(where) * i + j
            )
            rows.append(np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1))
        rows = np.concatenate(rows)
        hits[i] = scorer(rows, length, tail).correct[:, -1].reshape(len(where), samples)
        digests.append(hashlib.blake2b(rows.tobytes(), digest_size=8).hexdigest())
    return hits, digests


def summarise(
    hits: Bool[np.ndarray, "lengths depths samples"], lengths: list[int], where: list[float], facts: int
) -> dict:
    """Accuracy by length, averaged over depths, with its interval at 95 %; the grid; and what guessing would give."""
    accuracy, samples = hits.mean(axis=2), hits.shape[2]
    mean, asked = accuracy.mean(axis=1), samples * len(where)
    keys = [str(length) for length in lengths]
    return {
        "accuracy": dict(zip(keys, mean.tolist(), strict=True)),
        "interval": {key: wilson(share, asked) for key, share in zip(keys, mean.tolist(), strict=True)},
        "asked": asked,
        "depths": where,
        "grid": dict(zip(keys, accuracy.tolist(), strict=True)),
        "samples": samples,
        "facts": facts,
        "guessing": 1 / facts,
    }
