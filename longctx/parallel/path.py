r"""PaTH attention over a sequence split along a mesh axis: the ring, from right to left.

With keys as they are at the end of a shard and queries as they are at the start of theirs, what lies before a shard is
reached by ordinary softmax attention, one shard after another: device p meets the keys of p-1, turns its queries by
that shard's product, meets the keys of p-2, and so on. Keys, values and products ([K, K] per head) go round.

Backwards all of this is differentiated plainly, so that a device keeps the keys and values of all shards.
"""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float

from longctx.ops.attention import attention_partial
from longctx.ops.gated_linear import einsum
from longctx.ops.partial import merge
from longctx.ops.path_attention import attend
from longctx.ops.patterns import Causal
from longctx.parallel.ring import onward
from longctx.typing import Segments


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    w: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    segments: Segments,
    axis_name: str,
) -> Float[Array, "B T H V"]:
    """Attention of this shard's queries to the keys of all shards, inside a `jax.shard_map`.

    Args:
      q, k, v, w, beta: this device's of contiguous shards along `axis_name`; as in `longctx.ops.path_attention`.
      segments: of this shard's tokens; ids and positions are those of the whole rows.
      axis_name: the mesh axis.
    """
    span = attend(q, k, v, w, beta, None, segments)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def hop(carry, _):
        part, queries, held = carry
        keys, values, product, owners = held = onward(held, axis_name)
        part = merge(part, attention_partial(queries, keys, values, Causal(), segments, owners, scale=1.0))
        return (part, einsum("bthi,bhij->bthj", queries, product), held), None

    own = span.keys, v.astype(span.keys.dtype), span.product, segments
    hops = jax.lax.axis_size(axis_name) - 1
    (part, _, _), _ = jax.lax.scan(hop, (span.partial, span.queries, own), None, length=hops)
    return part.output.astype(v.dtype)
