"""A row of tokens cut into pieces, and put together again.

What fills up the last piece is zeros, which for `Segments` are padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from longctx.ops.sizes import sizes
from longctx.typing import Segments


def cut(rows: Any, size: int) -> Any:
    """`[B, T, ...]` arrays as `[n, B, size, ...]`."""

    def one(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, rows)


def join(pieces: Any, length: int) -> Any:
    """The inverse of `cut`, for rows of `length` tokens."""

    def one(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(one, pieces)


def scan(step: Callable, state: Any, rows: Any, size: int) -> tuple[Any, Any]:
    """`(y, state)` of `step(state, piece) -> (state, y)` over pieces of `size` tokens, one after the other.

    The backward pass keeps the state before each piece and computes the rest again. y may be None.
    """
    length = jax.tree.leaves(rows)[0].shape[1]
    state, y = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), state, cut(rows, size))
    return join(y, length), state


def by_spans(span: Callable, state: Any, inputs: Any, segments: Segments, chunk: int) -> tuple[Any, Any]:
    """`(y, state)` of `span(state, *inputs, segments, chunk) -> (state, y)`, a few chunks of all heads at a time.

    Within a span all that does not depend on the state is computed for its chunks together. On a CPU its arrays stay in
    the cache, which is worth more than the second computation costs in the backward pass.

    Args:
      inputs: named tuple, of which `v` is [B, T, H, ...].
    """
    batch, length, heads = inputs.v.shape[:3]
    chunks = -(-length // chunk)
    spans = -(-chunks // max(1, sizes().matrices // (batch * heads)))
    size = -(-chunks // spans) * chunk
    return scan(lambda state, rows: span(state, *rows, chunk), state, (*inputs, segments), size)


def cut_heads(x: Float[Array, "B T H K"], chunk: int) -> Float[Array, "n B H C K"]:
    """Chunks, in float32."""
    batch, _, heads, width = x.shape
    return jnp.transpose(x.astype(jnp.float32).reshape(batch, -1, chunk, heads, width), (1, 0, 3, 2, 4))


def join_heads(y: Float[Array, "n B H C V"], v: Float[Array, "B T H V"], segments: Segments) -> Float[Array, "B T H V"]:
    """The inverse of `cut_heads` for outputs, in the shape and dtype of v; 0 at padding."""
    y = jnp.transpose(y, (1, 0, 3, 2, 4)).reshape(v.shape)
    return jnp.where(segments.valid[..., None, None], y, 0).astype(v.dtype)


def cut_beside(rows: Any, chunk: int, most: int) -> Any:
    """`[B, T, ...]` as spans of chunks, `[spans, C, n, B, ...]`: a scan over C steps through n chunks side by side.

    n is at most `most`, and at least 1.
    """
    length = jax.tree.leaves(rows)[0].shape[1]
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    size = -(-chunks // -(-chunks // max(1, most)))

    def one(x):
        return jnp.moveaxis(x.reshape(*x.shape[:2], size, chunk, *x.shape[3:]), (3, 2), (1, 2))

    return jax.tree.map(one, cut(rows, size * chunk))


def join_beside(y: Shaped[Array, "spans C n B ..."], length: int) -> Shaped[Array, "B T ..."]:
    """The inverse of `cut_beside` for outputs."""
    y = jnp.moveaxis(y, (0, 1, 2), (1, 3, 2))
    return y.reshape(y.shape[0], -1, *y.shape[4:])[:, :length]


def along(mask: Bool[Array, "..."], like: Array) -> Bool[Array, "..."]:
    """A mask of the first axes of `like`, to be broadcast with it."""
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))
