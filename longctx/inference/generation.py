"""Text in, text out: the request checked, the prompt read, and the text shown as it is written."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TextIO

import numpy as np
from flax import nnx

from longctx import data
from longctx.errors import UsageError
from longctx.inference.decode import Decode
from longctx.inference.prefill import Prefill, capacity_for, span_for
from longctx.inference.sampling import DEFAULT, Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """What to write on from, how much, and how.

    Attributes:
      prompt: the beginning of a document.
      max_tokens: tokens to write at most; fewer where the model ends the document.
      sampling: temperature and nucleus.
      seed: of the draws, 32 bits.

    Raises:
      UsageError: if one of them cannot be used.
    """

    prompt: str
    max_tokens: int = 200
    sampling: Sampling = DEFAULT
    seed: int = 0

    def __post_init__(self):
        if not self.prompt:
            raise UsageError("the prompt is empty; give at least one character of text to write on from")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}; give at least 1")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed is {self.seed}; give a number from 0 to {2**32 - 1}")


def complete(
    model: nnx.Module,
    tokenizer: data.Tokenizer,
    request: Request,
    out: TextIO = sys.stdout,
    log: TextIO = sys.stderr,
) -> str:
    """Writes on from a prompt.

    Args:
      model: a language model.
      tokenizer: the one it was trained with.
      request: what to write.
      out: gets the text, whole characters at a time, as soon as they are known.
      log: gets one line of speeds, compilation not counted.

    Returns:
      The text written.

    Raises:
      UsageError: if the prompt has characters that the tokenizer does not know.
    """
    tokenizer.check_prompt(request.prompt)
    tokens = np.append(tokenizer.document, tokenizer.encode(request.prompt)).astype(np.int32)[None]
    length = tokens.shape[1]
    span = span_for(length)
    capacity = capacity_for(length + request.max_tokens, span)

    prefill, decode = Prefill(model), Decode(model, request.sampling)

    start = time.perf_counter()  # a short run first, which compiles every program
    for _ in decode(*prefill(tokens[:, :1], capacity, span), 1, 2, request.seed):
        pass
    compiling = time.perf_counter() - start

    start = time.perf_counter()
    logits, state = prefill(tokens, capacity, span)
    reading = time.perf_counter() - start

    start = time.perf_counter()
    stream, text, written, ended = tokenizer.stream(), [], 0, ""
    for token in decode(logits, state, length, request.max_tokens, request.seed):
        written += 1
        if token[0] == tokenizer.document:
            ended = "; the document ended"
            break
        text.append(stream.push(token[0]))
        out.write(text[-1])
        out.flush()
    text.append(stream.flush())
    out.write(text[-1] + "\n")
    out.flush()
    writing = time.perf_counter() - start
    print(
        f"read {length:,} tokens at {length / reading:,.0f} tokens/s, wrote {written:,} at {written / writing:,.1f} "
        f"tokens/s (compiled in {compiling:.1f} s){ended}",
        file=log,
        flush=True,
    )
    return "".join(text)
