"""Writing on from a prompt: one compiled step, a span of one token, over and over.

The step that makes the next token is started before the last token is read back, so the device does not wait for
the host, and the host has every token as soon as it is made.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from longctx.inference.prefill import Prefill, advance, capacity_for, span_for
from longctx.inference.sampling import DEFAULT, Sampling, check_seed, sample


class Decode:
    """`Decode(model, sampling)(logits, state, length, max_tokens)`: an iterator over the tokens that follow."""

    def __init__(self, model: nnx.Module, sampling: Sampling):
        graphdef, params = nnx.split(model)
        self._params = nnx.as_pure(params)

        def choose(logits, seed, number):
            # A key for every token from its number in the document: no chain of keys to carry.
            return sample(jax.random.fold_in(jax.random.key(seed), number), logits, sampling)

        @functools.partial(jax.jit, donate_argnums=4)
        def step(params, tokens, seed, number, state):
            logits, state = advance(nnx.merge(graphdef, params), tokens[:, None], number, 1, state)
            return choose(logits, seed, number + 1), state

        self._choose, self._step = jax.jit(choose), step

    def __call__(
        self, logits: Float[Array, "B V"], state: Any, length: int, max_tokens: int, seed: int = 0
    ) -> Iterator[Int[np.ndarray, " B"]]:
        """The tokens that follow, one for each row at a time.

        Args:
          logits, state: after the tokens so far, as `Prefill` returns them; the state is used up.
          length: tokens so far.
          max_tokens: tokens to make, at least 1.
          seed: of the draws, 32 bits; equal seeds draw equal tokens.

        Raises:
          UsageError: if the seed has more bits.
        """
        check_seed(seed)
        seed = np.uint32(seed)
        tokens = self._choose(logits, seed, np.int32(length))
        for number in range(length, length + max_tokens - 1):
            following, state = self._step(self._params, tokens, seed, np.int32(number), state)
            yield np.asarray(tokens)
            tokens = following
        yield np.asarray(tokens)


def generate(
    model: nnx.Module,
    tokens: Int[np.ndarray, "B T"],
    max_tokens: int,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
) -> Int[np.ndarray, "B max_tokens"]:
    """The `max_tokens` tokens that follow prompts of one length.

    Args:
      model: a language model.
      tokens: `[B, T]`, T at least 1.
      max_tokens: at least 1.
      sampling: temperature and nucleus.
      seed: of the draws, 32 bits.
    """
    length = tokens.shape[1]
    span, model = span_for(length), model.unrolled()
    logits, state = Prefill(model)(tokens, capacity_for(length + max_tokens, span), span)
    return np.stack(list(Decode(model, sampling)(logits, state, length, max_tokens, seed)), axis=1)
