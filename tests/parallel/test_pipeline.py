"""States that enter each device, by the prefix scan and handed on in blocks, against the devices' spans run in turn."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longctx import config
from longctx.ops import gated_delta, gated_linear, linear_scan, mlstm
from longctx.parallel import mesh, pipeline, prefix, sequence
from longctx.typing import Segments

HEADS, KEYS, VALUES = 2, 3, 4


def transitions(op, devices):
    """A transition for each device, and the state before the first; the third device forgets what came before it."""
    keys = jax.random.split(jax.random.key(devices), 3)
    inner = {linear_scan: (1, VALUES), gated_linear: (1, HEADS, KEYS), gated_delta: (1, HEADS, KEYS, KEYS)}[op]
    shape = (1, VALUES) if op is linear_scan else (1, HEADS, KEYS, VALUES)
    linear = jax.random.normal(keys[0], (devices, *inner)) / math.sqrt(KEYS)
    linear = linear.at[2:3].set(0)
    return op.Transition(linear, jax.random.normal(keys[1], (devices, *shape))), jax.random.normal(keys[2], shape)


def in_turn(op):
    """The definition: every device applies its transition to what the one before it leaves."""

    def run(given, state):
        entering = []
        for i in range(len(given.state)):
            entering.append(state)
            state = op.apply(jax.tree.map(lambda x, i=i: x[i], given), state)
        return jnp.stack(entering)

    return run


def on_devices(op):
    def shard(given, state):
        return prefix.entering(op, jax.tree.map(lambda x: x[0], given), state, "context")[None]

    specs = {"in_specs": (P("context"), P()), "out_specs": P("context")}
    return jax.shard_map(shard, axis_names={"context"}, check_vma=False, **specs)


def value_and_gradients(f, given, state):
    weights = jax.random.normal(jax.random.key(9), (len(given.state), *state.shape))
    return jax.jit(jax.value_and_grad(lambda *a: (jnp.vdot(weights, f(*a)), f(*a)), argnums=(0, 1), has_aux=True))(
        given, state
    )


def ambient(devices):
    return jax.set_mesh(mesh.make(config.Mesh(data=1, context=devices)))


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("op, blocks", [
    (linear_scan, 0), (gated_linear, 0), (gated_delta, 0), (gated_delta, 1), (gated_linear, 2), (gated_delta, 4),
])  # fmt: skip
def test_states_and_gradients(op, blocks, devices, monkeypatch):
    """Float32, 1e-5 of compositions of at most 8 matrices of norm about 1.

    Seen to fail:
    """
    monkeypatch.setattr(pipeline, "blocks", lambda transition, devices: blocks)
    given, state = transitions(op, devices)
    expected = value_and_gradients(in_turn(op), given, state)
    with ambient(devices):
        actual = value_and_gradients(on_devices(op), given, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), actual, expected)
