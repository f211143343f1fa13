r"""Softmax attention of unbounded reach over a sequence split along a mesh axis: the ring.

Each device keeps its queries; keys and values, with their ids and positions, go round the ring of devices, and the
partial results over each shard's keys merge (Liu et al., arXiv:2310.01889). While one shard's keys are worked on,
the next ones are under way. Shards are contiguous, so that under a causal pattern the first device sees one shard's
keys and the last sees all; what a shard may not see costs it no work.

The backward pass goes round once more, and the gradients of keys and values travel with them, home after a full
turn: a device never holds more than two shards of keys, where plain differentiation would keep all of them. With
(out, L) the merged result, w_h = exp(L_h - L) the share of the keys of hop h, and (out_h, L_h) their partial result,
recomputed,

    d out_h = w_h d out;    d L_h = w_h (d out · (out_h - out) + d L)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.attention import attention_partial
from longctx.ops.biases import Bias
from longctx.ops.partial import Partial, merge
from longctx.ops.patterns import Pattern
from longctx.typing import Segments


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    pattern: Pattern,
    segments: Segments,
    axis_name: str,
    decay: Float[Array, "B T H"] | None = None,
    bias: Bias | None = None,
    **options,
) -> Partial:
    """Attention of this shard's queries to the keys of all shards, inside a `jax.shard_map`.

    Args:
      q, k, v: this device's shards, of contiguous shards along `axis_name`.
      pattern: which keys a query may see within its document.
      segments: of this shard's tokens; ids and positions are those of the whole rows.
      axis_name: the mesh axis.
      decay: sums of log decays at this shard's tokens, counted from the start of their documents.
      bias: of logits by distance.
      options: `scale`, `soft_cap` and `block` of `longctx.ops.attention.attention_partial`.

    Returns:
      The merged partial result, float32. First derivatives only.
    """

    def partial(mine, keys, segments, held):
        (q, decay, bias), (k, v, kv_decay) = mine, keys
        added = {"decay": decay, "kv_decay": kv_decay, "bias": bias}
        return attention_partial(q, k, v, pattern, segments, held, **added, **options)

    return merged(partial, (q, decay, bias), (k, v, decay), segments, segments, axis_name)


def merged(
    partial: Callable[[Any, Any, Any, Any], Partial], mine: Any, own: Any, of_mine: Any, of_own: Any, axis_name: str
) -> Partial:
    """`partial(mine, keys, of_mine, of_keys)` over the keys of every shard, merged.

    Args:
      partial: attention to some keys.
      mine: arrays that stay, such as queries.
      own: this device's arrays that go round, such as keys and values.
      of_mine, of_own: integers that stay and that go round, such as segments.
      axis_name: the mesh axis.

    Returns:
      The merged partial result. First derivatives only, with respect to `mine` and `own`.
    """

    @jax.custom_vjp
    def ring(mine, own, of_mine, of_own):
        return forward(mine, own, of_mine, of_own)[0]

    def forward(mine, own, of_mine, of_own):
        def hop(result, held):
            return merge(result, partial(mine, held[0], of_mine, held[1]))

        rows = jax.eval_shape(partial, mine, own, of_mine, of_own)
        nothing = Partial(jnp.zeros(rows.output.shape), jnp.full(rows.logsumexp.shape, -jnp.inf))
        result = _around(hop, nothing, (own, of_own), axis_name)
        return result, (mine, own, of_mine, of_own, result)

    def backward(residuals, cotangent):
        mine, own, of_mine, of_own, whole = residuals
        total = jnp.where(jnp.isneginf(whole.logsumexp), 0.0, whole.logsumexp)

        def hop(gradients, held):
            part, pull = jax.vjp(lambda mine, keys: partial(mine, keys, of_mine, held[1]), mine, held[0])
            share = jnp.exp(part.logsumexp - total)
            slope = jnp.sum(cotangent.output * (part.output - whole.output), axis=-1) + cotangent.logsumexp
            update = pull(Partial(share[..., None] * cotangent.output, share * slope))
            stay, travel = jax.tree.map(lambda total, x: total + x.astype(jnp.float32), gradients, update)
            return stay, onward(travel, axis_name)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (mine, own))
        gradients = _around(hop, zeros, (own, of_own), axis_name)
        return *jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, (mine, own)), None, None

    ring.defvjp(forward, backward)
    return ring(mine, own, of_mine, of_own)


def _around(hop, carry, keys, axis_name):
    """`carry = hop(carry, keys)` for the keys of every shard: this device's, its predecessor's, and so on."""

    def body(_, both):
        carry, keys = both
        return hop(carry, keys), onward(keys, axis_name)

    # The last step sends the keys home for nothing, which costs less than a second copy of the hop to compile.
    return jax.lax.fori_loop(0, jax.lax.axis_size(axis_name), body, (carry, keys))[0]


def onward(tree, axis_name):
    """What the previous device of the ring holds."""
    devices = jax.lax.axis_size(axis_name)
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), tree)
