"""Laws 9 and 10: the row of the batch is the first axis of every array of a state, and a ring is the whole cache."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws.cases import LAYERS, D, inputs, make, ops_once, shapes
from laws.compare import close

from longctx.inference import rows
from longctx.memory.store import Store
from longctx.typing import Segments

SPAN = 8


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_axis_is_the_row(name):
    """In the state before any token and after some, and one row's arrays are those of several but for it.

    Nothing is computed. Seen to fail: a counter that all rows share.
    """
    graph, params = shapes(name)

    def states(batch, params):
        layer = nnx.merge(graph, params)
        before = layer.init_state(batch, 16, jnp.float32)
        return before, layer(jnp.zeros((batch, SPAN, D)), Segments.single(batch, SPAN), before)[1]

    of_one, of_three = (jax.eval_shape(functools.partial(states, batch), params) for batch in (1, 3))
    for one, three in zip(of_one, of_three, strict=True):
        chex.assert_trees_all_equal_dtypes(one, three)
        for few, many in zip(jax.tree.leaves(one), jax.tree.leaves(three), strict=True):
            assert (few.shape[:1], many.shape[:1]) == ((1,), (3,)), f"{few.shape} of one row, {many.shape} of three"
            assert few.shape[1:] == many.shape[1:]


@ops_once
def test_rows(name):
    """Rows at different places in their documents, by one program: read on, with a new document, idle, put together.

    A row's output and state are, to 1e-5 of the largest entry, those beside other rows and in another order. A row that
    is put back has lost what it has read since, and one that is cleared reads as a new one. A state that grows is that
    of a larger room.

    Seen to fail: an output scaled by the largest of the batch; `put` of the rows in their order.
    """
    graph, params = make(name)

    @jax.jit
    def read(params, x, offsets, counts, state):
        index = jnp.arange(SPAN, dtype=jnp.int32)
        segments = Segments.from_ids(index < counts[:, None], offsets[:, None] + index)
        y, state = nnx.merge(graph, params)(x, segments, state)
        return jnp.where(segments.valid[..., None], y, 0), state

    def empty(batch, room):
        return nnx.merge(graph, params).init_state(batch, room, jnp.float32)

    x, first = inputs(SPAN, 4), (np.zeros(4, np.int32), np.array([8, 5, 0, 7], np.int32))
    _, state = read(params, x, *first, empty(4, 32))
    small = empty(4, 16)
    if jax.tree.map(jnp.shape, small) != jax.tree.map(jnp.shape, state):
        grown = rows.grow(read(params, x, *first, small)[1], empty(4, 32))
        close(arrays(grown), arrays(state), 1e-5, "grown: ")
    x, then = x[::-1], (np.array([8, 0, 0, 7], np.int32), np.array([3, 8, 8, 0], np.int32))
    expected, after = read(params, x, *then, state)
    idle = np.array([3])
    close(arrays(rows.take(after, idle)), arrays(rows.take(state, idle)), 1e-5, "an idle row: ")
    order, own = np.array([2, 0, 3, 1]), np.array([1, 3])
    others = x[order] * np.array([10, 1, 10, 1])[:, None, None]
    found, mixed = read(params, others, *(each[order] for each in then), rows.take(state, order))
    close(found[own], expected[order[own]], 1e-5, "beside other rows: ")
    close(arrays(rows.take(mixed, own)), arrays(rows.take(after, order[own])), 1e-5, "states beside other rows: ")
    back = rows.put(after, np.array([3, 0]), rows.take(state, np.array([3, 0])))
    back = rows.clear(back, np.array([2]), empty(1, 32))
    again, _ = read(params, x, np.array([8, 0, 0, 7], np.int32), then[1], back)
    close(again, expected, 1e-5, "put back, and cleared: ")


def arrays(state):
    """Of a state, with what is infinite at first made finite."""
    return [jnp.nan_to_num(x) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("name", ["attention", "forgetting"])
def test_a_ring_with_room_is_the_whole_cache(name):
    """A ring as long as the document gives what a longer one does; a shorter one keeps the document's last tokens. A
    slot takes the bytes that the leaves declare. Seen to fail: a ring of one slot fewer.
    """
    layer, x, found = nnx.merge(*make(name)), inputs(SPAN + 1, 1), {}
    for room in (SPAN + 1, 2 * SPAN, SPAN // 2):
        _, state = layer(x[:, :SPAN], Segments.single(1, SPAN), layer.init_state(1, room, jnp.float32))
        y, state = layer(x[:, SPAN:], Segments.single(1, 1, SPAN), state)
        (store,) = (leaf for leaf in jax.tree.leaves(state, is_leaf=is_store) if is_store(leaf))
        declared = sum(np.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in store.leaves)
        assert sum(x.nbytes for x in store.entries) == declared * room
        segments = store.read().segments
        found[room] = y, sorted(segments.positions[segments.valid].tolist())
    close(found[SPAN + 1][0], found[2 * SPAN][0], 1e-5, "")
    whole = list(range(SPAN + 1))
    assert [kept for _, kept in found.values()] == [whole, whole, whole[-SPAN // 2 :]]


def is_store(leaf):
    return isinstance(leaf, Store)
