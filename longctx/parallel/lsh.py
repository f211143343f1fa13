r"""Attention within buckets over a sequence split along a mesh axis: the ring.

A bucket's tokens are everywhere, so that all keys, values and numbers of buckets go round, once for all rounds of
hashing: the bytes are those of full attention (`parallel/ring.py`), and the numbers. What is saved is work: a device
sorts the keys that it holds at each hop, and attends bucket by bucket.
"""

from __future__ import annotations


import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.ops import lsh
from longctx.ops.partial import Partial, merge
from longctx.parallel.ring import onward
from longctx.typing import Segments


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    q_hashes: Int[Array, "B T H R"],
    k_hashes: Int[Array, "B T G R"],
    segments: Segments,
    axis_name: str,
    **options,
) -> Float[Array, "B T H V"]:
    """Attention of this shard's queries to the keys of all shards in their buckets, inside a `jax.shard_map`.

    Args:
      q, k, v, q_hashes, k_hashes: this device's, of contiguous shards along `axis_name`; as in `longctx.ops.lsh`.
      segments: of this shard's tokens; ids and positions are those of the whole rows.
      axis_name: the mesh axis.
      options: `buckets` and `scale`.
    """

    def partial(q, keys, mine, theirs):
        (q_hashes, segments), (k_hashes, held) = mine, theirs
        return lsh.partial(q, *keys, q_hashes, k_hashes, segments, held, **options)

    whole = _ring(partial, q, (k, v), (q_hashes, segments), (k_hashes, segments), axis_name)
    return lsh.or_own(whole, v, segments)


def _ring(partial, q, own, mine, theirs, axis_name: str) -> Partial:
    """`partial(q, keys, mine, theirs)` of every shard's `own` and `theirs`, merged; as `parallel/ring.py`.

    Gradients are those of `q` and `own`; `mine` and `theirs` are integers.
    """
    hops = jax.lax.axis_size(axis_name)

    @jax.custom_vjp
    def ring(q, own, mine, theirs):
        return forward(q, own, mine, theirs)[0]

    def forward(q, own, mine, theirs):
        def hop(_, carry):
            result, held = carry
            return merge(result, partial(q, held[0], mine, held[1])), onward(held, axis_name)

        rows = jax.eval_shape(partial, q, own, mine, theirs)
        nothing = Partial(jnp.zeros(rows.output.shape), jnp.full(rows.logsumexp.shape, -jnp.inf))
        result, _ = jax.lax.fori_loop(0, hops, hop, (nothing, (own, theirs)))
        return result, (q, own, mine, theirs, result)

    def backward(residuals, cotangent):
        q, own, mine, theirs, whole = residuals
        total = jnp.where(jnp.isneginf(whole.logsumexp), 0.0, whole.logsumexp)

        def hop(_, carry):
            gradients, (keys, theirs) = carry
            part, pull = jax.vjp(lambda q, keys: partial(q, keys, mine, theirs), q, keys)
            share = jnp.exp(part.logsumexp - total)
            slope = jnp.sum(cotangent.output * (part.output - whole.output), axis=-1) + cotangent.logsumexp
            update = pull(Partial(share[..., None] * cotangent.output, share * slope))
            stay, travel = jax.tree.map(lambda total, x: total + x.astype(jnp.float32), gradients, update)
            return (stay, onward(travel, axis_name)), onward((keys, theirs), axis_name)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (q, own))
        gradients, _ = jax.lax.fori_loop(0, hops, hop, (zeros, (own, theirs)))
        return *jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, (q, own)), None, None

    ring.defvjp(forward, backward)
    return ring(q, own, mine, theirs)
