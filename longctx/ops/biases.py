r"""Biases by distance: what a logit gets beside the product of query and key, p - s tokens apart.

    Alibi          -m_h (p - s)                                     Press et al., arXiv:2108.12409
    T5             a learned number for each bucket of distances    Raffel et al., arXiv:1910.10683, section 2.1
    AdaptiveSpan   log clip((R + z_h - (p - s)) / R, 0, 1)          Sukhbaatar et al., arXiv:1905.07799, equation 3

A bias is a pytree of its parameters, whose first axis is that of the heads. It is called with distances, and attention
adds what it gives to the logits after their soft cap; -inf hides a key. In a weight exp(logit) the adaptive span is a
factor: 1 up to z_h tokens, then falling to 0 within R more, so that the span z_h can be learned.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops.positions import t5_buckets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alibi:
    """A slope per head; `longctx.ops.positions.alibi_slopes` has the published ones."""

    slopes: Float[Array, " H"]

    def __call__(self, distance: Int[Array, "rows T S"]) -> Float[Array, "rows H T S"]:
        return -self.slopes[:, None, None] * distance[:, None].astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5:
    """A number per head and bucket; distances of `max_distance` and more share the last bucket."""

    table: Float[Array, "H N"]
    max_distance: int = dataclasses.field(default=128, metadata={"static": True})

    def __call__(self, distance: Int[Array, "rows T S"]) -> Float[Array, "rows H T S"]:
        buckets = t5_buckets(jnp.arange(self.max_distance + 1), self.table.shape[1], self.max_distance)
        by_distance = self.table.astype(jnp.float32)[:, buckets]
        return jnp.moveaxis(by_distance[:, jnp.clip(distance, 0, self.max_distance)], 0, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptiveSpan:
    """A span z in tokens per head, learned, and how many tokens it takes to fade out after it."""

    span: Float[Array, " H"]
    ramp: int = dataclasses.field(metadata={"static": True})

    def __call__(self, distance: Int[Array, "rows T S"]) -> Float[Array, "rows H T S"]:
        left = self.ramp + self.span.astype(jnp.float32)[:, None, None] - distance[:, None].astype(jnp.float32)
        share = jnp.clip(left / self.ramp, 0.0, 1.0)
        return jnp.where(share > 0, jnp.log(jnp.where(share > 0, share, 1.0)), -jnp.inf)


Bias = Alibi | T5 | AdaptiveSpan
