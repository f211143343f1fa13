r"""Attention within buckets over a sequence split along a mesh axis: the ring.

A bucket's tokens are everywhere, so that all keys, values and numbers of buckets go round, once for all rounds of
hashing: the bytes are those of full attention (`parallel/ring.py`), and the numbers. What is saved is work: a device
sorts the keys that it holds at each hop, and attends bucket by bucket.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from longctx.ops import lsh
from longctx.parallel import ring
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

    whole = ring.merged(partial, q, (k, v), (q_hashes, segments), (k_hashes, segments), axis_name)
    return lsh.or_own(whole, v, segments)
