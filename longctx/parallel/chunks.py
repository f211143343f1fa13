"""What maps every token on its own, a few tokens at a time.

The backward pass computes a chunk's inner vectors again, so that no more than those of one chunk are ever held: the
feedforward of Liu and Abbeel, "Blockwise Parallel Transformer", arXiv:2305.19370. Where devices share the sequence,
each cuts its own shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from longctx.parallel import rules


def by_chunks(f: Callable, parameters: Any, x: Float[Array, "B T D"], chunk: int) -> Float[Array, "B T D"]:
    """`f(parameters, x)`, of at most `chunk` tokens of a device's shard at a time.

    Args:
      f: maps each token on its own.
      parameters: a pytree; float32, so that the sums of their gradients over devices are.
      x: the span; where its chunks differ in length, zeros fill them up.
      chunk: tokens; 0 for all at once.
    """
    if chunk == 0:
        return f(parameters, x)

    def shard(parameters, x):
        batch, length, width = x.shape
        count = -(-length // chunk)
        size = -(-length // count)
        x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0)))
        x = jnp.moveaxis(x.reshape(batch, count, size, width), 1, 0)
        y = jax.lax.map(functools.partial(jax.checkpoint(f, prevent_cse=False), parameters), x)
        return jnp.moveaxis(y, 0, 1).reshape(batch, count * size, width)[:, :length]

    # An island over the tokens: parameters are gathered, and their gradients summed over devices, once and not once a
    # chunk. Hidden widths stay with the compiler, which splits them over `model`.
    split = rules.spec(("batch", "time", None), x.shape, jax.sharding.get_abstract_mesh().shape)
    axes = {axis for axis in split if axis is not None}
    if axes:
        specs = {"in_specs": (PartitionSpec(), split), "out_specs": split}
        shard = jax.jit(jax.shard_map(shard, **specs, axis_names=axes, check_vma=False), inline=True)
    return shard(parameters, x)
