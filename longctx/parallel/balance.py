r"""Equal work for the devices of a ring under a causal pattern: shards trade halves.

The sequence is 2 P halves of shards, and half h sees halves 0 to h. Outside, shards are contiguous: device p has halves
2p and 2p + 1, so that the last does 2 - 1/P times the mean. Here it keeps the first and trades the second for that of
device P - 1 - p: it has halves

    2p    and    2P - 1 - 2p

Their numbers add up to the same on all devices, so that all do the same work; and so they do at each hop of the ring:
with the keys of another device, exactly two of the four pairs of halves are visible (2p sees 2r, or 2P - 1 - 2p sees
2P - 1 - 2r; and one of the two sees the other's counterpart). The trade is its own inverse. The zigzag order (halves p
and 2P - 1 - p, Zhu, 2024, "ring-flash-attention") balances as well, and moves all halves where this one moves half.

Tokens take their ids and positions with them, which is all that masks read.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from longctx.ops.patterns import Pattern

_FINEST = 64  # tokens of the finest block that the executor chooses; a block across the two halves would see all


def pays(pattern: Pattern, length: int, rounds: int) -> bool:
    """Whether shards of `length` tokens, each of which meets those of `rounds`, have halves worth trading."""
    return rounds > 1 and pattern.ahead == 0 and pattern.reach is None and length % (2 * _FINEST) == 0


def block(length: int) -> int | None:
    """Tokens a block, so that none lies across the halves of `length` tokens; None if none would anyway."""
    largest = math.gcd(length // 2, 8 * _FINEST)
    return None if largest == 8 * _FINEST else largest


def swap(tree: Any, axis_name: str, step: int = 1) -> Any:
    """Shards with their second halves traded, inside a `jax.shard_map`; the inverse of itself.

    Args:
      tree: arrays `[B, T, ...]`, T even: this device's of contiguous shards along `axis_name`, or what `swap` gave.
      axis_name: the mesh axis.
      step: devices that hold the same tokens, neighbours along the axis.
    """
    devices = jax.lax.axis_size(axis_name)
    pairs = [(i, (devices // step - 1 - i // step) * step + i % step) for i in range(devices)]

    def trade(x):
        kept, given = jnp.split(x, 2, axis=1)
        return jnp.concatenate([kept, jax.lax.ppermute(given, axis_name, pairs)], axis=1)

    return jax.tree.map(trade, tree)
