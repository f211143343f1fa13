r"""Partial results of softmax attention, and how they merge.

`(out, L)` over a part of the keys, L the logarithm of the softmax's denominator, is a *partial result*. Partial results
over disjoint parts merge by

    L = log(e^{L_1} + e^{L_2});    out = e^{L_1 - L} out_1 + e^{L_2 - L} out_2

which is associative: key blocks in a loop, parts of a pattern, devices in a ring (arXiv:2310.01889), shards of a cache
in a tree all use it. A learned sink (GPT-OSS) is a key with value 0 whose logit is a parameter of the head: the partial
result `(0, sink)`, merged once at the end; so is attention to learned tokens that every query sees (Titans).

`over_blocks` is the online softmax (Milakov and Gimelshein, arXiv:1805.02867): blocks of keys one after another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Partial(NamedTuple):
    """Attention over a part of the keys. Both float32; 0 and -inf for a query that sees none of them."""

    output: Float[Array, "B T H V"]
    logsumexp: Float[Array, "B T H"]


def softmax(logits: Float[Array, "*rows S"], visible: Bool[Array, "*rows S"]) -> Float[Array, "*rows S"]:
    """The weights of the keys that are visible, all 0 where none is. For definitions."""
    logits = jnp.where(visible, logits, jnp.where(visible.any(-1, keepdims=True), -jnp.inf, 0.0))
    return jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0.0)


class Terms(NamedTuple):
    """What softmax is made of: the weights are exponentials over their total.

    A row without a key has exponentials of 0, a total of 1 and a logsumexp of -inf.
    """

    exponentials: Float[Array, "*rows S"]
    total: Float[Array, "*rows"]
    logsumexp: Float[Array, "*rows"]


def terms(logits: Float[Array, "*rows S"]) -> Terms:
    """Those of softmax over the last axis, float32; logits are -inf for keys that are not visible."""
    peak = jax.lax.stop_gradient(logits.max(-1))
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    exponentials = jnp.exp(logits - peak[..., None])
    total = exponentials.sum(-1)
    visible = total > 0
    total = jnp.where(visible, total, 1.0)
    return Terms(exponentials, total, jnp.where(visible, peak + jnp.log(total), -jnp.inf))


def of_logits(logits: Float[Array, "*rows S"], read: Callable) -> Partial:
    """Attention with these logits, -inf for keys that are not visible.

    Args:
      logits: float32.
      read: the sums `[..., V]` of values by weights `[..., S]`, float32.
    """
    exponentials, total, logsumexp = terms(logits)
    return Partial(read(exponentials) / total[..., None], logsumexp)


def over_blocks(
    attend: Callable[[Any, Any], tuple[Any, Partial]],
    visible: Callable[[Any], Bool[Array, ""]],
    start: tuple[Any, Partial],
    blocks: Any,
) -> tuple[Any, Partial]:
    """Attention to blocks of keys, from the last to the first, where logits depend on the blocks visited before.

    Backwards, each block is gone over again.

    Args:
      attend: `(carry, block)` to the carry after the block and the attention to its keys.
      visible: whether any query sees a key of the block; else it is left out.
      start: the carry, and the attention to later keys.
      blocks: arrays `[blocks, ...]`.

    Returns:
      The last carry, and the attention to all of these keys.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def visit(before, block):
        def meet(carry, part):
            carry, found = attend(carry, block)
            return carry, merge(part, found)

        return jax.lax.cond(visible(block), meet, lambda *same: same, *before), None

    return jax.lax.scan(visit, start, blocks, reverse=True)[0]


def merge(first: Partial, then: Partial) -> Partial:
    """Attention over the keys of both; the parts must be disjoint. Associative and commutative."""
    peak = jnp.maximum(first.logsumexp, then.logsumexp)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isneginf(peak), 0.0, peak))
    weights = jnp.exp(first.logsumexp - peak), jnp.exp(then.logsumexp - peak)
    total = weights[0] + weights[1]
    visible = total > 0
    total = jnp.where(visible, total, 1.0)
    shares = (weight / total for weight in weights)
    output = sum(share[..., None] * part.output for share, part in zip(shares, (first, then), strict=True))
    return Partial(output, jnp.where(visible, peak + jnp.log(total), -jnp.inf))


def add_sinks(partial: Partial, sinks: Float[Array, " H"] | Partial) -> Partial:
    """The partial result with each head's sink in its denominator; once, when all keys have been merged."""
    if isinstance(sinks, Partial):
        return merge(partial, sinks)
    logsumexp = jnp.broadcast_to(sinks.astype(jnp.float32), partial.logsumexp.shape)
    return merge(partial, Partial(jnp.zeros_like(partial.output), logsumexp))
