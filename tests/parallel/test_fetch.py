"""Blocks of keys chosen by content, on a row that 8 simulated devices share, against the row on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import config
from longctx.ops.moba import MOBA
from longctx.ops.nsa import NSA
from longctx.parallel import fetch, mesh, sequence
from longctx.typing import Segments

DEVICES, BLOCKS, SIZE, GROUPS = 8, 20, 2, 2  # 20 blocks of 2 tokens a shard: rounds of 3 blocks


def island(f, **specs):
    """`f` on the shards of 8 devices, jitted."""
    shards = jax.P(None, "context")
    return jax.jit(jax.shard_map(f, out_specs=shards, axis_names={"context"}, check_vma=False, **specs))


def requests(density, seed):
    """`[1, DEVICES, T, G, n]`: for each device blocks of its own and those before it, some of them; -1 for none."""
    rng = np.random.default_rng(seed)
    found = np.full((1, DEVICES, 8, GROUPS, BLOCKS), -1)
    for device, t, g in np.ndindex(DEVICES, 8, GROUPS):
        index = rng.permutation((device + 1) * BLOCKS)[:BLOCKS]
        keep = rng.random(len(index)) < density
        found[0, device, t, g, : keep.sum()] = index[keep]
    return found


def fetched(tree, asked):
    """What each device fetches, `[B, devices, blocks of the row, ...]`."""
    return jax.tree.map(lambda x: x[:, None], fetch.blocks(tree, asked[:, 0], "context"))


def test_fetch():
    """Every block that is asked for arrives, and no other; cotangents come home and add up. Twenty times, as devices
    that disagree on the number of rounds would wait for one another.

    Seen to fail: a round too few; the last round's blocks counted twice in the gradient; the requests of one group
    served to all.
    """
    rng = np.random.default_rng(0)
    blocks = {
        "keys": rng.standard_normal((1, DEVICES * BLOCKS, SIZE, GROUPS, 3)).astype(np.float32),
        "values": rng.standard_normal((1, DEVICES * BLOCKS, SIZE, GROUPS)).astype(np.float32),
    }
    weights = jax.tree.map(
        lambda x: rng.standard_normal((1, DEVICES, *x.shape[1:])).astype(np.float32),
        blocks,
    )
    with jax.set_mesh(mesh.make(config.Mesh(1, DEVICES, 1))):
        run = island(fetched, in_specs=jax.P(None, "context"))

        @jax.jit
        def both(blocks, asked):
            found, pull = jax.vjp(lambda blocks: run(blocks, asked), blocks)
            return found, pull(weights)[0]

        for trial in range(20):
            asked = requests([0.0, 0.01, 0.05, 0.3, 1.0][trial % 5], trial)
            found, gradients = jax.device_get(both(blocks, asked))
            wanted = np.zeros((1, DEVICES, DEVICES * BLOCKS, 1, GROUPS), bool)
            for device, t, g in np.ndindex(DEVICES, 8, GROUPS):
                index = asked[0, device, t, g]
                wanted[0, device, index[index >= 0], 0, g] = True
            for device in range(DEVICES):  # its own are there
                wanted[0, device, device * BLOCKS : (device + 1) * BLOCKS] = True
            for name, x in blocks.items():
                mask = wanted.reshape(*wanted.shape, *(1,) * (x.ndim - 4))
                np.testing.assert_array_equal(found[name], np.where(mask, x[:, None], 0))
                expected = np.where(mask, weights[name], 0).sum(1)
                np.testing.assert_allclose(gradients[name], expected, atol=1e-5)


@pytest.mark.parametrize(("most", "rounds"), [(0, 0), (1, 1), (3, 1), (4, 2), (20, 7)])
def test_rounds_follow_the_requests(most, rounds):
    """As many as the blocks need that most move between two devices. Seen to fail: a device's own blocks counted."""
    wanted = np.zeros((DEVICES, DEVICES, 1, GROUPS, BLOCKS), bool)
    wanted[6, 2, 0, 1, :most] = True
    wanted[np.arange(DEVICES), np.arange(DEVICES)] = True
    with jax.set_mesh(mesh.make(config.Mesh(1, DEVICES, 1))):
        run = functools.partial(jax.shard_map, in_specs=jax.P("context"), axis_names={"context"}, check_vma=False)
        found = jax.jit(run(lambda x: fetch._plan("context", x[0])[0], out_specs=jax.P()))(wanted)
    assert found == rounds


LENGTH = 72  # shards of 9 tokens, which no block divides
ROWS = ([5, 31, 8, -3, 25], [-2, 20, 1, 39, 10])
HEADS = 4
OPS = {
    "moba": (MOBA, {"block": 11, "count": 2}),
    "nsa": (NSA, {"stride": 4, "selected": 4, "count": 4, "window": 11}),
}


def packed():
    ids = [np.concatenate([np.full(abs(n), i if n > 0 else 0) for i, n in enumerate(row, 1)]) for row in ROWS]
    positions = [np.concatenate([np.arange(n) if n > 0 else np.zeros(-n) for n in row]) for row in ROWS]
    return Segments.from_ids(np.stack(ids), np.stack(positions).astype(int))


def arguments(op):
    rng = np.random.default_rng(0)
    branches = (3,) if op is NSA else ()
    queries = [(2, LENGTH, HEADS, 8), *([(2, LENGTH, HEADS, 3)] if op is NSA else [])]
    keys = [(2, LENGTH, GROUPS, *branches, width) for width in (8, 6)]
    parameters = [(8, GROUPS, 8), (8, GROUPS, 6)] if op is NSA else []
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return [tuple(map(draw, shapes)) for shapes in (queries, keys, parameters)]


def outputs_and_gradients(name):
    op, options = OPS[name]

    def loss(arrays):
        y = sequence.attend(op, *arrays, segments=packed(), options=op.options(**options)).y
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(loss, has_aux=True))(arguments(op))


@pytest.mark.parametrize("name", OPS)
def test_shards_equal_whole(name):
    """Outputs and gradients of all inputs, on packed rows; shards that hold a part of a block, and less than one.

    Seen to fail: places of blocks counted from the shard's start; blocks without the tokens of the shard before.
    """
    expected = outputs_and_gradients(name)
    with jax.set_mesh(mesh.make(config.Mesh(1, DEVICES, 1))):
        found = outputs_and_gradients(name)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))
