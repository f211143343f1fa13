"""Writing on from a prompt: one compiled step, a span of one token, over and over.

A step writes its token's entries into the state in place, and costs what the room of the state costs, which grows with
the document. The step that makes the next token is started before the last token is read back, so the device does not
wait for the host, and the host has every token as soon as it is made. Where nobody waits for single tokens, several
steps are one program.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from longctx.inference import rows
from longctx.inference.prefill import Prefill, advance, capacity_for
from longctx.inference.sampling import DEFAULT, Sampling, check_seed, sample

STEPS = 32  # steps in one program, at most


class Decode:
    """`Decode(model)(logits, state, length, max_tokens)`: an iterator over the tokens that follow."""

    def __init__(self, model: nnx.Module):
        graphdef, params = nnx.split(model)
        self._params = nnx.as_pure(params)

        def choose(logits, numbers, seeds, temperature, top_p):
            # A key for every token from its number in the document: no chain of keys to carry.
            keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)
            return sample(keys, logits, temperature, top_p)[:, None]

        def step(params, tokens, numbers, how, state):
            ones = jnp.ones_like(numbers)
            logits, state = advance(nnx.merge(graphdef, params), tokens, numbers, ones, state)
            return choose(logits, numbers + 1, *how), state

        def steps(params, tokens, numbers, how, state, count):
            def one(i, carry):
                found, tokens, state = carry
                tokens, state = step(params, tokens, numbers + i, how, state)
                return jax.lax.dynamic_update_slice(found, tokens, (0, i)), tokens, state

            found = jnp.zeros((tokens.shape[0], STEPS), jnp.int32)
            return jax.lax.fori_loop(0, count, one, (found, tokens, state))

        self._choose = jax.jit(choose)
        self._step, self._steps = (jax.jit(program, donate_argnums=4) for program in (step, steps))
        empty = jax.jit(model.init_state, static_argnums=(0, 1))
        self._grow = jax.jit(lambda state, batch, room: rows.grow(state, empty(batch, room)), static_argnums=(1, 2))

    def __call__(
        self,
        logits: Float[Array, "B V"],
        state: Any,
        length: int,
        max_tokens: int,
        sampling: Sampling = DEFAULT,
        seed: int = 0,
        room: int | None = None,
        together: bool = False,
    ) -> Iterator[Int[np.ndarray, "B N"]]:
        """The tokens that follow, `[B, 1]` at a time, or more where they are made together.

        Args:
          logits, state: after the tokens so far, as `Prefill` returns them; the state is used up.
          length: tokens so far.
          max_tokens: tokens to make, at least 1.
          sampling: temperature and nucleus.
          seed: of the draws of the first row, 32 bits, and the next ones of those after it; equal seeds draw equal
            tokens.
          room: tokens that the state has room for; it grows when they are there. None: enough.
          together: whether up to `STEPS` tokens are made before they are given.

        Raises:
          UsageError: if the seed has more bits.
        """
        check_seed(seed)
        batch, end = logits.shape[0], length + max_tokens - 1
        seeds = (np.arange(batch, dtype=np.int64) + seed).astype(np.uint32)
        how, number = (seeds, *sampling.rows(batch)), length
        tokens = last = self._choose(logits, np.full(batch, length, np.int32), *how)
        while number < end:
            if room is not None and number >= room:
                room = capacity_for(number + 1)
                state = self._grow(state, batch, room)
            numbers = np.full(batch, number, np.int32)
            if together:
                count = min(STEPS, end - number, end if room is None else room - number)
                following, last, state = self._steps(self._params, last, numbers, how, state, np.int32(count))
                following = following[:, :count]
            else:
                last, state = self._step(self._params, last, numbers, how, state)
                following, count = last, 1
            yield np.asarray(tokens)
            tokens, number = following, number + count
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
      seed: of the draws of the first row, 32 bits, and the next ones of those after it.
    """
    length, model = tokens.shape[1], model.unrolled()
    room = capacity_for(length + 1)
    logits, state = Prefill(model)(tokens, room)
    written = Decode(model)(logits, state, length, max_tokens, sampling, seed, room, together=True)
    return np.concatenate(list(written), axis=1)
