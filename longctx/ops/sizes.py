"""Sizes that a cache or a lane decides, by platform: how much of a span an op works on at once.

They change the time and the memory that an op takes, and no result beyond rounding. A CPU wants what its cache holds;
an accelerator wants few long steps, as its memory allows. Those of accelerators were never timed on one: they are
counted, so that a step has work for all lanes and holds at most some hundred MiB of float32.
"""

from __future__ import annotations

import dataclasses

from longctx.ops.backend import platform


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one platform.

    Attributes:
      loss_logits: logits that the loss holds at once, while that leaves it `loss_tokens`.
      loss_tokens: tokens whose logits the loss holds at once, at least: each step reads the unembedding and, in
        training, its gradient.
      matrices: chunks times heads whose states a recurrence of matrices computes at once (`chunks.by_spans`).
      vectors: numbers in the states of a span's tokens, of a recurrence of vectors (`linear_scan`).
      beside: but at least so many chunks of them side by side, for fewer steps in sequence.
      states: numbers in the states of chunks side by side (`selective_scan`); backwards C times as many are held.
      logits: logits of a step of blockwise attention, all heads together.
      choosing: queries whose scores of all blocks of keys are held at once (`key_blocks`).
      chosen: queries that attend at once to tokens of their own choice (`indexer_topk`), and
      fetched: keys for all these together.
      tile: queries that attend to one block of keys at once (`routed`).
    """

    loss_logits: int
    loss_tokens: int
    matrices: int
    vectors: int
    beside: int
    states: int
    logits: int
    choosing: int
    chosen: int
    fetched: int
    tile: int


_CPU = Sizes(
    loss_logits=2**20,
    loss_tokens=128,
    matrices=128,
    vectors=2**18,
    beside=16,
    states=2**16,
    logits=2**20,
    choosing=64,
    chosen=128,
    fetched=2**16,
    tile=64,
)
_ACCELERATOR = Sizes(
    loss_logits=2**26,
    loss_tokens=2048,
    matrices=2**11,
    vectors=2**24,
    beside=64,
    states=2**20,
    logits=2**28,
    choosing=256,
    chosen=256,
    fetched=2**18,
    tile=128,
)
SIZES = {"cpu": _CPU, "gpu": _ACCELERATOR, "tpu": _ACCELERATOR}


def sizes() -> Sizes:
    """Those of the platform that a program is traced for."""
    return SIZES[platform()]
