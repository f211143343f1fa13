"""Rows of a state, whatever the layers: the first axis of every array is the row of the batch.

A request is admitted by putting its row into the state of a batch, and a prefix is used again by taking its row.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Int


def take(state: Any, rows: Int[Array, " R"]) -> Any:
    """The state of these rows alone."""
    return jax.tree.map(lambda x: x[rows], state)


def put(state: Any, rows: Int[Array, " R"], part: Any) -> Any:
    """The state with `part` in place of these rows; `part` has R rows, or one that all of them get."""
    return jax.tree.map(lambda x, y: x.at[rows].set(y), state, part)


def clear(state: Any, rows: Int[Array, " R"], empty: Any) -> Any:
    """The state with these rows as before any token: `empty` is what the model's `init_state` makes for one row."""
    return put(state, rows, empty)


def grow(state: Any, empty: Any) -> Any:
    """The state in the room of a larger one of as many rows, `empty`: each array is the beginning of the larger one.

    The documents in progress must have had room in it so far.
    """

    def move(old, new):
        return old if old.shape == new.shape else new.at[tuple(map(slice, old.shape))].set(old)

    return jax.tree.map(move, state, empty)
