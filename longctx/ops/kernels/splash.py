"""Softmax attention on TPU by JAX's splash attention, a Pallas kernel that skips blocks outside the mask.

The project's own machines have no TPU: only the forward pass was run, in Pallas's interpret mode; it was never compiled
for a TPU or run on one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from longctx.ops.backend import platform
from longctx.typing import Segments

_LANES = 128  # the kernel's tiles; lengths are filled up to a multiple of it


def refusal(q, k, v, pattern, *, segments, key_segments, sinks, soft_cap, decay, bias) -> str | None:
    """Why splash cannot compute this, as the end of a sentence; None if it can. Arguments as `attention`."""
    del k, v, segments, soft_cap
    if platform() != "tpu":
        return f"needs a TPU, and the platform is {platform()}; use 'blockwise'."
    if key_segments is not None:
        return "takes keys that are the queries' own tokens, and key_segments were given; use 'blockwise'."
    if any(x is not None for x in (sinks, decay, bias)):
        return "has neither sinks, nor decay, nor bias; use 'blockwise'."
    if pattern.ahead != 0 or not pattern.band:
        return f"computes causal attention, windowed or not, and the pattern is {pattern}; use 'blockwise'."
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [name for name in mesh.auto_axes if mesh.shape[name] > 1]
    if automatic:
        return f"cannot be split by the compiler over the mesh axes {automatic}; use 'blockwise', or jax.shard_map."
    return None


def attention(q, k, v, pattern, *, segments, scale, soft_cap, interpret=False):
    """Causal attention, within the pattern's window if it has one. Arguments as `attention`, after `refusal`.

    With `interpret` the kernel is interpreted, on any platform.
    """
    batch, length, heads, _ = q.shape
    padding = -length % _LANES
    padded = length + padding
    block = next(size for size in (512, 256, _LANES) if padded % size == 0)
    shape = (padded, padded)
    if pattern.reach is None:
        mask = splash_attention.CausalMask(shape)
    else:
        mask = splash_attention.LocalMask(shape, (pattern.reach, 0), 0)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * scale, k, v))
    if segments is None:
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :length]
    segments = Segments.of(segments, batch, length)
    ids = jnp.pad(segments.ids, ((0, 0), (0, padding)))
    y = jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(ids, ids)).swapaxes(1, 2)[:, :length]
    return jnp.where(segments.valid[:, :, None, None], y, 0)  # padding sees padding there
