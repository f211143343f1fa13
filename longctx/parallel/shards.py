"""A row that devices along a mesh axis share, each with a contiguous shard: a `longctx.ops.row.Row`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from longctx.parallel import attention, fetch, halo, ring


class Shards:
    """This device's shard, inside a `jax.shard_map`; its methods are described at `longctx.ops.row.Row`.

    Args:
      axis_name: the mesh axis.
      length: tokens of a shard.
    """

    def __init__(self, axis_name: str, length: int):
        self.axis_name, self.parts, self.index = axis_name, jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
        self.first = self.index * length

    def near(self, tree: Any, count: int) -> Any:
        before = halo.last(tree, count, self.axis_name)
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), before, tree)

    def gather(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis_name, axis=1, tiled=True), tree)

    def fetch(self, tree: Any, chosen: Any) -> Any:
        return fetch.blocks(tree, chosen, self.axis_name)

    def onward(self, tree: Any) -> Any:
        return ring.onward(tree, self.axis_name)

    def attention(self, *call: Any) -> Any:
        return attention.attention(*call, self.axis_name)

    def merged(self, partial: Any, mine: Any, own: Any, of_mine: Any, of_own: Any) -> Any:
        return ring.merged(partial, mine, own, of_mine, of_own, self.axis_name)
