r"""Softmax attention of unbounded reach over a split sequence: all tokens of some heads, by all-to-all.

A neighbouring devices that hold T tokens of all heads exchange them, so that each has A T tokens of H / A heads,
attends, and sends the result home: DeepSpeed-Ulysses (Jacobs et al., arXiv:2309.14509). With A = P, all the devices
along the axis, attention is local. With fewer, what remains is a ring of P / A stations over shards of A T tokens, one
ring for each of the A shares of heads: USP (Fang and Zhao, arXiv:2405.07719).

G groups of keys are shared out with their heads. Where the groups do not suffice, a group goes to all of the s devices
that have heads of it, each of which has a share of these heads:

    A = a s,    a = gcd(G, A),    s divides H / G

which there is whenever A divides H. A device sends, forward, T (H K + s G (K + V)) (A - 1) / A numbers out and the
float32 partial results, T H (V + 1) (A - 1) / A, home; as much backward.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops import attention as ops
from longctx.ops.biases import Bias
from longctx.ops.partial import Partial
from longctx.ops.patterns import Pattern
from longctx.parallel import ring
from longctx.parallel.all_to_all import all_to_all
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
    among: int,
    balanced: bool = False,
    **options,
) -> Partial:
    """Attention of this shard's queries to the keys of all shards, inside a `jax.shard_map`.

    Args:
      q, k, v, pattern, segments, axis_name, decay, bias, options: as in `longctx.parallel.ring.attention`.
      among: A, neighbouring devices that share the heads; it divides H and the devices of the axis.
      balanced: whether the ring is, where A leaves one.

    Returns:
      The partial result, float32. First derivatives only.
    """
    (batch, length), groups = q.shape[:2], k.shape[2]
    sets = math.gcd(groups, among)  # a
    sharers = among // sets  # s

    def by_device(x, axis):  # the heads at `axis`: A first, then those of each
        x = x.reshape(*x.shape[:axis], groups // sets, sets, sharers, -1, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, (axis + 1, axis + 2), (0, 1))
        return x.reshape(among, *x.shape[2 : axis + 2], -1, *x.shape[axis + 4 :])

    def with_sharers(x):  # the same of groups, once for each device that has heads of it
        x = jnp.moveaxis(x.reshape(batch, length, groups // sets, sets, -1), 3, 0)
        return jnp.repeat(x, sharers, axis=0)

    def rows(x):  # [A, B, T, ...], for each device, becomes [B, A T, ...], from all
        return jnp.moveaxis(all_to_all(x, axis_name), 0, 1).reshape(batch, among * length, *x.shape[3:])

    def home(x):
        x = jnp.moveaxis(x.reshape(batch, among, length, *x.shape[2:]), 1, 0)
        x = all_to_all(x, axis_name)
        x = x.reshape(sets, sharers, batch, length, groups // sets, -1, *x.shape[4:])
        x = jnp.moveaxis(x, (0, 1), (3, 4))
        return x.reshape(batch, length, -1, *x.shape[6:])

    def of_all(x):
        return rows(jnp.broadcast_to(x, (among, *x.shape)))

    ids, positions = of_all(segments.ids), of_all(segments.positions)
    whole = Segments(ids, positions, jnp.zeros(ids.shape, bool))  # attention reads no starts
    q, decay = jax.tree.map(lambda x: rows(by_device(x, 2)), (q, decay))
    k, v = rows(with_sharers(k)), rows(with_sharers(v))
    mine = jax.lax.axis_index(axis_name) % among
    bias = jax.tree.map(lambda x: jnp.take(by_device(x, 0), mine, axis=0), bias)
    options |= {"decay": decay, "bias": bias}
    if among == jax.lax.axis_size(axis_name):
        partial = ops.attention_partial(q, k, v, pattern, whole, **options)
    else:
        partial = ring.attention(q, k, v, pattern, whole, axis_name, step=among, balanced=balanced, **options)
    return jax.tree.map(home, partial)
