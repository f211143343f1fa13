"""Every op on shards of the sequence against the op on the whole, on packed rows; and what it sends for that."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import attend
from jax.sharding import NamedSharding

from longctx import config
from longctx.ops import CAUSAL_CONV, GATED_DELTA, GATED_LINEAR, LINEAR_SCAN, SLSTM, biases, slstm
from longctx.ops.patterns import (
    Causal,
    Chunked,
    Dilated,
    Fixed,
    Global,
    Heads,
    RandomBlocks,
    Sinks,
    Strided,
    Window,
)
from longctx.parallel import attention as sharded
from longctx.parallel import mesh, rules, sequence
from longctx.typing import Segments

BATCH, LENGTH, HEADS, GROUPS, KEYS, WIDTH, TAPS = 2, 64, 4, 2, 8, 6, 10
# Lengths of documents, negative for padding. With 8 shards of 8 tokens: documents that straddle an edge (one with
# its first three tokens on both sides), touch one, span three shards and more, shards wholly inside one document,
# padding from an edge on and across one. A row's first document continues the initial state.
ROWS = ([15, 17, 8, -3, 21], [-2, 38, 5, -5, 6, 1, 7])
MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2)]


def packed(length=LENGTH):
    rows = []
    for row in ROWS:
        ids = [np.full(abs(n) * length // LENGTH, i if n > 0 else 0) for i, n in enumerate(row, 1)]
        rows.append(np.concatenate(ids))
    return Segments.from_ids(np.stack(rows))


def recurrent(family):
    options = family.options(chunk=16)
    return lambda segments, state, *x: sequence.run(family, x, state=state, segments=segments, options=options)


def in_turn(segments, x, wx, r):
    state = slstm.State(x, 1 + x**2, jnp.tanh(x), x)
    return sequence.run(SLSTM, (wx,), (r,), state, segments=segments, options=SLSTM.options(chunk=16))


def attending(pattern, **options):
    return lambda segments, sinks, q, k, v: attend(q, k, v, pattern, segments, sinks=sinks, **options)


def by_heads(segments, q, k, v, decay, slopes):
    """Eight heads, which four or eight devices share: that is less to send than all keys round the ring."""
    return attend(q, k, v, Causal(), segments, decay=decay, bias=biases.Alibi(slopes), context_parallel="heads")


def convolving(segments, state, x, kernel):
    return sequence.run(CAUSAL_CONV, (x,), (kernel,), state, segments=segments)


# The op, and the logical axes of its arguments: the state or sinks first, which have no time.
HEAD = ("batch", "time", "heads", "head")
MANY = ("batch", "time", "eight", "head")
MATRIX = ("batch", "heads", "head", "head")
OPS = {
    "linear_scan": (recurrent(LINEAR_SCAN), [("batch", "mlp")] + [("batch", "time", "mlp")] * 2),
    "gated_linear": (recurrent(GATED_LINEAR), [MATRIX, HEAD, HEAD, HEAD, HEAD[:3]]),
    "gated_delta": (recurrent(GATED_DELTA), [MATRIX, HEAD, HEAD, HEAD, HEAD[:3], HEAD[:3]]),
    "slstm": (in_turn, [MATRIX[:3], (*HEAD[:2], "gates", *HEAD[2:]), ("gates", *MATRIX[1:])]),
    "convolution": (convolving, [("batch", "before", "mlp"), ("batch", "time", "mlp"), ("taps", "mlp")]),
    "window": (attending(Causal() & Window(11)), [("heads",)] + [HEAD] * 3),
    "global": (attending(Causal() & (Window(11) | Sinks(3)), implementation="blockwise"), [("heads",)] + [HEAD] * 3),
    "dilated": (attending(Causal() & Dilated(24, 3, 1)), [("heads",)] + [HEAD] * 3),
    "dilated by 1": (attending(Causal() & Dilated(24, 1)), [("heads",)] + [HEAD] * 3),
    "dilated, sinks": (attending(Causal() & (Dilated(24, 3, 1) | Sinks(3))), [("heads",)] + [HEAD] * 3),
    "chosen": (attending(Causal() & (Window(5) | Global((2, 9)))), [("heads",)] + [HEAD] * 3),
    "sum": (attending(Causal() & (Dilated(8, 1) + Dilated(24, 3, 1))), [("heads",)] + [HEAD] * 3),
    "heads": (attending(Heads((Causal() & Window(5), Causal() & Chunked(12)))), [("heads",)] + [HEAD] * 3),
    "strided": (attending(Causal() & (Window(8) | Strided(8))), [("heads",)] + [HEAD] * 3),
    "strided, round": (attending(Causal() & Strided(6)), [("heads",)] + [HEAD] * 3),
    "fixed": (attending(Causal() & (Chunked(12) | Fixed(12, 2))), [("heads",)] + [HEAD] * 3),
    "random": (attending(Causal() & (Window(4) | RandomBlocks(4, 2))), [("heads",)] + [HEAD] * 3),
    "full": (attending(Causal(), soft_cap=5.0, context_parallel="ring"), [("heads",)] + [HEAD] * 3),
    "full, by heads": (by_heads, [MANY] * 3 + [MANY[:3], ("eight",)]),
}
UNBOUNDED = ("strided", "strided, round", "fixed", "random", "full", "full, by heads")
BOUNDED = [name for name in OPS if name not in UNBOUNDED]


def arguments(name, length=LENGTH):
    sizes = {"batch": BATCH, "time": length, "heads": HEADS, "head": KEYS, "mlp": WIDTH, "taps": TAPS, "gates": 4}
    sizes |= {"before": TAPS - 1, "eight": 8}
    axes = OPS[name][1]
    keys = jax.random.split(jax.random.key(0), len(axes))
    arrays = [jax.random.normal(key, [sizes[axis] for axis in each]) for key, each in zip(keys, axes, strict=True)]
    if axes[0] == ("heads",):  # grouped keys and values
        arrays[2:] = [x[:, :, :GROUPS] for x in arrays[2:]]
    elif name not in ("slstm", "convolution"):
        arrays[-1] = -jnp.abs(arrays[-1])  # log decays
    if name == "gated_delta":
        arrays[2] /= jnp.linalg.norm(arrays[2], axis=-1, keepdims=True)
        arrays[4] = jax.nn.sigmoid(arrays[4])
    return arrays


def outputs_and_gradients(name, segments):
    def loss(arrays):
        out = OPS[name][0](segments, *arrays)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out)), out

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def whole(name):
    return outputs_and_gradients(name, packed())(arguments(name))


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", OPS)
def test_shards_equal_whole(name, sizes):
    """Outputs, final state, and gradients of all inputs, the initial state and sinks included; no array gathered.

    Fails if the initial state enters every shard, or a halo's global tokens count twice, or the ring's gradients stay
    one hop from home. Float32, 1e-5 of the largest value.
    """
    made = mesh.make(config.Mesh(*sizes))
    arrays, axes = arguments(name), OPS[name][1]
    known = [[axis if axis in rules.RULES else None for axis in each] for each in axes]
    with jax.set_mesh(made):
        placed = [
            jax.device_put(x, NamedSharding(made, rules.spec(each, x.shape, made.shape)))
            for x, each in zip(arrays, known, strict=True)
        ]
        compiled = outputs_and_gradients(name, packed()).lower(placed).compile()
        got = compiled(placed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max())), got, whole(name)
    )
    if name != "fixed":  # which gathers the tokens that all see
        assert not re.findall(r"\b(all-gather|all-to-all)", compiled.as_text())


def bytes_sent(name, length):
    """By a device, in the forward and backward pass, of what the op itself sends."""
    with jax.set_mesh(mesh.make(config.Mesh(1, 8, 1))):
        text = outputs_and_gradients(name, packed(length)).lower(arguments(name, length)).as_text()
    types = re.findall(r"collective_permute.*-> tensor<([\dx]*)x?[a-z]+(\d+)>", text)
    return sum(math.prod(int(n) for n in shape.split("x") if n) * int(bits) // 8 for shape, bits in types)


@pytest.mark.parametrize("name", BOUNDED)
def test_bytes_do_not_grow(name):
    """A bounded op sends as much for 256 tokens as for 512. Fails if a whole shard is sent in place of a halo."""
    assert bytes_sent(name, 4 * LENGTH) == bytes_sent(name, 8 * LENGTH) > 0


@pytest.mark.parametrize("ids", [None, packed().ids], ids=["one document", "packed"])
def test_scattered_blocks_that_move_are_those_that_are_seen(ids):
    """Before its own shard a device gets the blocks of places in which its queries see a key, and no others.

    Fails if a block is wanted by the wrong shard; if blocks of an earlier document are wanted.
    """
    devices, size = 4, 4
    pattern = Causal() & RandomBlocks(size, 2)
    segments = Segments.single(2, LENGTH) if ids is None else packed()
    k, v = arguments("random")[2:]

    def run(k, v, segments):
        return sharded._keys_scattered(k, v, None, segments, pattern, "context")[3]

    with jax.set_mesh(mesh.make(config.Mesh(1, devices, 1))):
        spec = jax.P(None, "context")
        island = jax.shard_map(run, in_specs=spec, out_specs=spec, axis_names={"context"}, check_vma=False)
        held = jax.device_get(jax.jit(island)(k, v, segments))
    ids, positions = np.asarray(segments.ids), np.asarray(segments.positions)
    mask = pattern.mask(positions[:, :, None], positions[:, None, :])
    mask &= (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0)
    for row, device in np.ndindex(2, devices):
        shard = slice(device * LENGTH // devices, (device + 1) * LENGTH // devices)
        blocks = mask[row, shard, : shard.start].any(0).reshape(-1, size).any(1)
        given = held.ids[row].reshape(devices, -1)[device, : shard.start].reshape(-1, size) > 0
        assert not (blocks & ~given.any(1)).any()
        # Blocks of a document straddle those of places; a block that only touches the range of positions may come too.
        assert given.any(1).sum() <= blocks.sum() + (0 if ids is None else 2)


def test_ring_keeps_no_other_keys():
    """What the ring keeps for its backward pass does not grow with the devices. Fails under plain differentiation."""

    def kept(devices):
        with jax.set_mesh(mesh.make(config.Mesh(1, devices, 1))):
            run = functools.partial(OPS["full"][0], packed())
            pull = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], *arguments("full"))
        return sum(math.prod(x.shape) for x in jax.tree.leaves(pull) if x.ndim > 2)

    assert kept(8) == kept(2) > 0


def test_empty_state_is_zeros():
    x, log_decay = arguments("linear_scan")[1:]
    with jax.set_mesh(mesh.make(config.Mesh(1, 4, 1))):
        y, state = jax.jit(lambda *x: sequence.run(LINEAR_SCAN, x, segments=None))(x, log_decay)
    expected = LINEAR_SCAN(x, log_decay, form="recurrent")
    np.testing.assert_allclose(y, expected[0], atol=1e-5)
    np.testing.assert_allclose(state, expected[1], atol=1e-5)


@pytest.mark.parametrize("length", [1, 3])
def test_short_spans_are_not_split(length):
    """A decoding step, or fewer tokens than devices: the plain op."""
    state, *inputs = (x[:, :length] if i else x for i, x in enumerate(arguments("linear_scan")))
    with jax.set_mesh(mesh.make(config.Mesh(1, 4, 1))):
        y, after = sequence.run(LINEAR_SCAN, inputs, state=state, segments=None)
        q, k, v = (x[:, :length] for x in arguments("window")[1:])
        assert attend(q, k, v, Causal(), None).shape == (BATCH, length, HEADS, KEYS)
    expected = LINEAR_SCAN(*inputs, state=state, form="recurrent")
    np.testing.assert_allclose(y, expected[0], atol=1e-6)
    np.testing.assert_allclose(after, expected[1], atol=1e-6)


def test_refusals():
    q, k, v = arguments("window")[1:]
    with jax.set_mesh(mesh.make(config.Mesh(1, 8, 1))):
        with pytest.raises(ValueError, match=r"a span of 63 tokens .* context=8 devices; pad it .* such as 64"):
            attend(q[:, 1:], k[:, 1:], v[:, 1:], Causal(), None)
        with pytest.raises(ValueError, match=r"Window\(size=4\) lets a query see keys after it"):
            attend(q, k, v, Window(4), None)
        with pytest.raises(NotImplementedError, match="implementation 'cudnn' gives no partial results"):
            attend(q, k, v, Causal(), None, implementation="cudnn")


def test_groups_that_straddle_shards_are_refused():
    with (
        jax.set_mesh(mesh.make(config.Mesh(1, 4, 1))),
        pytest.raises(ValueError, match="cannot be cut into groups of 3"),
    ):
        sequence.coarsen(jnp.zeros((1, LENGTH, 2)), Segments.single(1, LENGTH), 3)


def test_islands_leave_no_axis_of_one_device_to_the_compiler():
    """Kernels refuse one. Seen to fail: the axes of the island alone."""
    found = []

    def shard(x):
        found.append(set(jax.sharding.get_abstract_mesh().manual_axes))
        return x

    with jax.set_mesh(mesh.make(config.Mesh(data=1, context=8))):
        sequence._island(shard, jax.P(None, "context"), jax.P(None, "context"))(jnp.zeros((1, 8)))
    with jax.set_mesh(mesh.make(config.Mesh(data=2, context=4))):
        sequence._island(shard, jax.P(None, "context"), jax.P(None, "context"))(jnp.zeros((2, 8)))
    assert found == [{"data", "context", "model"}, {"context", "model"}]
