"""What the backward pass recomputes, by name: the same numbers, less memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import config
from longctx.errors import UsageError
from longctx.layers import MIXERS, MLPS
from longctx.models import LanguageModel
from longctx.parallel import mesh as meshes
from longctx.training.step import loss_sums, placed

POLICIES = ("none", "dots", "full", "offload")
BATCH, LENGTH, WIDTH, VOCAB = 2, 512, 16, 32
BLOCK = {
    "mixer": {"kind": "linear_attention", "heads": 2, "key_width": 8, "value_width": 8},
    "mlp": {"kind": "swiglu", "hidden": 256},
}


def parsed(remat, blocks, repeats):
    names = tuple(f"block{i}" for i in range(blocks))
    model = {"width": WIDTH, "pattern": names, "blocks": dict.fromkeys(names, BLOCK), "repeats": repeats}
    tree = {"model": model | {"remat": remat}, "training": {"stages": ((1, BATCH, 64),)}}
    return config.parse(tree, MIXERS, MLPS).model


def batch():
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, VOCAB)
    index = jnp.arange(LENGTH)
    ids = jnp.broadcast_to(1 + index // 200, (BATCH, LENGTH)).astype(jnp.int32)  # the last edge is within a document
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ids}
    arrays |= {"positions": jnp.broadcast_to(index % 200, ids.shape), "weights": jnp.ones(ids.shape)}
    return arrays | {"answers": jnp.zeros(ids.shape, bool)}


def program(remat, blocks, repeats):
    """`(the loss and its gradients as a function of parameters and batch, the parameters)`."""
    make = functools.partial(LanguageModel, parsed(remat, blocks, repeats), VOCAB)
    graphdef, params = nnx.split(make(nnx.Rngs(params=0)), nnx.Param)

    def loss(params, batch):
        return loss_sums(nnx.merge(graphdef, params), batch, answer_weight=1.0).loss / BATCH / LENGTH

    return jax.value_and_grad(loss), params


@functools.cache
def run(remat, sizes=(2, 2, 1), blocks=2, repeats=2, **options):
    """`(loss, gradients, temporary bytes)`, the parameters split over the mesh and given away."""
    mesh = meshes.make(config.Mesh(*sizes))
    with jax.set_mesh(mesh):
        step, variables = program(remat, blocks, repeats)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, placed(variables, mesh))
        params = jax.device_put(nnx.as_pure(variables), shardings)
        rows = jax.sharding.NamedSharding(mesh, jax.P("data", "context"))
        arrays = jax.device_put(batch(), rows)
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(None, shardings)).lower(params, arrays)
        compiled = lowered.compile(compiler_options=options)
        loss, gradients = jax.device_get(compiled(params, arrays))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    return loss, gradients, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", POLICIES[1:])
def test_the_same_loss_and_gradients(remat):
    """Of every parameter, on a mesh of data 2 and context 2, with donation. Float32, 1e-5 of the largest entry."""
    (loss, gradients, _), (expected, exact, _) = run(remat), run("none")
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), gradients, exact)


def test_memory_is_ordered():
    """What `config.Model.remat` promises, of the compiled step.

    A CPU has one memory, in which offloading moves nothing: there "offload" takes what "full" takes.
    """
    none, dots, full, offload = (run(remat)[2] for remat in POLICIES)
    assert none > 1.2 * dots
    assert dots > 1.2 * full
    assert offload <= 1.01 * full


def test_blocks_are_recomputed_one_at_a_time():
    """Three blocks in the pattern, repeated twice, take the memory of one block repeated six times.

    On a CPU the compiler drops the barriers between what is computed first and what is computed again, unless told.
    Seen to fail: with the barriers dropped.
    """
    kept = {"xla_disable_hlo_passes": "optimization-barrier-expander,cse_barrier_expander"}
    repeated, in_pattern = (run("full", (1, 1, 1), *shape, **kept)[2] for shape in ((1, 6), (3, 2)))
    assert in_pattern <= 1.2 * repeated


def test_block_inputs_go_to_the_host():
    """All inputs of blocks that the backward pass finds are in host memory, and none on the device.

    Seen to fail: the output of a block named in place of its input.
    """

    def kept(remat):
        step, params = program(remat, blocks=2, repeats=3)
        text = str(jax.make_jaxpr(step)(nnx.as_pure(params), batch()))
        return set(re.findall(rf"f32(<host>)?\[3,{BATCH},{LENGTH},{WIDTH}\]", text))

    assert kept("offload") == {"<host>"}
    assert kept("full") == {""}


def test_an_unknown_policy_is_refused():
    with pytest.raises(UsageError, match=r"model\.remat is 'offlaod'; choose one of none, dots, full, offload"):
        parsed("offlaod", 1, 1)
