"""The law of shard: a sequence split over devices gives what one device gives."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from laws.cases import GROWING_STATE, ROWS, T, families, inputs, layers, make, packed, slow
from laws.compare import compare
from laws.spans import differentiated, empty, real, span, weights

from longctx import config
from longctx.parallel import mesh as meshes
from longctx.parallel import rules

SHARDINGS = {  # data x context x model
    "1x1x1": config.Mesh(1, 1, 1),
    "1x2x1": config.Mesh(1, 2, 1),
    "1x4x1": config.Mesh(1, 4, 1),
    "1x8x1": config.Mesh(1, 8, 1),
    "2x2x2": config.Mesh(2, 2, 2),
}


@layers
def test_shard(name):
    """The sequence split over 8 devices = one device, on packed rows, gradients of every parameter included.

    Seen to fail: the prefix scan composing (then, first); keys that are both global and in the halo counted twice.
    """
    _shard(name, "1x8x1")


@families
@pytest.mark.parametrize("sharding", ["2x2x2", *slow("1x1x1", "1x2x1", "1x4x1")])
def test_shard_on_other_meshes(name, sharding):
    """The same where rows and heads are split as well, and on fewer devices; see `test_shard`."""
    _shard(name, sharding)


def _shard(name, sharding):
    graph, params = make(name)
    x, segments = np.asarray(inputs(T)), packed(ROWS, T)
    dy, dstate = weights(x), None if name in GROWING_STATE else weights(real(empty(name, T)))
    expected = span(name, x, segments, dy=dy, dstate=dstate, losses=1)
    run = jax.jit(functools.partial(differentiated, graph))
    with jax.set_mesh(meshes.make(SHARDINGS[sharding])):
        spec = jax.P("data", "context")
        mesh = jax.sharding.get_mesh()
        place = functools.partial(jax.device_put, device=jax.sharding.NamedSharding(mesh, spec))
        variables = nnx.state(nnx.merge(graph, params), nnx.Param)
        params = jax.device_put(params, nnx.as_pure(rules.shardings(mesh, variables)))
        x, segments, dy = jax.tree.map(place, (x, segments, dy))
        actual = jax.device_get(run(params, x, segments, None, dy, dstate, np.float32(1)))

    def asked(out):
        return out.y if name in GROWING_STATE else out[:2], out.gradients[:2]

    compare(asked(actual), asked(expected))
