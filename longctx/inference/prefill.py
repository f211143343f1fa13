"""Reading a prompt: a model run over spans of one fixed length, the state carried from each to the next.

One compiled program serves prompts of any length. The last span is filled up with padding, which changes no
state, so the state is that of the prompt and nothing else; the memory needed is one span's and the state's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from longctx.progress import Progress
from longctx.typing import Segments

SPAN = 1024  # tokens a call; longer spans are hardly faster, and their activations grow
STEP = 256  # tokens, the least by which the room of a state grows


def span_for(length: int) -> int:
    """Tokens a call for a prompt of `length`: `SPAN`, or the power of two that a shorter prompt fits in."""
    return min(SPAN, 1 << (length - 1).bit_length())


def capacity_for(length: int) -> int:
    """Tokens that a state is given room for when it holds `length`: at most a quarter more, or `STEP`.

    A step of decoding costs what the room costs, and a new room a compiled program.
    """
    step = max(STEP, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def advance(
    model: nnx.Module, tokens: Int[Array, "B T"], offsets: Int[Array, " B"], counts: Int[Array, " B"], state: Any
) -> tuple[Float[Array, "B V"], Any]:
    """One span of the document of each row, of which the first tokens count and the others are padding.

    Args:
      model: a language model.
      tokens: `[B, T]`.
      offsets: tokens of the row's document before the span; at 0 a document starts, and the row's state is forgotten.
      counts: tokens of the span that are not padding; a row of 0 stays as it is.
      state: after the tokens before the span.

    Returns:
      The logits `[B, V]` after the last token that counts, and the state after it.
    """
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    segments = Segments.from_ids(index < counts[:, None], offsets[:, None] + index)
    hidden, state = model(tokens, segments, state)
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
    return model.logits(last)[:, 0], state


class Prefill:
    """`logits, state = Prefill(model)(tokens, capacity)`; programs are compiled once per shape and kept."""

    def __init__(self, model: nnx.Module):
        graphdef, params = nnx.split(model)
        self._params = nnx.as_pure(params)
        self._init = jax.jit(model.init_state, static_argnums=(0, 1))  # each device makes its own share

        @functools.partial(jax.jit, donate_argnums=4)
        def read(params, tokens, offset, count, state):
            offsets, counts = (jnp.full(tokens.shape[0], number) for number in (offset, count))
            return advance(nnx.merge(graphdef, params), tokens, offsets, counts, state)

        self._read = read

    def __call__(
        self, tokens: Int[np.ndarray, "B T"], capacity: int, span: int | None = None
    ) -> tuple[Float[Array, "B V"], Any]:
        """Reads prompts of one length, from the start of their documents.

        Args:
          tokens: `[B, T]`, T at least 1.
          capacity: tokens that the state must have room for, those to be generated among them.
          span: tokens a call; `span_for(T)` by default.

        Returns:
          The logits `[B, V]` after the last token, and the state.
        """
        batch, length = tokens.shape
        if not 1 <= length <= capacity:
            raise ValueError(f"The prompt has {length} tokens and the state room for {capacity}; give 1 to {capacity}.")
        span = span or span_for(length)
        logits, state = None, self._init(batch, capacity)
        with Progress("reading", "token", length, stays=False) as bar:
            for offset in range(0, length, span):
                piece = np.asarray(tokens[:, offset : offset + span], np.int32)
                count = piece.shape[1]
                piece = np.pad(piece, ((0, 0), (0, span - count)))
                logits, state = self._read(self._params, piece, np.int32(offset), np.int32(count), state)
                logits.block_until_ready()  # so that the bar shows what has been read
                bar.add(count)
        return logits, state
