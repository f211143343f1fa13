r"""Softmax attention of unbounded reach over a split sequence: every device gathers the keys and values of all.

For keys that are few, as with few groups or short shards: a device then holds T P G (K + V) numbers of them, but waits
for ⌈log₂ P⌉ messages where a ring has P - 1. By doubling (Bruck et al., 1997): before hop d = 1, 2, 4, … device p holds
the shards p, p - 1, …, p - d + 1; it gets as many from device p - d, (P - 1) shards in all. Gradients are the same
messages in reverse, summed on their way, in the dtype of keys and values.

`jax.lax.all_gather` inside a `jax.shard_map` over some axes of a mesh also gathers what the compiler had split over the
others, and its gradient in bfloat16 ends the process on XLA:CPU (both seen in jax 0.10); permutations do neither.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.attention import attention_partial
from longctx.ops.biases import Bias
from longctx.ops.partial import Partial
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
    balanced: bool = False,
    **options,
) -> Partial:
    """Attention of this shard's queries to the keys of all shards, inside a `jax.shard_map`.

    Args:
      q, k, v, pattern, segments, axis_name, decay, bias, options: as in `longctx.parallel.ring.attention`.
      balanced: whether shards trade halves of their queries; T must be even.

    Returns:
      The partial result, float32. First derivatives only.
    """
    tokens = segments.ids, segments.positions
    k, v, key_decay, theirs = of_all((k, v, decay, tokens), axis_name)
    if balanced:
        q, decay, tokens = balance.swap((q, decay, tokens), axis_name)
        options["block"] = options.get("block") or balance.block(q.shape[1])
    # Attention reads no starts.
    sides = (Segments(*side, jnp.zeros(side[0].shape, bool)) for side in (tokens, theirs))
    partial = attention_partial(q, k, v, pattern, *sides, decay=decay, key_decay=key_decay, bias=bias, **options)
    return balance.swap(partial, axis_name) if balanced else partial


def of_all(tree: Any, axis_name: str) -> Any:
    """The tokens of all shards, inside a `jax.shard_map`: this device's, its predecessor's, and so on round the axis.

    Args:
      tree: arrays `[B, T, ...]`, this device's shard.
      axis_name: the mesh axis, of P devices.

    Returns:
      Arrays `[B, P T, ...]`.
    """
    devices = jax.lax.axis_size(axis_name)

    def gather(x):
        length, hop = x.shape[1], 1
        while hop < devices:
            pairs = [(i, (i + hop) % devices) for i in range(devices)]
            more = jax.lax.ppermute(x[:, : (devices - hop) * length], axis_name, pairs)
            x, hop = jnp.concatenate([x, more], axis=1), 2 * hop
        return x

    return jax.tree.map(gather, tree)
