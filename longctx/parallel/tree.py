r"""Decoding with a cache that devices share by slots: each attends to its own, and the partial results merge in a tree.

With (out_p, L_p) the partial result over the keys of device p,

    m = max_p L_p;    l = sum_p e^{L_p - m};    out = sum_p e^{L_p - m} out_p / l;    L = m + log l

which are three reductions over the devices (Shyam et al., arXiv:2408.04093), of B H (V + 2) float32 numbers a query in
all, however many keys there are. The queries are the same on all devices, and so is the result.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from longctx.ops import attention as ops
from longctx.ops.attention import Part
from longctx.ops.biases import Bias
from longctx.ops.partial import Partial, add_sinks, merge
from longctx.ops.patterns import Heads
from longctx.parallel import mesh
from longctx.typing import Segments

_WHOLE, _SHARD = PartitionSpec(), PartitionSpec(None, "context")


def attention(
    parts: Sequence[Part],
    v: Float[Array, "B S G V"],
    segments: Segments,
    held: Segments,
    *,
    sinks: Float[Array, " H"] | Partial | None = None,
    bias: Bias | None = None,
    decay: Float[Array, "B T H"] | None = None,
    kv_decay: Float[Array, "B S H"] | None = None,
    **options,
) -> Float[Array, "B T H V"]:
    """`longctx.ops.attention.attention_by_parts` of a span to the slots of a cache.

    The devices along `context` of the ambient mesh share the slots if the span is one token, some pattern's reach is
    unbounded, and they divide the slots; they are then expected to be split already, by `KVCache.shared`. Otherwise it
    is the plain op.

    Args:
      parts, v, sinks, bias, decay, kv_decay, options: as there.
      segments: of the queries.
      held: of the slots.
    """
    patterns = [part.pattern for part in parts]
    unbounded = not isinstance(patterns[0], Heads) and any(pattern.reach is None for pattern in patterns)
    if not unbounded or parts[0].q.shape[1] > 1 or mesh.context_size() == 1 or v.shape[1] % mesh.context_size():
        options |= {"sinks": sinks, "bias": bias, "decay": decay, "kv_decay": kv_decay}
        return ops.attention_by_parts(parts, v, segments, held, **options)

    def run(queries, keys, v, held, kv_decay, segments, bias, decay):
        shard = [Part(*each) for each in zip(queries, keys, patterns, strict=True)]
        added = {"bias": bias, "decay": decay, "kv_decay": kv_decay}
        return decode(shard, v, segments, held, "context", **added, **options)

    island = jax.shard_map(
        run,
        in_specs=(_WHOLE, _SHARD, _SHARD, _SHARD, _SHARD, _WHOLE, _WHOLE, _WHOLE),
        out_specs=_WHOLE,
        axis_names={"context"},
        check_vma=False,
    )
    queries, keys = [part.q for part in parts], [part.k for part in parts]
    result = jax.jit(island, inline=True)(queries, keys, v, held, kv_decay, segments, bias, decay)
    result = result if sinks is None else add_sinks(result, sinks)
    return result.output.astype(v.dtype)


def decode(
    parts: Sequence[Part],
    v: Float[Array, "B S G V"],
    segments: Segments,
    held: Segments,
    axis_name: str,
    **options,
) -> Partial:
    """Attention of a few queries to the keys of all devices, inside a `jax.shard_map`; not to be differentiated.

    Args:
      parts: queries, the same on all devices, and this device's share of the keys, any share; of no pattern by heads.
      v: this device's share of the values.
      segments: of the queries.
      held: of this device's keys, padding where a slot is empty; ids and positions are those of the whole rows.
      axis_name: the mesh axis.
      options: of `longctx.ops.attention.attention_partial`.

    Returns:
      The partial result, float32, the same on all devices: 0 and -inf for a query that sees nothing.
    """
    own = (ops.attention_partial(q, k, v, pattern, segments, held, **options) for q, k, pattern in parts)
    part = functools.reduce(merge, own)
    peak = jax.lax.pmax(part.logsumexp, axis_name)
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weight = jnp.exp(part.logsumexp - peak)
    total = jax.lax.psum(weight, axis_name)
    output = jax.lax.psum(weight[..., None] * part.output, axis_name)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return Partial(output / total[..., None], jnp.where(seen, peak + jnp.log(total), -jnp.inf))
