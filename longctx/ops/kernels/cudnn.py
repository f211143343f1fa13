"""Softmax attention by cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

Written to the documented interface; the project's own machines have no GPU, and this file was never run on one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from longctx.ops.backend import platform


def refusal(q, k, v, pattern, *, segments, key_segments, before, sinks, soft_cap, decay, bias) -> str | None:
    """Why cuDNN cannot compute this, as the end of a sentence; None if it can. Arguments as `attention`."""
    if platform() != "gpu":
        return f"needs an NVIDIA GPU, and the platform is {platform()}; use 'blockwise'."
    if segments is not None or key_segments is not None:
        return "takes rows of one document only; pass no segment ids, or use 'blockwise'."
    if any(x is not None for x in (sinks, soft_cap, decay, bias)):
        return "has neither sinks, nor soft cap, nor decay, nor bias; use 'blockwise'."
    if pattern.ahead != 0 or not pattern.band:
        return f"computes causal attention, windowed or not, and the pattern is {pattern}; use 'blockwise'."
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, and q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast, or use 'blockwise'."
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 128:
        return (
            "takes heads of one width for keys and values, a multiple of 8 up to 128, and they have "
            f"{q.shape[-1]} and {v.shape[-1]}; use 'blockwise'."
        )
    return None


def attention(q, k, v, pattern, *, segments, key_segments, before, scale, soft_cap):
    """Causal attention, within the pattern's window if it has one. Arguments as `attention`, after `refusal`."""
    del segments, key_segments, before, soft_cap  # None: refused otherwise
    window = None if pattern.reach is None else (pattern.reach, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )
