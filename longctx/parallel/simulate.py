r"""Shard by shard on one device: what a sequence-sharded op must give, without a mesh, and where it first does not.

The same algorithms as in `longctx.parallel`, each as plainly as it can be said, on slices of the whole row:

    recurrence   entering_p = (t_{p-1} ∘ … ∘ t_0)(state), composed in order;  y_p = chunked(x_p, entering_p)
    halo         attention of the queries of shard p to the keys of tokens [start_p - reach, end_p), and to anchors
    ring         partial results of the queries of shard p and the keys of each shard, merged

They share the ops with the sharded form and nothing else: where they differ from the op on the whole row, the op is at
fault; where the sharded form differs from them, what crosses devices is. `docs/context_parallelism.md` has the method.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from longctx.ops import attention as ops
from longctx.ops.family import Recurrence
from longctx.ops.partial import merge
from longctx.ops.patterns import Pattern
from longctx.typing import Segments


def recurrence(
    family: Recurrence, inputs: tuple, parameters: tuple = (), state: Any = None, *, shards: int, segments: Segments
):
    """A family of recurrences whose states compose, shard by shard.

    Args:
      family: such as `longctx.ops.gated_delta.GATED_DELTA`.
      inputs: its inputs, `[B, T, ...]`.
      parameters: its parameters.
      state: before the span; None is the empty state.
      shards: P; divides T.
      segments: the documents of the span.

    Returns:
      `(y, state, entering)`: the outputs `[B, T, ...]`, the state after the span, and the states that enter the shards,
      with a leading axis P.
    """
    cut = [_shard((inputs, segments), p, shards) for p in range(shards)]
    calls = [family.prepare(part, parameters, state, own) for part, own in cut]
    transitions = [family.transition(*call.span) for call in calls]
    entering = [calls[0].state]
    for p in range(1, shards):
        entering.append(family.apply(functools.reduce(family.compose, transitions[:p]), entering[0]))
    outputs = []
    for call, before in zip(calls, entering, strict=True):
        y, after = family.chunked(*call._replace(state=before))
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), after, jax.tree.map(lambda *x: jnp.stack(x), *entering)


def halo(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    pattern: Pattern,
    segments: Segments,
    shards: int,
) -> Float[Array, "B T H V"]:
    """Attention of bounded reach: each shard's queries, and its keys, those before it, and anchors."""
    length = q.shape[1] // shards
    outputs = []
    for p in range(shards):
        end = (p + 1) * length
        queries, own = _shard((q, segments), p, shards)
        keys, values, held = jax.tree.map(lambda x, end=end: x[:, :end], (k, v, segments))
        near = jnp.arange(end) >= p * length - pattern.reach
        anchors = jnp.isin(held.positions, jnp.asarray(pattern.anchors, jnp.int32))
        held = dataclasses.replace(held, ids=jnp.where(near | anchors, held.ids, 0))
        outputs.append(ops.attention(queries, keys, values, pattern, own, held))
    return jnp.concatenate(outputs, axis=1)


def ring(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    pattern: Pattern,
    segments: Segments,
    shards: int,
) -> Float[Array, "B T H V"]:
    """Attention of any reach: each shard's queries and the keys of every shard, partial results merged."""
    cut = [_shard((q, k, v, segments), p, shards) for p in range(shards)]
    outputs = []
    for q, _, _, own in cut:
        parts = [ops.attention_partial(q, k, v, pattern, own, held) for _, k, v, held in cut]
        outputs.append(functools.reduce(merge, parts).output.astype(v.dtype))
    return jnp.concatenate(outputs, axis=1)


def first_difference(
    found: Float[Array, "B T ..."],
    expected: Float[Array, "B T ..."],
    segments: Segments,
    shards: int,
    tolerance: float = 1e-4,
) -> str | None:
    """Where two arrays by token first differ, in a sentence; None if they do not.

    Differences are relative to the largest entry of `expected`. A number that is not finite differs from all; what is
    at padding is not compared.

    Args:
      found, expected: outputs, or gradients of inputs.
      segments: the documents of the span.
      shards: P; divides T.
      tolerance: the largest relative difference that is none.
    """
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    scale = np.abs(expected).max(initial=1e-30)
    error = np.nan_to_num(np.abs(found - expected), nan=np.inf).reshape(*found.shape[:2], -1).max(axis=2) / scale
    wrong = (error > tolerance) & np.asarray(segments.valid)
    if not wrong.any():
        return None
    token = int(np.argmax(wrong.any(axis=0)))
    row = int(np.argmax(wrong[:, token]))
    length = wrong.shape[1] // shards
    shard, place = divmod(token, length)
    document, position = (int(x[row, token]) for x in (segments.ids, segments.positions))
    by_shard = wrong.reshape(len(wrong), shards, length).any(axis=(0, 2))
    return (
        f"first at token {token} (row {row}; shard {shard}, its token {place}; document {document}, "
        f"position {position}), by {error[row, token]:.2g} of the largest entry; in all {int(wrong.sum())} tokens, "
        f"by at most {error[wrong].max():.2g}, in shards {', '.join(map(str, np.flatnonzero(by_shard)))}"
    )


def _shard(tree: Any, number: int, shards: int) -> Any:
    """Shard `number` of arrays `[B, T, ...]`."""

    def cut(x):
        length = x.shape[1] // shards
        return x[:, number * length : (number + 1) * length]

    return jax.tree.map(cut, tree)
