"""Rotary positions with the frequencies of RoPE."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from longctx.ops import positions as ops


def rotate(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], base: float) -> Float[Array, "B T H K"]:
    """`x` turned by its positions within the document; `base`: of the frequencies."""
    return ops.rotate(x, positions, ops.rope(x.shape[-1], base))
