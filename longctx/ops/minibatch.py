"""Mini-batches of a document's tokens, met on a grid of row tokens: what the fast forms of test-time training share.

Fast weights are updated by C tokens at a time, token p of a document being in its mini-batch p // C, wherever in the
row or in the span the document starts. In C consecutive tokens of a row no more than one mini-batch completes: those of
one document complete C tokens apart, and a document that begins within the C tokens does not get there, unless it
begins at the first of them. So a grid of C tokens is gone through in three phases, in each of which all tokens share
the weights that they start from:

    1. tokens of the document in progress, up to the completion, if there is one: the weights that enter;
    2. tokens of that document after it: the updated weights;
    3. tokens of the documents that begin within: the initial weights.

A phase without tokens, and rows of one document that starts at the row's first token have only the first, is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from longctx.ops import chunks
from longctx.ops.chunks import along
from longctx.typing import Segments


class Phase(NamedTuple):
    """Tokens of a grid chunk that share the weights they start from.

    Attributes:
      active: the tokens; padding is never one.
      counted: those whose mini-batch is in progress at the phase's end, or completes with it.
      run: documents begun in the chunk up to the token; tokens of one phase and one run are of one mini-batch.
      place: the token's index in its mini-batch, 0 to C-1.
      complete: the mini-batch completes with the last of them.
      fresh: what the state holds is forgotten before them.
    """

    active: Bool[Array, "B C"]
    counted: Bool[Array, "B C"]
    run: Int[Array, "B C"]
    place: Int[Array, "B C"]
    complete: Bool[Array, " B"]
    fresh: Bool[Array, " B"]

    @property
    def pairs(self) -> Bool[Array, "B C C"]:
        """Tokens (t, s) of one mini-batch, s not after t."""
        together = self.active[:, :, None] & self.active[:, None] & (self.run[:, :, None] == self.run[:, None])
        return jnp.tril(together)


def scan(block: Callable, state: Any, inputs: tuple, segments: Segments, minibatch: int) -> tuple[Array, Any]:
    """A fast form, phase by phase; the backward pass keeps the state before every C tokens and computes the rest again.

    Args:
      block: `block(state, inputs, phase) -> (y[B, C, ...], state)`; y is read for active tokens only. The state
        that it is given has been forgotten where it must be, and rows without active tokens must keep theirs.
      state: before the span, a pytree of arrays `[B, ...]`; zeros are the empty state.
      inputs: `[B, T, ...]`, given to `block` in float32.
      segments: documents of a packed row.
      minibatch: C.

    Returns:
      y `[B, T, ...]`, float32, 0 at padding, and the state after the span.
    """

    def chunk(state, rows):
        inputs, segments = rows
        inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)

        def run(state, phase):
            forgotten = jax.tree.map(lambda x: jnp.where(along(phase.fresh, x), 0, x), state)
            y, after = block(forgotten, inputs, phase)
            return after, jnp.where(along(phase.active, y), y, 0)

        def skip(state, phase):
            y = jax.eval_shape(run, state, phase)[1]
            return state, jnp.zeros(y.shape, y.dtype)

        def step(state, phase):
            return jax.lax.cond(jnp.any(phase.active), run, skip, state, phase)

        state, y = jax.lax.scan(step, state, phases(segments, minibatch))
        return state, jnp.sum(y, axis=0)

    return chunks.scan(chunk, state, (tuple(inputs), segments), min(minibatch, segments.ids.shape[1]))


def phases(segments: Segments, minibatch: int) -> Phase:
    """The three phases of at most C tokens of a row, stacked."""
    valid, first = segments.valid, segments.starts[:, :1]
    place = jnp.where(valid, segments.positions % minibatch, 0)
    run = segments.runs - first
    completes = valid & (place == minibatch - 1)
    passed = jnp.cumsum(completes, axis=1) - completes > 0
    entered = valid & (run == 0)
    before, after, begun = entered & ~passed, entered & passed, valid & (run > 0)
    none = jnp.zeros_like(first[:, 0])
    each = (
        Phase(before, before, run, place, jnp.any(completes, axis=1), first[:, 0]),
        Phase(after, after, run, place, none, none),
        Phase(begun, begun & (run == run[:, -1:]), run, place, none, jnp.any(begun, axis=1)),
    )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
