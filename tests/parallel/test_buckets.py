"""Attention within buckets on shards of packed rows: what goes round the devices, and what is kept."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from longctx import config
from longctx.ops.lsh import LSH
from longctx.parallel import mesh, sequence
from longctx.typing import Segments

BATCH, LENGTH, HEADS, WIDTH, BUCKETS = 2, 64, 4, 8, 4
# Lengths of documents, negative for padding. With 8 shards of 8 tokens: documents that straddle an edge, touch one,
# span three shards and more, shards wholly inside one document, padding from an edge on and across one.
ROWS = ([15, 17, 8, -3, 21], [-2, 38, 5, -5, 6, 1, 7])


def packed():
    ids = [np.concatenate([np.full(abs(n), i * (n > 0)) for i, n in enumerate(row, 1)]) for row in ROWS]
    return Segments.from_ids(np.stack(ids))


def in_buckets(rounds):
    def run(q, k, v):
        hashes = np.random.default_rng(0).integers(BUCKETS, size=(BATCH, q.shape[1], HEADS, rounds))
        hashes = jnp.asarray(hashes, jnp.int32)
        inputs = (q, v, hashes), (k, v, hashes)
        return sequence.attend(LSH, *inputs, segments=packed(), options=LSH.options(BUCKETS)).y

    return run


def arguments():
    return list(jax.random.normal(jax.random.key(0), (3, BATCH, LENGTH, HEADS, WIDTH)))


def outputs_and_gradients(op):
    def loss(arrays):
        out = op(*arrays)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out)), out

    return jax.jit(jax.grad(loss, has_aux=True))


def test_rounds_of_hashing_share_the_ring():
    """Keys and values are sent once for all rounds, forward and backward, and of a round its hashes alone.

    Seen to fail: a ring for each round.
    """

    def sent(rounds):
        with jax.set_mesh(mesh.make(config.Mesh(1, 8, 1))):
            text = outputs_and_gradients(in_buckets(rounds)).lower(arguments()).as_text()
        sizes = {"f32": 0, "i32": 0, "i1": 0}
        for shape, kind in re.findall(r"collective_permute.*-> tensor<([\dx]+)x([a-z]+\d+)>", text):
            sizes[kind] += math.prod(map(int, shape.split("x")))
        return sizes

    once, again = sent(1), sent(3)
    # In the loops forward and backward, and gradients once more on the last turn, which is outside of the loop.
    assert once["f32"] == again["f32"] == 2 * (1 + 2 + 1) * BATCH * LENGTH // 8 * HEADS * WIDTH
    assert again["i32"] - once["i32"] == 2 * 2 * BATCH * LENGTH // 8 * HEADS


def test_ring_keeps_no_other_keys():
    """What is kept for the backward pass does not grow with the devices. Fails under plain differentiation."""

    def kept(devices):
        with jax.set_mesh(mesh.make(config.Mesh(1, devices, 1))):
            pull = jax.eval_shape(lambda *args: jax.vjp(in_buckets(2), *args)[1], *arguments())
        return sum(math.prod(x.shape) for x in jax.tree.leaves(pull) if x.ndim > 2)

    assert kept(8) == kept(2) > 0
