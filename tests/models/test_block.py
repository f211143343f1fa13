"""Residual forms, norms and MLPs against their formulas in NumPy; attention's options against the plain softmax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import architecture
from longctx.errors import UsageError
from longctx.layers import MIXERS, MLPS
from longctx.layers.positions import NoPositions
from longctx.models.block import Block
from longctx.typing import Segments

D, T = 8, 6
MIXER = MIXERS["attention"].Config(heads=2, kv_heads=1, head_width=4)
BESIDE = MIXERS["attention"].Config(heads=1, kv_heads=1, head_width=4)
ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + ERF(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
LAYERS = {
    "swiglu": (MLPS["swiglu"].Config(hidden=16, bias=True), "silu"),
    "geglu": (MLPS["geglu"].Config(hidden=16, bias=True, tanh=True), "gelu_tanh"),
    "gelu": (MLPS["gelu"].Config(hidden=16, bias=True), "gelu"),
    "gelu_tanh": (MLPS["gelu"].Config(hidden=16, tanh=True), "gelu_tanh"),
    "relu2": (MLPS["relu2"].Config(hidden=16, bias=True), "relu2"),
}
FORMS = ("swiglu", "pre", "rms"), ("geglu", "post", "offset"), ("gelu", "sandwich", "layer")
FORMS += ("gelu_tanh", "parallel", "bare"), ("relu2", "parallel_shared", "layer")
NORMS = {
    "rms": architecture.Norm(epsilon=0.1),
    "offset": architecture.Norm(offset=1.0, bias=True),
    "layer": architecture.Norm("layer", epsilon=1e-5, bias=True),
    "bare": architecture.Norm("layer", scale=False),
}


def drawn(module):
    """The module with every parameter drawn at random, as none of them is at the start."""
    state = nnx.state(module, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    new = [jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    nnx.update(module, jax.tree.unflatten(tree, new))
    return module


def normed(norm, x):
    if norm is None:
        return x
    options = norm.options
    x = x - x.mean(-1, keepdims=True) if options.kind == "layer" else x
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + options.epsilon)
    y = y * (np.asarray(norm.scale[...]) + options.offset) if options.scale else y
    return y + np.asarray(norm.shift[...]) if options.bias else y


def linear(layer, x):
    y = x @ np.asarray(layer.weight[...], np.float64)
    return y if layer.bias is None else y + np.asarray(layer.bias[...])


def mlp(layer, activation, x):
    up = linear(layer.up, x)
    first = linear(layer.gate, x) if hasattr(layer, "gate") else up
    return linear(layer.down, ACTIVATIONS[activation](first) * (up if hasattr(layer, "gate") else 1))


def test_residual_forms_norms_and_mlps():
    """Each form with another norm and MLP, to 2e-5 of the largest value. Seen to fail: a norm of the sum for one of the
    branch, an offset left out, exact GELU for its approximation, the multiplier on one branch alone.
    """
    blocks = []
    for name, form, norm in FORMS:
        options = architecture.Block(MIXER, LAYERS[name][0], BESIDE if form == "pre" else None, NORMS[norm], form, 0.5)
        blocks.append(drawn(Block(D, options, nnx.Rngs(params=0))))
    x = jax.random.normal(jax.random.key(1), (1, T, D))
    segments = Segments.single(1, T)

    @jax.jit
    def run(blocks, x):
        return [block(x, segments)[0] for block in blocks]

    mixed = jax.jit(lambda mixer, x: mixer(x, segments)[0])
    for (name, form, _), block, found in zip(FORMS, blocks, run(blocks, x), strict=True):

        def mixer(x, block=block):
            x = jnp.asarray(x, jnp.float32)
            y = np.asarray(mixed(block.mixer, x), np.float64)
            return y if block.beside is None else y + np.asarray(mixed(block.beside, x))

        def inner(x, block=block, name=name):
            return mlp(block.mlp, LAYERS[name][1], x)

        y = np.asarray(x, np.float64)
        if form.startswith("parallel"):
            read = normed(block.mixer_norm, y)
            y = y + 0.5 * (mixer(read) + inner(normed(block.mlp_norm, y) if form == "parallel" else read))
        else:
            y = y + 0.5 * normed(block.mixer_post_norm, mixer(normed(block.mixer_norm, y)))
            y = y + 0.5 * normed(block.mlp_post_norm, inner(normed(block.mlp_norm, y)))
        norms = [name for name in vars(block) if name.endswith("norm") and getattr(block, name) is not None]
        assert len(norms) == {"sandwich": 4, "parallel_shared": 1}.get(form, 2)
        np.testing.assert_allclose(found, y, rtol=0, atol=2e-5 * np.abs(y).max(), err_msg=form)


@pytest.mark.parametrize("over", ["head", "each", "all", None])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_attention_of_published_models(over, gate):
    """Biases, norms of queries and keys, a scale, a cap, wider values and gates. Seen to fail: the scale left out; the
    gates of other heads; keys without their norm.
    """
    norm = None if over is None else {"over": over, "offset": 1.0}
    options = MIXERS["attention"].Config(
        heads=4, kv_heads=2, head_width=4, value_width=6, bias="all", gate=gate, qk_norm=norm, scale=0.7, soft_cap=2.0,
        positions=NoPositions(),
    )  # fmt: skip
    layer = drawn(MIXERS["attention"](D, options, nnx.Rngs(params=0)))
    assert [each is None for each in (layer.query_norm, layer.key_norm)] == [over is None] * 2
    x = np.asarray(jax.random.normal(jax.random.key(1), (T, D)), np.float64)
    q, k, v = (linear(each, x) for each in (layer.query, layer.key, layer.value))
    if over == "all":
        q, k = normed(layer.query_norm, q), normed(layer.key_norm, k)
    q, k, v = q.reshape(T, 4, 4), k.reshape(T, 2, 4), v.reshape(T, 2, 6)
    if over in ("head", "each"):
        q, k = normed(layer.query_norm, q), normed(layer.key_norm, k)
    logits = 2 * np.tanh(0.7 * np.einsum("thk,shk->hts", q, k.repeat(2, 1)) / 2)
    logits = np.where(np.tri(T, dtype=bool), logits, -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.einsum("hts,shv->thv", weights, v.repeat(2, 1))
    y = y / (1 + np.exp(-linear(layer.gate, x).reshape(T, 4, -1)))
    found = jax.jit(lambda layer: layer(jnp.asarray(x, jnp.float32)[None])[0])(layer)
    expected = linear(layer.out, y.reshape(T, -1))
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": None, "mlp": None}, "both None"),
        ({"mixer": None, "beside": MIXER}, "without a mixer"),
        ({"mlp": None, "residual": "parallel"}, "give both, or choose another"),
        ({"residual": "after"}, "residual is 'after'; choose one of pre, post"),
        ({"norm": {"kind": "batch"}}, "kind is 'batch'; choose one of layer, rms"),
    ],
)
def test_blocks_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        architecture.Block(**{"mixer": MIXER, "mlp": LAYERS["gelu"][0]} | options)
