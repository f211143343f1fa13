"""Softmax attention on TPU by JAX's splash attention, a Pallas kernel that skips blocks outside the mask.

The project's own machines have no TPU: the forward pass was run in Pallas's interpret mode, and forward and backward
were compiled for a v5p; it was never run on a TPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from longctx.ops.backend import platform
from longctx.typing import Segments

_LANES = 128  # the kernel's tiles; lengths are filled up to a multiple of it


def refusal(q, k, v, pattern, *, segments, key_segments, before, sinks, soft_cap, decay, bias) -> str | None:
    """Why splash cannot compute this, as the end of a sentence; None if it can. Arguments as `attention`."""
    del k, v, segments, soft_cap
    if platform() != "tpu":
        return f"needs a TPU, and the platform is {platform()}; use 'blockwise'."
    if key_segments is not None and before is None:
        return "takes keys of neighbouring tokens, and key_segments may be of any; say `before`, or use 'blockwise'."
    if any(x is not None for x in (sinks, decay, bias)):
        return "has neither sinks, nor decay, nor bias; use 'blockwise'."
    if pattern.ahead != 0 or not pattern.band:
        return f"computes causal attention, windowed or not, and the pattern is {pattern}; use 'blockwise'."
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [name for name in mesh.auto_axes if mesh.shape[name] > 1]
    if automatic:
        return f"cannot be split by the compiler over the mesh axes {automatic}; use 'blockwise', or jax.shard_map."
    return None


def attention(q, k, v, pattern, *, segments, key_segments, before, scale, soft_cap, interpret=False):
    """Causal attention, within the pattern's window if it has one. Arguments as `attention`, after `refusal`.

    With `interpret` the kernel is interpreted, on any platform.
    """
    (batch, length, heads, _), earlier = q.shape, before or 0
    front, end = -earlier % _LANES, -length % _LANES
    shape = length + end, front + earlier + length + end
    if pattern.reach is None:
        mask = splash_attention.CausalMask(shape, front + earlier)
    else:
        mask = splash_attention.LocalMask(shape, (pattern.reach, 0), front + earlier)
    rows, columns = (next(size for size in (512, 256, _LANES) if side % size == 0) for side in shape)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        attn_logits_soft_cap=soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def fill(x, front):
        return jnp.pad(x, ((0, 0), (front, end), *((0, 0),) * (x.ndim - 2)))

    inputs = (fill(x, at).swapaxes(1, 2) for x, at in ((q * scale, 0), (k, front), (v, front)))
    if segments is None:
        return jax.vmap(kernel)(*inputs).swapaxes(1, 2)[:, :length]
    segments = Segments.of(segments, batch, length)
    held = segments if key_segments is None else key_segments
    ids = splash_attention.SegmentIds(fill(segments.ids, 0), fill(held.ids, front))
    y = jax.vmap(kernel)(*inputs, ids).swapaxes(1, 2)[:, :length]
    return jnp.where(segments.valid[:, :, None, None], y, 0)  # padding sees padding there
