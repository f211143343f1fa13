r"""Softmax attention of unbounded reach over a sequence split along a mesh axis: the ring.

Each device keeps its queries; keys and values, with their ids and positions, go round the ring of devices, and the
partial results over each shard's keys merge (Liu et al., arXiv:2310.01889). While one shard's keys are worked on,
the next ones are under way. Shards are contiguous, so that under a causal pattern the first device sees one shard's
keys and the last sees all; what a shard may not see costs it no work, but the last one's work is what all wait for.
The balanced ring trades halves of shards first (`parallel/balance.py`): the work of the slowest falls by 2 - 1/P, for
half of q, k and v, in, and half of the float32 partial result, out.

The backward pass goes round once more, and the gradients of keys and values travel with them, home after a full
turn: a device never holds more than two shards of keys, where plain differentiation would keep all of them. With
(out, L) the merged result, w_h = exp(L_h - L) the share of the keys of hop h, and (out_h, L_h) their partial result,
recomputed,

    d out_h = w_h d out;    d L_h = w_h (d out · (out_h - out) + d L)

A device sends T G (K + V) numbers P - 1 times forward; backward as many again, and their float32 gradients P times.
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
from longctx.parallel import balance
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
    *,
    step: int = 1,
    balanced: bool = False,
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
      step: devices that hold the same tokens, neighbours along the axis: there are as many rings.
      balanced: whether shards trade halves; T must be even.
      options: `scale`, `soft_cap` and `block` of `longctx.ops.attention.attention_partial`.

    Returns:
      The merged partial result, float32. First derivatives only.
    """

    tokens = segments.ids, segments.positions
    if balanced:
        q, k, v, decay, tokens = balance.swap((q, k, v, decay, tokens), axis_name, step)
        options["block"] = options.get("block") or balance.block(q.shape[1])

    def partial(mine, keys, tokens, held):
        (q, decay, bias), (k, v, key_decay) = mine, keys
        added = {"decay": decay, "key_decay": key_decay, "bias": bias}
        return attention_partial(q, k, v, pattern, _segments(*tokens), _segments(*held), **added, **options)

    result = merged(partial, (q, decay, bias), (k, v, decay), tokens, tokens, axis_name, step)
    return balance.swap(result, axis_name, step) if balanced else result


def _segments(ids, positions) -> Segments:
    """Segments whose starts are left out: attention reads none, so that they need not travel."""
    return Segments(ids, positions, jnp.zeros(ids.shape, bool))


def merged(
    partial: Callable[[Any, Any, Any, Any], Partial],
    mine: Any,
    own: Any,
    of_mine: Any,
    of_own: Any,
    axis_name: str,
    step: int = 1,
) -> Partial:
    """`partial(mine, keys, of_mine, of_keys)` over the keys of every shard, merged.

    Args:
      partial: attention to some keys.
      mine: arrays that stay, such as queries.
      own: this device's arrays that go round, such as keys and values.
      of_mine, of_own: integers that stay and that go round, such as segments.
      axis_name: the mesh axis.
      step: as in `attention`.

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
        result = _around(hop, nothing, (own, of_own), axis_name, step)
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
            return stay, onward(travel, axis_name, step)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (mine, own))
        gradients = _around(hop, zeros, (own, of_own), axis_name, step)
        return *jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, (mine, own)), None, None

    ring.defvjp(forward, backward)
    return ring(mine, own, of_mine, of_own)


def _around(hop, carry, keys, axis_name, step):
    """`carry = hop(carry, keys)` for the keys of every shard: this device's, its predecessor's, and so on."""

    def body(_, both):
        carry, keys = both
        return hop(carry, keys), onward(keys, axis_name, step)

    rounds = jax.lax.axis_size(axis_name) // step
    return hop(*jax.lax.fori_loop(0, rounds - 1, body, (carry, keys)))


def onward(tree, axis_name, step=1):
    """What the device `step` places before this one in the ring holds."""
    devices = jax.lax.axis_size(axis_name)
    pairs = [(i, (i + step) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), tree)
