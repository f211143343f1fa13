r"""Decoding over keys that devices share by time: each attends to its own, and the partial results merge in a tree.

With (out_p, L_p) the partial result over the keys of device p,

    m = max_p L_p;    l = sum_p e^{L_p - m};    out = sum_p e^{L_p - m} out_p / l;    L = m + log l

which are three reductions over the devices (Shyam et al., arXiv:2408.04093), of B H (V + 2) float32 numbers a query in
all, however many keys there are. The queries are the same on all devices, and so is the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.attention import attention_partial
from longctx.ops.partial import Partial
from longctx.ops.patterns import Pattern
from longctx.typing import Segments


def decode(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    pattern: Pattern,
    segments: Segments,
    held: Segments,
    axis_name: str,
    **options,
) -> Partial:
    """Attention of a few queries to the keys of all devices, inside a `jax.shard_map`; not to be differentiated.

    Args:
      q: the same on all devices; T is 1 in decoding.
      k, v: this device's share of the keys, any share.
      pattern: which keys a query may see within its document.
      segments: of the queries.
      held: of this device's keys, padding where a slot is empty; ids and positions are those of the whole rows.
      axis_name: the mesh axis.
      options: of `longctx.ops.attention.attention_partial`.

    Returns:
      The partial result, float32, the same on all devices: 0 and -inf for a query that sees nothing.
    """
    part = attention_partial(q, k, v, pattern, segments, held, **options)
    peak = jax.lax.pmax(part.logsumexp, axis_name)
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weight = jnp.exp(part.logsumexp - peak)
    total = jax.lax.psum(weight, axis_name)
    output = jax.lax.psum(weight[..., None] * part.output, axis_name)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return Partial(output / total[..., None], jnp.where(seen, peak + jnp.log(total), -jnp.inf))
