"""The law of cost."""

import math
import re

import jax
import jax.numpy as jnp
from flax import nnx
from laws.cases import GATHERED, GROWING_STATE, UNBOUNDED, D, layers, make, ops_once
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


def compiled(name, length, context):
    graph, params = make(name)
    with jax.set_mesh(meshes.make(config.Mesh(1, context, 1))):
        place = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(None, "context"))

        def loss(params, x, segments):
            (y, _), losses = with_losses(nnx.merge(graph, params), x, segments)
            return losses + jnp.sum(jnp.square(y))

        x = jax.ShapeDtypeStruct((1, length, D), jnp.float32, sharding=place)
        segments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
            jax.eval_shape(lambda: Segments.single(1, length)),
        )
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x, segments).compile()


@ops_once
def test_cost(name):
    """Read off the compiled programs of forward and backward, at T and 4T.

    Temporary memory grows linearly. On 4 devices no layer gathers the sequence, and one whose state is bounded
    sends the same bytes whatever T.

    Seen to fail: attention by dense masks (memory grew 16 times); the island removed, so that the compiler
    gathered the sequence around the recurrence.
    """
    short, long = 1024, 4096
    memory = [compiled(name, length, 1).memory_analysis().temp_size_in_bytes for length in (short, long)]
    assert memory[1] <= 4.6 * memory[0], f"temporary bytes at T={short}, {long}: {memory}"

    sent = [collectives(compiled(name, length, 4).as_text()) for length in (short, long)]
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
    layer = nnx.merge(*make(name))
    states = [jax.eval_shape(lambda room=room: layer.init_state(1, room, jnp.float32)) for room in (1024, 4096)]
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) for state in states]
    assert (sizes[0] == sizes[1]) == (name not in GROWING_STATE), f"state bytes for 1,024 and 4,096 tokens: {sizes}"
