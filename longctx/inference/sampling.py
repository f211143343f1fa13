"""Choosing the next token from logits: greedy, temperature, and the nucleus.

Temperature t divides the logits; t = 0 is the limit, the most likely token. The nucleus of mass p is the
smallest set of most likely tokens whose probabilities (after the temperature) sum to at least p; all other
tokens get probability 0 (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from longctx.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_p: mass of the nucleus; 1 keeps every token.

    Raises:
      UsageError: if temperature is negative or not finite, or top_p is outside (0, 1].
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature is {self.temperature}; give 0 for the most likely token, or a number above 0"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it is a probability mass, give a number above 0 and at most 1")


DEFAULT = Sampling()  # the model's own distribution
_LEAST = float(jnp.finfo(jnp.float32).tiny)


def check_seed(seed: int) -> None:
    """Raises UsageError if a seed of draws has more than 32 bits."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed is {seed}; give a number from 0 to {2**32 - 1}")


def nucleus(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """The logits with those of tokens outside the nucleus at minus infinity.

    Of equally likely tokens at the edge of the nucleus those with the lower ids are kept: the set stays the
    smallest one, and is never empty.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1).astype(jnp.float32))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the tokens that are more likely
    rank = jnp.argsort(order, axis=-1)
    inside = jnp.take_along_axis(before < top_p, rank, axis=-1) | (rank == 0)  # top_p may be 0 in float32
    return jnp.where(inside, logits, -jnp.inf)


def sample(key: Key[Array, ""], logits: Float[Array, "B V"], sampling: Sampling) -> Int[Array, " B"]:
    """The next token of every row.

    Args:
      key: a key that is used nowhere else; not read when the temperature is 0.
      logits: `[B, V]`.
      sampling: temperature and nucleus, static under `jax.jit`.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    # The largest becomes 0, at any temperature. Neither the temperature nor its inverse may round to 0, as
    # numbers below the least normal one do.
    temperature = min(max(sampling.temperature, _LEAST), 1 / _LEAST)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if sampling.top_p < 1:
        logits = nucleus(logits, sampling.top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
