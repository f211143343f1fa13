r"""CoPE over a sequence split along a mesh axis: the ring, from right to left.

A query's positions are sums over the tokens between, so that its keys must be visited from the last to the first.
Device p therefore meets its own keys, then those of p-1, of p-2, and so on; keys and values go round to the next
device, and the sums of gates and the partial softmax stay with the queries. Keys of later shards, which come last, are
after all queries and cost no work.

Backwards all of this is differentiated plainly, so that a device keeps the keys and values of all shards.
"""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float

from longctx.ops.cope import attend, nothing
from longctx.parallel.ring import onward
from longctx.typing import Segments


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    embeddings: Float[Array, "N K"],
    segments: Segments,
    axis_name: str,
    **options,
) -> Float[Array, "B T H V"]:
    """Attention of this shard's queries to the keys of all shards, inside a `jax.shard_map`.

    Args:
      q, k, v: this device's of contiguous shards along `axis_name`; as in `longctx.ops.cope`.
      embeddings: of the positions, the same on every device.
      segments: of this shard's tokens; ids and positions are those of the whole rows.
      axis_name: the mesh axis.
      options: `scale` and `chunk` of `longctx.ops.cope.chunked`.

    Returns:
      `[B, T, H, V]` in v's dtype. First derivatives only.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def hop(carry, _):
        visited, held = carry
        keys, values, owners = held
        visited = attend(q, keys, values, embeddings, segments, owners, visited, **options)
        # The last hop sends the keys home for nothing, which costs less than a second copy of it to compile.
        return (visited, onward(held, axis_name)), None

    start = nothing(q, v), (k, v, segments)
    (visited, _), _ = jax.lax.scan(hop, start, None, length=jax.lax.axis_size(axis_name))
    return visited.partial.output.astype(v.dtype)
