r"""Decoding with a cache that devices share by slots: each attends to its own, and the partial results merge in a tree.

With (out_p, L_p) the partial result over the keys of device p,

    m = max_p L_p;    l = sum_p e^{L_p - m};    out = sum_p e^{L_p - m} out_p / l;    L = m + log l

which are three reductions over the devices (Shyam et al., arXiv:2408.04093), of B H (V + 2) float32 numbers a query in
all, however many keys there are. The queries are the same on all devices, and so is the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from longctx.ops.partial import Partial


def merged(part: Partial, axis_name: str) -> Partial:
    """The results over the keys of all devices, inside a `jax.shard_map`; not to be differentiated.

    Args:
      part: over this device's keys, of queries that are the same on all devices.
      axis_name: the mesh axis.

    Returns:
      The same on all devices: 0 and -inf for a query that sees nothing.
    """
    peak = jax.lax.pmax(part.logsumexp, axis_name)
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weight = jnp.exp(part.logsumexp - peak)
    total = jax.lax.psum(weight, axis_name)
    output = jax.lax.psum(weight[..., None] * part.output, axis_name)
    visible = total > 0
    total = jnp.where(visible, total, 1.0)
    return Partial(output / total[..., None], jnp.where(visible, peak + jnp.log(total), -jnp.inf))
