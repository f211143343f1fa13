"""Devices along `context` share the caches that grow with the document: the same tokens, and no device has it all."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import config
from longctx.inference import Prefill, Sampling, generate
from longctx.inference.prefill import advance
from longctx.layers import MIXERS, MLPS
from longctx.models import LanguageModel
from longctx.parallel import mesh as meshes

TOKENS = np.random.default_rng(1).integers(4, 60, (2, 21)).astype(np.int32)
CAPACITY, COUNT = 2048, 8
ATTENTION = {"kind": "attention", "heads": 2, "kv_heads": 1, "head_width": 8}
MIXERS_THAT_SHARE = {
    "rope": ATTENTION,
    "alibi, sinks": ATTENTION | {"positions": {"kind": "alibi"}, "sinks": True},
    "self_extend": ATTENTION | {"positions": {"kind": "self_extend", "group": 2, "window": 8}, "soft_cap": 20.0},
    "forgetting": {"kind": "forgetting", "heads": 2, "kv_heads": 1, "head_width": 8},
}


def model_of(*mixers):
    blocks = {str(i): {"mixer": mixer, "mlp": {"kind": "swiglu", "hidden": 16}} for i, mixer in enumerate(mixers)}
    tree = {"model": {"width": 16, "pattern": tuple(blocks), "blocks": blocks}, "training": {"stages": ((1, 1, 64),)}}
    return LanguageModel(config.parse(tree, MIXERS, MLPS).model, 60, nnx.Rngs(params=0))


def stepped(model):
    """The logits of each of the tokens that follow, and the state after them."""
    logits, state = Prefill(model)(TOKENS, CAPACITY, 16)
    found = [logits]
    graphdef, params = nnx.split(model)

    @jax.jit
    def read(params, tokens, number, state):
        rows = jnp.ones(len(tokens), jnp.int32)
        return advance(nnx.merge(graphdef, params), tokens, number * rows, rows, state)

    for number in range(TOKENS.shape[1], TOKENS.shape[1] + COUNT):
        token = np.argmax(np.asarray(found[-1]), axis=-1).astype(np.int32)
        logits, state = read(params, token[:, None], np.int32(number), state)
        found.append(logits)
    program = read.lower(params, token[:, None], np.int32(number), state).compile()
    return np.stack([np.asarray(x) for x in found]), state, program


@pytest.mark.parametrize(
    ("mixer", "sizes"), [*((mixer, (1, 4, 1)) for mixer in MIXERS_THAT_SHARE), ("rope", (2, 2, 2))]
)
def test_decoding(mixer, sizes):
    """Logits as on one device (1e-5 of them, which are near 1); each device holds its share of the slots.

    In the compiled step no message is as large as a device's share of the keys. Seen to fail without the reductions
    over the devices, and for self_extend with the plain op in place of the tree: it gathers all keys.
    """
    model = model_of(MIXERS_THAT_SHARE[mixer])
    expected, whole, _ = stepped(model)
    with jax.set_mesh(meshes.make(config.Mesh(*sizes))):
        found, state, program = stepped(model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        if one.dtype == jnp.int32:  # the tokens kept
            np.testing.assert_array_equal(one, other)
    keys = [x for x in jax.tree.leaves(state) if x.ndim == 4 and CAPACITY in x.shape]
    assert len(keys) == 2
    for x in keys:
        slots = x.shape.index(CAPACITY)
        assert x.sharding.shard_shape(x.shape)[slots] == CAPACITY // sizes[1]
    messages = re.findall(
        r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|collective-permute|all-to-all)", program.as_text()
    )
    assert messages
    largest = max(np.prod([int(n) for n in shape.split(",") if n], dtype=int) for shape in messages)
    assert largest < keys[0].size // np.prod(sizes[:2])


def test_a_model_of_many_states(model):
    """A memory, a window and a cache, over four devices: the text of one device."""
    tokens = np.random.default_rng(1).integers(4, 260, (1, 21)).astype(np.int32)
    expected = generate(model, tokens, COUNT, Sampling(temperature=0))
    with jax.set_mesh(meshes.make(config.Mesh(1, 4, 1))):
        found = generate(model, tokens, COUNT, Sampling(temperature=0))
    np.testing.assert_array_equal(found, expected)
