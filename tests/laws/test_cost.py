"""The law of cost: what a layer takes in memory and sends between devices, read off its programs."""

import functools
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params
from laws.cases import GATHERED, GROWING_STATE, UNBOUNDED, D, layers, ops_once, shapes
from laws.compare import with_losses

from longctx import config
from longctx.parallel import mesh as meshes
from longctx.typing import Segments

COLLECTIVE = re.compile(
    r"= (?P<types>.*?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
)
ARRAY = re.compile(r"(?P<type>f32|bf16|s32|pred|u32|f16|s8|u8)\[(?P<shape>[\d,]*)\]")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}


def collectives(text):
    """`(kind, bytes)` of every collective in a compiled program."""

    def size(array):
        kind, shape = array
        return BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)

    found = COLLECTIVE.finditer(text)
    return [(match["kind"], sum(map(size, ARRAY.findall(match["types"])))) for match in found]


def arrays(jaxpr):
    """Bytes of all that a traced program computes, the bodies of its loops once."""
    total = 0
    for equation in jaxpr.eqns:
        total += sum(variable.aval.size * variable.aval.dtype.itemsize for variable in equation.outvars)
        total += sum(map(arrays, jaxprs_in_params(equation.params)))
    return total


def traced(name, length):
    """Forward and backward of one row, on the devices of the mesh."""
    graph, params = shapes(name)  # no arrays, which would be on the devices of one mesh

    def loss(params, x, segments):
        (y, _), losses = with_losses(nnx.merge(graph, params), x, segments)
        return losses + jnp.sum(jnp.square(y))

    def placed(tree, *axes):
        place = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(*axes))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    span = jax.eval_shape(lambda: (jnp.zeros((1, length, D)), Segments.single(1, length)))
    arguments = placed(params), *placed(span, None, "context")
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(*arguments)


@ops_once
def test_cost(name):
    """Read off the programs of forward and backward, at T and 4T: traced for one device, compiled for four.

    Arrays of the traced program, and temporary memory of the compiled one, grow linearly. No layer gathers the
    sequence, and one whose state is bounded sends the same bytes whatever T.

    Seen to fail: attention by dense masks (memory grew 16 times); the island removed, so that the compiler
    gathered the sequence around the recurrence.
    """
    short, long = 1024, 4096
    with jax.set_mesh(meshes.make(config.Mesh(1, 1, 1))):
        held = [arrays(traced(name, length).jaxpr.jaxpr) for length in (short, long)]
    assert held[1] <= 4.6 * held[0], f"bytes of arrays at T={short}, {long}: {held}"

    with jax.set_mesh(meshes.make(config.Mesh(1, 4, 1))):
        programs = [traced(name, length).lower().compile() for length in (short, long)]
    memory = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert memory[1] <= 4.6 * memory[0], f"temporary bytes at T={short}, {long}: {memory}"
    sent = [collectives(program.as_text()) for program in programs]
    limit = 4 * long * (1 + GATHERED.get(name, 0))
    gathered = [size for kind, size in sent[1] if kind in ("all-gather", "all-to-all") and size >= limit]
    assert not gathered, f"gathers of {gathered} bytes at T={long}"
    if name not in UNBOUNDED:
        assert sorted(sent[0]) == sorted(sent[1]), "bytes sent grow with the sequence"


@layers
def test_state_size(name):
    """The state of a layer not named in `GROWING_STATE` does not depend on the room for tokens.

    Seen to fail: a window's cache with room for all tokens.
    """
    graph, params = shapes(name)

    def empty(room, params):
        return nnx.merge(graph, params).init_state(1, room, jnp.float32)

    states = [jax.eval_shape(functools.partial(empty, room), params) for room in (1024, 4096)]
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) for state in states]
    assert (sizes[0] == sizes[1]) == (name not in GROWING_STATE), f"state bytes for 1,024 and 4,096 tokens: {sizes}"
