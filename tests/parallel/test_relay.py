"""States that enter each device, by the prefix scan and passed on in blocks, against the devices' spans run in turn."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longctx import config
from longctx.ops import GATED_LINEAR, gated_delta, gated_linear, levels, linear_scan, selective_scan
from longctx.parallel import mesh, prefix, relay, sequence
from longctx.typing import Segments

HEADS, KEYS, VALUES = 2, 3, 4
SHAPES = {  # of the linear part, and of the state
    linear_scan: ((1, VALUES), (1, VALUES)),
    selective_scan: ((1, KEYS, VALUES), (1, KEYS, VALUES)),
    levels: ((1, HEADS, KEYS), (1, HEADS, KEYS, 1, VALUES)),
    gated_linear: ((1, HEADS, KEYS), (1, HEADS, KEYS, VALUES)),
    gated_delta: ((1, HEADS, KEYS, KEYS), (1, HEADS, KEYS, VALUES)),
}


def transitions(op, devices):
    """A transition for each device, and the state before the first; the third device forgets what came before it."""
    keys = jax.random.split(jax.random.key(devices), 3)
    inner, shape = SHAPES[op]
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


@pytest.mark.parametrize(
    ("op", "blocks", "devices"),
    [
        (linear_scan, 0, 8),
        (selective_scan, 0, 4),
        (levels, 0, 4),
        (gated_linear, 0, 3),
        (gated_delta, 0, 1),
        (gated_delta, 0, 8),
        (gated_delta, 1, 2),
        (gated_linear, 2, 3),
        (gated_delta, 4, 8),
    ],
)
def test_states_and_gradients(op, blocks, devices, monkeypatch):
    """Blocks of 0 are the scan. Float32, 1e-5 of compositions of at most 8 matrices of norm about 1.

    Seen to fail: the matrix not transposed on the way back; the last device's cotangent left out of it; the cotangent
    of the state before the first device taken from all; a block taken one step late.
    """
    monkeypatch.setattr(relay, "blocks", lambda transition, devices: blocks)
    given, state = transitions(op, devices)
    expected = value_and_gradients(in_turn(op), given, state)
    with ambient(devices):
        actual = value_and_gradients(on_devices(op), given, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), actual, expected)


def test_gradients_through_the_op(monkeypatch):
    """A packed row over 4 devices by the relay, two rows over `data`: as on one device, 1e-4 and gradients 5e-4.

    Seen to fail: columns put together out of order.
    """
    monkeypatch.setattr(relay, "STEP", 0)
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, 32, HEADS, width)) for key, width in zip(keys[:3], (3, 3, 4), strict=True))
    log_decay = jax.nn.log_sigmoid(jax.random.normal(keys[3], (2, 32, HEADS)))
    state = jax.random.normal(keys[4], (2, HEADS, 3, 4))
    segments = Segments.from_ids(np.repeat([[1, 2, 3, 0], [4, 4, 5, 5]], [3, 20, 5, 4], axis=1))

    def run(state, *inputs):
        y, after = sequence.run(GATED_LINEAR, inputs, state=state, segments=segments, options=GATED_LINEAR.options(8))
        return jnp.sum(jnp.sin(y)) + jnp.sum(after**2), (y, after)

    both = jax.value_and_grad(run, argnums=range(5), has_aux=True)
    expected = jax.jit(both)(state, q, k, v, log_decay)
    with jax.set_mesh(mesh.make(config.Mesh(data=2, context=4))):
        assert relay.blocks(gated_linear.Transition(jnp.zeros((2, HEADS, 3)), state), 4) == 4
        actual = jax.jit(lambda *a: both(*a))(state, q, k, v, log_decay)
    for tolerance, ours, theirs in zip((1e-4, 5e-4), actual, expected, strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("op", "blocks"), [*((op, 0) for op in SHAPES), (gated_delta, 2)])
def test_what_is_saved(op, blocks, monkeypatch):
    """On 8 devices, for the gradient: a transition and a state.

    Seen to fail: the whole transition composed and then applied to the state; a transition without `transposed`.
    """
    monkeypatch.setattr(relay, "blocks", lambda transition, devices: blocks)
    given, state = transitions(op, 8)

    def saved(given, state):
        transition = jax.tree.map(lambda x: x[0], given)
        _, back = jax.vjp(lambda *a: prefix.entering(op, *a, "context"), transition, state)
        return [x for x in jax.tree.leaves(back) if x.ndim]

    with ambient(8):
        island = jax.shard_map(
            saved, in_specs=(P("context"), P()), out_specs=P("context"), axis_names={"context"}, check_vma=False
        )
        kept = jax.eval_shape(island, given, state)
    assert sum(x.size for x in kept) == sum(x.size for x in given) + 8 * state.size


@pytest.mark.parametrize("blocks", [0, 2])
def test_what_is_sent(blocks, monkeypatch):
    """By 8 devices: a scan sends three states each way, and two matrices; the relay two blocks of one state, of
    which every device but the last sends each once.

    Seen to fail: the whole transition composed and then applied to the state; all devices sending at every step.
    """
    monkeypatch.setattr(relay, "blocks", lambda transition, devices: blocks)
    given, state = transitions(gated_delta, 8)

    def step(given, state):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(on_devices(gated_delta)(*a))), argnums=(0, 1))(given, state)

    with ambient(8):
        text = jax.jit(step).lower(given, state).compile().as_text()
    sent = re.findall(r"f32\[([\d,]+)\]\S* collective-permute\(.*source_target_pairs=\{(.*?\})\}", text)
    sent = collections.Counter((shape, pairs.count("{")) for shape, pairs in sent)
    if blocks:
        assert sent == {("1,2,3,2", 1): 4, ("1,2,3,2", 2): 12}
    else:
        states = {("1,2,3,4", n): 2 for n in (7, 6, 4)}
        assert sent == states | {("1,2,3,3", n): 2 for n in (7, 6)}


def test_choice():
    """Counted by hand from the docstring's formula, with 128 columns.

    Seen to fail: the matrix counted in the last hop of the scan; the relay chosen where it costs the same.
    """

    def blocks(op, heads, devices):
        matrix = (1, heads, 128, 128) if op is gated_delta else (1, heads, 128)
        shapes = jax.eval_shape(lambda: op.Transition(jnp.zeros(matrix), jnp.zeros((1, heads, 128, 128))))
        return relay.blocks(shapes, devices)

    # 1 MiB a state, 1 / 8 MiB a step. In eighths, on 4 devices: (2 + 4) (1 + 8 / 4) = 18 and 2 (1 + 8) + 8 = 26; on 64:
    # (62 + 16) (1 + 1 / 2) = 117 and 6 (1 + 8) + 5 * 8 = 94. Without a matrix on 4: 18 and 2 (1 + 8) = 18 and a little.
    assert blocks(gated_delta, 16, 4) == 4
    assert blocks(gated_delta, 16, 64) == 0
    assert blocks(gated_delta, 16, 2) == 0  # one state in one step either way
    assert blocks(gated_delta, 1, 8) == 0
    assert blocks(gated_linear, 16, 8) == 0
    assert blocks(gated_linear, 128, 8) > 0
