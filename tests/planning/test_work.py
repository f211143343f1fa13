"""Operations of traced programs, known by hand."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from longctx import config
from longctx.layers import MIXERS, MLPS
from longctx.ops.attention import attention_partial
from longctx.ops.patterns import Causal, Window
from longctx.parallel import mesh as meshes
from longctx.planning import compiled
from longctx.planning.chips import GPUS, OF_TPU
from longctx.planning.work import Work, count
from longctx.training.step import Program

X = jax.ShapeDtypeStruct((32, 32), jnp.bfloat16)
ONE = 2 * 32**3


def found(f, *arrays):
    """The work outside of loops that end at run time, and in them."""
    return count(jax.jit(f).trace(*arrays).jaxpr.jaxpr)


def test_loops_branches_and_recomputation():
    """Seen to fail: a scan's body counted once; both branches counted."""

    def looped(x):
        def step(y, _):
            return jax.lax.cond(y[0, 0] > 0, lambda y: y @ x @ x, lambda y: y @ x, y), None

        return jax.lax.scan(step, x, length=5)[0]

    def layer(x):
        return jnp.sum(jnp.tanh(x @ x))

    assert found(looped, X)[0] == Work(10 * ONE, 10 * ONE)
    assert found(jax.grad(layer), X)[0].operations == 3 * ONE
    assert found(jax.grad(jax.checkpoint(layer)), X)[0].operations == 4 * ONE


def test_float32_takes_several_passes():
    """Seen to fail: every product one pass."""

    def product(x, precision):
        return jnp.matmul(x, x, precision=precision)

    full = jax.ShapeDtypeStruct(X.shape, jnp.float32)
    for array, precision, passes in ((full, "highest", 6), (full, "high", 3), (full, None, 1), (X, "highest", 1)):
        assert found(lambda x, p=precision: product(x, p), array)[0] == Work(ONE, passes * ONE), (array, precision)


def test_a_gpu_takes_longer_in_float32():
    """By its published rates: no bfloat16 units at the highest precision, half their rate else."""
    full = jax.ShapeDtypeStruct(X.shape, jnp.float32)
    for precision, passes in (("highest", 16), ("high", 2), (None, 2)):
        traced = jax.jit(lambda x, p=precision: jnp.matmul(x, x, precision=p)).trace(full)
        assert count(traced.jaxpr.jaxpr, GPUS["a100"].passes)[0] == Work(ONE, passes * ONE)


def test_every_device_of_an_island_counts():
    """Seen to fail: a shard_map's body counted once."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        rows = PartitionSpec("b")
        island = jax.shard_map(lambda x: x @ x.T, in_specs=rows, out_specs=rows, axis_names={"b"}, check_vma=False)
        assert found(island, X)[0].operations == 4 * 2 * 8 * 32 * 8


def test_attention_tells_its_steps():
    """Blocks of 16 in a row of 64: 10 pairs of them are causal, 7 within a window of 16; forward two products each.

    Fails if the loop over pairs says nothing, or says so twice.
    """
    tokens = jax.ShapeDtypeStruct((1, 64, 1, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    for pattern, pairs in ((Causal(), 10), (Causal() & Window(16), 7)):
        f = lambda q, ids, p=pattern: attention_partial(q, q, q, p, ids, block=16).output  # noqa: E731
        fixed, looped = found(f, tokens, ids)
        assert (fixed.operations, looped.operations) == (0, pairs * 2 * 2 * 16 * 16 * 8), pattern


def test_the_model_is_counted_once_and_the_program_as_often_as_it_runs():
    """Mamba-2's keys are the same for all heads: devices that split heads make them twice, and the model once.

    Guards against the model counted as on two devices that split heads, and "with what is computed again" a tenth less.
    """
    tree = {
        "model": {
            "width": 16,
            "pattern": ("only",),
            "blocks": {
                "only": {
                    "mixer": {"kind": "mamba2", "heads": 2, "key_width": 8, "value_width": 8},
                    "mlp": {"kind": "relu2", "hidden": 16},
                }
            },
        },
        "training": {"stages": ((1, 2, 64),)},
        "data": {"tokenizer": "bytes", "needles": {"rows": 0.0}},
    }
    found = {}
    for sizes in ((1, 1, 1), (1, 1, 2)):
        experiment = config.parse(tree | {"mesh": dict(zip(meshes.AXES, sizes, strict=True))}, MIXERS, MLPS)
        mesh = meshes.make(experiment.mesh, jax.devices()[: math.prod(sizes)])
        program = Program.make(experiment, 260, mesh)
        model, done, _ = compiled.operations(program, experiment.training.stages[0], OF_TPU)
        found[sizes] = model.operations, done.operations
    (model, alone), (same, split) = found.values()
    assert model == same == alone
    assert split > model


def test_the_share_of_a_loop_that_a_device_makes():
    """Of 16 blocks of a window of one block, 31 pairs; each of 8 devices may meet all pairs of 2 blocks and 3.

    Seen to fail: the bound taken for one device's rounds.
    """
    mixer = {"kind": "attention", "heads": 1, "kv_heads": 1, "head_width": 8, "pattern": "Window(512)"}
    tree = {
        "model": {"width": 8, "pattern": ("only",), "blocks": {"only": {"mixer": mixer, "mlp": {"kind": "relu2"}}}},
        "training": {"stages": ((1, 1, 8192),)},
        "data": {"tokenizer": "bytes", "needles": {"rows": 0.0}},
        "mesh": {"data": 1, "context": 8},
    }
    experiment = config.parse(tree, MIXERS, MLPS)
    program = Program.make(experiment, 260, meshes.make(experiment.mesh))
    *_, share = compiled.operations(program, experiment.training.stages[0], OF_TPU)
    assert share == pytest.approx(31 / (8 * 2 * 3))
