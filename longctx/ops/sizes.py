"""Sizes that a cache or a lane decides, by platform: how much of a span an op works on at once.

They change the time and the memory that an op takes, and no result beyond rounding. A CPU wants what its cache holds;
an accelerator wants few long steps, which its memory holds.
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
    """

    loss_logits: int
    loss_tokens: int


_ACCELERATOR = Sizes(loss_logits=2**26, loss_tokens=2048)
SIZES = {"cpu": Sizes(loss_logits=2**20, loss_tokens=128), "gpu": _ACCELERATOR, "tpu": _ACCELERATOR}


def sizes() -> Sizes:
    """Those of the platform that a program is traced for."""
    return SIZES[platform()]
