"""MLPs that work on a few tokens at a time: the same numbers, less memory, nothing more on the wire."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import config
from longctx.errors import UsageError
from longctx.layers import MLPS
from longctx.parallel import mesh as meshes
from longctx.training.step import placed
from longctx.typing import Segments

BATCH, LENGTH, WIDTH, HIDDEN = 2, 1024, 16, 256
KINDS = ("relu2", "swiglu")


@functools.cache
def compiled(kind, chunk, sizes=(1, 1, 1), length=LENGTH, dtype="float32"):
    """`(the compiled function, what it gives)`: outputs, and gradients of parameters and inputs."""
    cls = MLPS[kind]
    graphdef, variables = nnx.split(cls(WIDTH, cls.Config(hidden=HIDDEN, chunk=chunk), nnx.Rngs(params=0)), nnx.Param)
    x = jax.random.normal(jax.random.key(1), (BATCH, length, WIDTH), dtype)
    weights = jax.random.normal(jax.random.key(2), x.shape)

    def loss(params, x):
        y, state = nnx.merge(graphdef, params)(x, Segments.single(BATCH, length))
        assert state is None
        return jnp.sum(weights * y), y

    mesh = meshes.make(config.Mesh(*sizes))
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, placed(variables, mesh))
        rows = jax.sharding.NamedSharding(mesh, jax.P("data", "context"))
        args = jax.device_put(nnx.as_pure(variables), shardings), jax.device_put(x, rows)
        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), out_shardings=((shardings, rows), rows))
        program = step.lower(*args).compile()
        return program, jax.device_get(program(*args))


def close(found, expected, tolerance):
    def check(a, b):
        assert a.dtype == b.dtype
        a, b = np.float32(a), np.float32(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    jax.tree.map(check, found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "chunk"), [(1024, 64), (77, 16), (5, 16), (1, 1)])
def test_equal_to_all_at_once(kind, length, chunk):
    """Lengths that the chunk divides, does not divide, and exceeds; of one token. 1e-5 of the largest entry.

    Seen to fail: chunks joined in the wrong order of axes.
    """
    close(compiled(kind, chunk, length=length)[1], compiled(kind, 0, length=length)[1], 1e-5)


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 2)])
def test_on_a_mesh(sizes):
    """As on one device; each shard is cut on its own. 1e-5 of the largest entry."""
    close(compiled("swiglu", 64, sizes)[1], compiled("swiglu", 0)[1], 1e-5)


def test_bfloat16():
    """bfloat16 through a mesh: parameters' gradients are summed in float32. 2e-2 of the largest entry."""
    close(compiled("swiglu", 64, (1, 4, 1), dtype="bfloat16")[1], compiled("swiglu", 0, dtype="bfloat16")[1], 2e-2)


def test_memory():
    """The hidden vectors of all tokens are never held, nor are those of the backward pass.

    Seen to fail: chunks whose hidden vectors are kept for the backward pass.
    """
    whole, chunked = (compiled("swiglu", chunk)[0].memory_analysis().temp_size_in_bytes for chunk in (0, 64))
    held = 4 * BATCH * LENGTH * HIDDEN  # one array of hidden vectors
    assert whole > 2 * held
    assert chunked < held


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def test_collectives_are_the_parameters():
    """On 4 devices that share the sequence: each matrix gathered once, its gradient summed once, nothing in a loop.

    Seen to fail: without the island, where each chunk's gradient of the parameters is summed over devices.
    """
    text = compiled("swiglu", 64, (1, 4, 1))[0].as_text()
    sizes = collections.Counter()
    for types, kind in COLLECTIVE.findall(text):
        sizes[kind] += sum(math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", types))
    assert sizes == {"all-gather": 3 * WIDTH * HIDDEN, "all-reduce": 3 * WIDTH * HIDDEN}
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    computations = [part for part in re.split(r"\n(?=\S)", text) if COLLECTIVE.search(part)]
    assert not bodies & {re.match(r"(?:ENTRY )?%?([\w.-]+)", part)[1] for part in computations}


def test_a_negative_chunk_is_refused():
    with pytest.raises(UsageError, match="chunk is -1"):
        MLPS["swiglu"].Config(chunk=-1)
