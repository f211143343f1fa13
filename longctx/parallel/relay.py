"""A state passed from device to device in blocks of its columns, instead of a prefix scan of transitions.

A device that holds the transition of its span, s ↦ A s + b on states [B, H, K, V], applies it to a block of columns as
soon as that has arrived, and sends the result on: at step n device p sends block n - p. With P devices and N blocks
the last one has its state after P - 2 + N steps, and every device has sent one state in all. The prefix scan takes
h = ⌈log₂ P⌉ steps, in which it sends h states and h - 1 times A. Counted in bytes, with a step worth `STEP` of them,

    relay:     (P - 2 + N) (STEP + |s| / N)          scan:  h (STEP + |s|) + (h - 1) |A|

so that large states on few devices go by the relay, small ones and many devices by the scan. The least time of the
relay is that of one state, however many devices; Liu et al., "ZeCO", 2025, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.parallel import mesh

STEP = 2**17  # about what a link between neighbours carries, at 100 GB/s, in the microsecond that a message takes


def blocks(transition: Any, devices: int) -> int:
    """Into how many blocks of columns to cut the state; 0 where the prefix scan costs no more.

    Args:
      transition: its `state` is an array [B, H, K, V]; the rest of it acts on all columns alike.
      devices: along the axis.
    """
    share = mesh.size("data") * mesh.size("model")  # the compiler splits batch and heads over these
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(transition)) / share
    state = transition.state.size * transition.state.dtype.itemsize / share
    hops = (devices - 1).bit_length()
    scan = hops * (STEP + state) + (hops - 1) * (whole - state)
    columns = transition.state.shape[-1]
    costs = {n: (devices - 2 + n) * (STEP + state / n) for n in range(1, columns + 1) if columns % n == 0}
    best = min(costs, key=costs.get)
    return best if costs[best] < scan else 0


def pass_on(
    apply: Callable[[Any, Array], Array],
    transition: Any,
    state: Float[Array, "B H K V"],
    axis_name: str,
    device: Int[Array, ""],
    blocks: int,
    reverse: bool = False,
) -> Float[Array, "B H K V"]:
    """The state that enters this device's span, inside a `jax.shard_map`.

    Args:
      apply: `apply(transition, state)`, the state after a span, each of its columns by itself.
      transition: of this device's span; its `state` is an array of the shape of the state.
      state: what the first device has to begin with; not read on the others.
      axis_name: the mesh axis.
      device: this one's number along the axis.
      blocks: N, which divides V.
      reverse: from the last device to the first.
    """
    devices = jax.lax.axis_size(axis_name)
    number = devices - 1 - device if reverse else device

    def cut(x):
        return jnp.moveaxis(x.reshape(*x.shape[:-1], blocks, -1), -2, 0)

    def at(x, block):
        return jax.lax.dynamic_index_in_dim(x, jnp.clip(block, 0, blocks - 1), keepdims=False)

    offsets, entered = cut(transition.state), cut(jnp.where(number == 0, state, 0))
    for step in range(devices - 2 + blocks):
        left = apply(transition._replace(state=at(offsets, step - number)), at(entered, step - number))
        senders = range(max(0, step - blocks + 1), min(step, devices - 2) + 1)
        pairs = [(devices - 1 - i, devices - 2 - i) if reverse else (i, i + 1) for i in senders]
        received = jax.lax.ppermute(left, axis_name, pairs)
        block = step + 1 - number
        new = jax.lax.dynamic_update_index_in_dim(entered, received, jnp.clip(block, 0, blocks - 1), axis=0)
        entered = jnp.where((number > 0) & (block >= 0) & (block < blocks), new, entered)
    return jnp.moveaxis(entered, 0, -2).reshape(state.shape)
