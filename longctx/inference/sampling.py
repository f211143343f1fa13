"""Choosing the next token from logits: greedy, temperature, and the nucleus.

Temperature t divides the logits; t = 0 is the limit, the most likely token. The nucleus of mass p is the
smallest set of most likely tokens whose probabilities (after the temperature) sum to at least p; all other
tokens get probability 0 (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from longctx.errors import UsageError

_LEAST = float(jnp.finfo(jnp.float32).tiny)


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

    def rows(self, batch: int) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
        """Temperature and mass of `batch` rows that share them, float32."""
        return tuple(np.full(batch, min(x, 1 / _LEAST), np.float32) for x in (self.temperature, self.top_p))


DEFAULT = Sampling()  # the model's own distribution


def check_seed(seed: int) -> None:
    """Raises UsageError if a seed of draws has more than 32 bits."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed is {seed}; give a number from 0 to {2**32 - 1}")


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """The logits with those of tokens outside the nucleus at minus infinity.

    Of equally likely tokens at the edge of the nucleus those with the lower ids are kept: the set stays the
    smallest one, and is never empty.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1).astype(jnp.float32))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the tokens that are more likely
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    rank = jnp.argsort(order, axis=-1)
    inside = jnp.take_along_axis(inside, rank, axis=-1) | (rank == 0)  # top_p may be 0 in float32
    return jnp.where(inside, logits, -jnp.inf)


def sample(
    keys: Key[Array, " B"],
    logits: Float[Array, "B V"],
    temperature: Float[Array, " B"],
    top_p: Float[Array, " B"],
) -> Int[Array, " B"]:
    """The next token of every row, by its own key and parameters: no row depends on another.

    Args:
      keys: used nowhere else; not read where the temperature is 0.
      logits: `[B, V]`.
      temperature, top_p: of each row, as in `Sampling`.
    """
    logits = logits.astype(jnp.float32)

    def draw():
        # The largest becomes 0, at any temperature. Neither the temperature nor its inverse may round to 0, as
        # numbers below the least normal one do.
        divisor = jnp.clip(temperature, _LEAST, 1 / _LEAST)[:, None]
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / divisor
        scaled = jax.lax.cond(jnp.any(top_p < 1), nucleus, lambda logits, _: logits, scaled, top_p)
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = jax.lax.cond(jnp.any(temperature > 0), draw, lambda: likeliest)
    return jnp.where(temperature > 0, drawn, likeliest)
