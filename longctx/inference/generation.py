"""Text in, text out: the request checked, the prompt read, and the text shown as it is written."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import time
from typing import TextIO

import jax
import numpy as np
from flax import nnx

from longctx import data
from longctx.errors import UsageError
from longctx.inference.decode import Decode
from longctx.inference.prefill import Prefill, capacity_for, span_for
from longctx.inference.sampling import DEFAULT, Sampling, check_seed

_POSITIONS = 2**31 - 2**11  # tokens of a document, whose positions are 32 bits, whole spans


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
        if not 1 <= self.max_tokens < _POSITIONS:
            raise UsageError(f"max_tokens is {self.max_tokens}; give a number from 1 to {_POSITIONS - 1}")
        check_seed(self.seed)


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
      UsageError: if the prompt has characters that the tokenizer does not know, or the state of so many tokens is
        larger than the devices' memory.
    """
    tokenizer.check_prompt(request.prompt)
    tokens = np.append(tokenizer.document, tokenizer.encode(request.prompt)).astype(np.int32)[None]
    length = tokens.shape[1]
    span, room = span_for(length), capacity_for(length + 1)
    _check_memory(model, length, request.max_tokens)

    model = model.unrolled()
    prefill, decode, how = Prefill(model), Decode(model), (request.sampling, request.seed)

    start = time.perf_counter()  # a short run first, which compiles every program
    for _ in decode(*prefill(tokens[:, :1], room, span), 1, 2, *how):
        pass
    compiling = time.perf_counter() - start

    start = time.perf_counter()
    logits, state = prefill(tokens, room, span)
    reading = time.perf_counter() - start

    start = time.perf_counter()
    stream, text, written, ended = tokenizer.stream(), [], 0, ""
    for token in decode(logits, state, length, request.max_tokens, *how, room):
        written += 1
        if token[0, 0] == tokenizer.document:
            ended = "; the document ended"
            break
        text.append(stream.push(token[0, 0]))
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


def _check_memory(model: nnx.Module, length: int, max_tokens: int) -> None:
    """Raises UsageError if a document of so many tokens cannot be held where the model is."""
    asked = f"the prompt has {length:,} tokens and max_tokens is {max_tokens:,}"
    if length + max_tokens > _POSITIONS:
        raise UsageError(f"{asked}, more than the {_POSITIONS:,} that a document can have; give fewer")
    state = jax.eval_shape(functools.partial(model.init_state, 1, length + max_tokens))
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    parameters = jax.tree.leaves(nnx.state(model))
    devices = set().union(*(leaf.devices() for leaf in parameters)) or {jax.devices()[0]}
    if any(device.platform == "cpu" for device in devices):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        there = sum((device.memory_stats() or {}).get("bytes_limit", math.inf) for device in devices)
    if needed > there:
        raise UsageError(
            f"{asked}, for which the state would take {needed / 2**30:,.1f} GiB, and the memory is "
            f"{there / 2**30:,.1f} GiB; give fewer"
        )
