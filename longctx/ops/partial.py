r"""Partial results of softmax attention, and how they merge.

`(out, L)` over a part of the keys, L the logarithm of the softmax's denominator, is a *partial result*. Partial results
over disjoint parts merge by

    L = log(e^{L_1} + e^{L_2});    out = e^{L_1 - L} out_1 + e^{L_2 - L} out_2

which is associative: key blocks in a loop, parts of a pattern, devices in a ring (arXiv:2310.01889), shards of a cache
in a tree all use it. A learned sink (GPT-OSS) is a key with value 0 whose logit is a parameter of the head: the partial
result `(0, sink)`, merged once at the end; so is what learned tokens give that every query sees (Titans).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention over a part of the keys. Both float32; 0 and -inf for a query that sees none of them."""

    output: Float[Array, "B T H V"]
    logsumexp: Float[Array, "B T H"]


def merge(first: Partial, then: Partial) -> Partial:
    """Attention over the keys of both; the parts must be disjoint. Associative and commutative."""
    peak = jnp.maximum(first.logsumexp, then.logsumexp)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isneginf(peak), 0.0, peak))
    weights = jnp.exp(first.logsumexp - peak), jnp.exp(then.logsumexp - peak)
    total = weights[0] + weights[1]
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    shares = (weight / total for weight in weights)
    output = sum(share[..., None] * part.output for share, part in zip(shares, (first, then), strict=True))
    return Partial(output, jnp.where(seen, peak + jnp.log(total), -jnp.inf))


def add_sinks(partial: Partial, sinks: Float[Array, " H"] | Partial) -> Partial:
    """The partial result with each head's sink in its denominator; once, when all keys have been merged."""
    if isinstance(sinks, Partial):
        return merge(partial, sinks)
    logsumexp = jnp.broadcast_to(sinks.astype(jnp.float32), partial.logsumexp.shape)
    return merge(partial, Partial(jnp.zeros_like(partial.output), logsumexp))
