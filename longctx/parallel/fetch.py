r"""Blocks of keys chosen by content, of a row that several devices share: only those that are chosen move.

Device p holds a contiguous shard of the row, and the blocks that end in it, whose earlier tokens come by a halo. What
all must know of a block to choose, its summary, is gathered. Then each device asks the earlier ones for those of their
blocks that it wants, and they send them, in rounds of ⌈N / 8⌉ blocks from each device to each later one, N the blocks
of a shard. There are as many rounds as the pair of devices needs between which most blocks are to move; then all stop.
A device sends, with P devices,

    tokens     C - 1 of each kind of block, to the next device or devices: a halo
    summaries  N, to each of the P - 1 others
    requests   N for each row of the batch and group of heads, to each of the others
    blocks     rounds · ⌈N / 8⌉, to each later device, and back their gradients

Each row of the batch and group of heads has its own requests. What is saved is what no query of a shard chooses: where
they all choose differently, a device wants nearly all blocks, and as much moves as round a ring. A device has room for
all blocks of the row, each at its index, with zeros where it wants none.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from longctx.parallel.all_to_all import all_to_all

_ROUNDS = 8  # in which a device has sent all of its blocks, if another wants them all


def blocks(tree: Any, chosen: Int[Array, "B T G n"], axis_name: str) -> Any:
    """The blocks that this device's queries choose, inside a `jax.shard_map`.

    Args:
      tree: arrays `[B, N, C, G, ...]`, this device's blocks.
      chosen: indices among the blocks of all devices, of this one and those before it; -1 for none.
      axis_name: the mesh axis, of P devices.

    Returns:
      Arrays `[B, P N, C, G, ...]`; blocks that were not chosen may be zeros. First derivatives only.
    """
    devices, number = jax.lax.axis_size(axis_name), jax.tree.leaves(tree)[0].shape[1]
    chosen = jnp.moveaxis(jnp.where(chosen < 0, devices * number, chosen), 2, 1)
    wanted = _by_head(lambda index: jnp.zeros(devices * number, bool).at[index].set(True, mode="drop"))(chosen)
    wanted = jnp.moveaxis(wanted.reshape(*wanted.shape[:2], devices, number), 2, 0)
    found = _fetch(axis_name, jax.tree.map(lambda x: jnp.moveaxis(x, 3, 1), tree), wanted)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 3), found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fetch(axis_name: str, tree: Any, wanted: Bool[Array, "P B G N"]) -> Any:
    """Arrays `[B, G, P N, ...]` from `[B, G, N, ...]`; `wanted`: what this device wants of each."""
    return _forward(axis_name, tree, wanted)[0]


def _forward(axis_name, tree, wanted):
    devices, *_, blocks = wanted.shape
    rounds, hops = _plan(axis_name, wanted)

    def step(number, found):
        for hop, asked, places in hops(number):
            sent = jax.tree.map(lambda x, asked=asked: _take(x, asked), tree)
            received = jax.lax.ppermute(sent, axis_name, hop)
            found = jax.tree.map(lambda x, rows, places=places: _put(x, places, rows), found, received)
        return found

    def place(x):
        room = jnp.zeros((*x.shape[:2], devices * blocks, *x.shape[3:]), x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(room, x, jax.lax.axis_index(axis_name) * blocks, axis=2)

    return jax.lax.fori_loop(0, rounds, step, jax.tree.map(place, tree)), wanted


def _backward(axis_name, wanted, cotangent):
    blocks = wanted.shape[-1]
    rounds, hops = _plan(axis_name, wanted)

    def step(number, gradient):
        for hop, asked, places in hops(number):
            sent = jax.tree.map(lambda x, places=places: _take(x, places), cotangent)
            received = jax.lax.ppermute(sent, axis_name, [(to, of) for of, to in hop])
            gradient = jax.tree.map(lambda x, rows, asked=asked: _add(x, asked, rows), gradient, received)
        return gradient

    def own(x):
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * blocks, blocks, axis=2)
        return x.astype(jnp.float32)

    gradient = jax.lax.fori_loop(0, rounds, step, jax.tree.map(own, cotangent))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), gradient, cotangent), None


_fetch.defvjp(_forward, _backward)


def _plan(axis_name: str, wanted: Bool[Array, "P B G N"]):
    """How many rounds there are, and for each, what moves.

    Returns:
      `(rounds, hops)`: `hops(number)` gives for every distance between devices the pairs that are so far apart, which
      blocks `[B, G, n]` of its own this device sends, and the places `[B, G, n]` in the row of those that it receives.
      Where these are fewer than n, the rest are beyond the last block, and the last place.
    """
    device, (devices, *_, blocks) = jax.lax.axis_index(axis_name), wanted.shape
    wanted &= (jnp.arange(devices) < device)[:, None, None, None]
    size = -(-blocks // _ROUNDS)
    # All devices run as many, those that split rows and heads by hand as well: a message is sent by all at a time.
    axes = jax.sharding.get_abstract_mesh().manual_axes
    rounds = jax.lax.pmax(-(-wanted.sum(-1, dtype=jnp.int32).max() // size), axes)

    def lists(wanted):
        index = jnp.sort(jnp.where(wanted, jnp.arange(blocks), blocks), axis=-1)
        return jnp.pad(index, ((0, 0),) * 3 + ((0, -blocks % size),), constant_values=blocks)

    asked, index = lists(all_to_all(wanted, axis_name)), lists(wanted)
    places = jnp.where(index < blocks, index + blocks * jnp.arange(devices)[:, None, None, None], devices * blocks)

    def hops(number):
        for hop in range(1, devices):
            pairs = [(i, i + hop) for i in range(devices - hop)]
            of_round = (
                jax.lax.dynamic_slice_in_dim(x[other % devices], number * size, size, axis=-1)
                for x, other in ((asked, device + hop), (places, device - hop))
            )
            yield pairs, *of_round

    return rounds, hops


def _by_head(f):
    """`f` for each row of the batch and each group."""
    return jax.vmap(jax.vmap(f))


@_by_head
def _take(x, index):
    return x.at[index].get(mode="fill", fill_value=0)


@_by_head
def _put(x, index, rows):
    return x.at[index].set(rows, mode="drop")


@_by_head
def _add(x, index, rows):
    return x.at[index].add(rows.astype(x.dtype), mode="drop")
