"""The laws that every registered layer keeps (see the README): one module, parametrised over the registries.

A layer that is added to `MIXERS` or `MLPS` is under all of them with its default options; `VARIANTS` adds options
that take another path through the code (those of attention in every run, the rest by `pytest -m slow`). Outputs,
gradients and what the state does to tokens that follow are compared in float32, with errors relative to the largest
entry: 1e-4 for outputs, 5e-4 for gradients.

Each law's docstring ends with how the code was broken to see it fail.
"""

import functools
import importlib
import itertools
import math
import pkgutil
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import config, ops
from longctx.layers import MIXERS, MLPS
from longctx.layers.attention import Attention
from longctx.layers.positions import T5, Alibi, CoPE, DualChunk, NoPositions, RandomPositions, SelfExtend, XPos, YaRN
from longctx.memory.cache import KVCache
from longctx.ops import attention, linear_scan
from longctx.ops.patterns import causal, parse
from longctx.parallel import family, rules, sequence
from longctx.parallel import mesh as meshes
from longctx.typing import Segments

D = 32
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 5e-4
# Every module of ops with a definition and a fast form.
MODULES = (importlib.import_module(f"{ops.__name__}.{found.name}") for found in pkgutil.iter_modules(ops.__path__))
FAMILIES = [module for module in MODULES if hasattr(module, "recurrent") and hasattr(module, "chunked")]

# Mixers that have a short convolution only if asked for one.
CONVOLVED = [
    "block_recurrent", "forgetting", "gla", "hgrn2", "indexer_topk", "infini", "lact", "lru", "lsh", "mlstm",
    "multi_resolution", "nsa", "retnet", "rwkv7", "s5",
]  # fmt: skip
VARIANTS = {
    "attention/window": ("attention", {"pattern": "Window(11)"}),
    "attention/window+sinks": ("attention", {"pattern": "Window(11) | Sinks(3)"}),
    "attention/strided": ("attention", {"pattern": "Window(8) | Strided(8)"}),
    "attention/longnet": (
        "attention",
        {"pattern": "Dilated(16, 1) + Dilated(48, 3, 1), Dilated(16, 1) + Dilated(48, 3)"},
    ),
    "attention/bigbird": ("attention", {"pattern": "Window(5) | Global((0, 9)) | RandomBlocks(8, 2)"}),
    "attention/everything": (
        "attention",
        {
            "kv_heads": 2,
            "positions": NoPositions(),
            "conv_width": 4,
            "sinks": True,
            "persistent": 3,
            "soft_cap": 5.0,
            "length_base": 16.0,
        },
    ),
    "attention/cope": ("attention", {"positions": CoPE(max_position=6)}),
    "attention/dual_chunk": ("attention", {"positions": DualChunk(trained=12, local=4)}),
    "attention/t5": ("attention", {"positions": T5(8, 20), "kv_heads": 2}),
    "positions/alibi": ("attention", {"positions": Alibi(), "pattern": "Window(11)"}),
    "positions/yarn": ("attention", {"positions": YaRN(trained=16, factor=4.0, share=0.5)}),
    "positions/random": ("attention", {"positions": RandomPositions(span=512, trained=64)}),
    "positions/self_extend": ("attention", {"positions": SelfExtend(group=3, window=7)}),
    "positions/self_extend+sinks": (
        "attention",
        {"positions": SelfExtend(group=3, window=7), "sinks": True, "pattern": "Window(20) | Sinks(2)"},
    ),
    "positions/xpos": ("attention", {"positions": XPos(scale_base=64.0)}),
    "positions/xpos+window": ("attention", {"positions": XPos(scale_base=64.0), "pattern": "Window(11)"}),
    "lsh/centroids": ("lsh", {"centroid_weight": 0.01, "rounds": 1, "buckets": 4, "rope_base": 0.0}),
    "indexer_topk/dense": (
        "indexer_topk",
        {"stage": "dense", "kv_heads": 2, "qk_norm": False, "rope_base": 0.0},
    ),
    "multi_resolution/attention": (
        "multi_resolution",
        {"factor": 2, "layers": 2, "inner": Attention.Config(pattern="Window(5)", conv_width=3)},
    ),
    "s5/bilinear": ("s5", {"discretisation": "bilinear"}),
    "infini/short": ("infini", {"segment": 7, "rope_base": 0.0}),
    "infini/delta": ("infini", {"segment": 7, "delta": True}),
    "forgetting/window": (
        "forgetting",
        {"window": 11, "kv_heads": 2, "qk_norm": False, "output_gate": False, "shift": False},
    ),
    "linear_attention/hedgehog": ("linear_attention", {"feature_map": "hedgehog", "normalise": False, "conv_width": 4}),
    "delta_net/relu": ("delta_net", {"activation": "relu"}),
    "inplace_ttt/clip+decay": ("inplace_ttt", {"minibatch": 5, "clip": 0.5, "decay": 0.9}),
    "block_recurrent/lstm": ("block_recurrent", {"gate": "lstm", "block": 5, "rope_base": 0.0}),
    "titans/gate": ("titans", {"mode": "gate", "depth": 1, "minibatch": 7}),
    "lact/orthogonal": (
        "lact",
        {"momentum": False, "orthogonal": True, "minibatch": 40, "rank": 0, "fast_width": 32, "rope_base": 0.0},
    ),
    "swiglu/chunk": ("swiglu", {"chunk": 5}),
} | {f"{name}/conv": (name, {"conv_width": 3}) for name in CONVOLVED}
LAYERS = {name: (name, {}) for name in (*MIXERS, *MLPS)} | VARIANTS
# Layers whose state holds every token, so that what crosses devices grows with the sequence.
ALL_TOKENS = {"indexer_topk", "lsh", "moba", "nsa", "path"}
UNBOUNDED = {"forgetting", "forgetting/conv"} | {
    name
    for name, (kind, options) in LAYERS.items()
    if kind in ALL_TOKENS
    or (kind == "attention" and causal(parse(options.get("pattern", "Causal()"))).union.reach is None)
}
# Layers whose state has room for every token of the document.
GROWING_STATE = UNBOUNDED
# Families whose states do not compose, so that devices take turns; and those with a form of `transition` of their own.
IN_TURN = {"block_recurrent", "infini_delta", "lact", "slstm", "titans", "titans_context", "ttt_linear"}
DEFERRED, GATHERING = {"diagonal_low_rank", "gated_delta", "gated_delta_product"}, {"inplace_ttt"}
# Layers that must know how many tokens of the document came before a span, and whose state does not say so.
COUNTING = {
    "h_transformer", "inplace_ttt", "log_linear_gated_delta", "log_linear_mamba2", "multi_resolution", "pyramid",
    "retnet", "rglru", "titans_context", "ttt_linear",
}  # fmt: skip
# Numbers per token that a layer gathers on all devices: of summaries by which queries choose blocks of keys.
GATHERED = {
    "indexer_topk": 16,
    "indexer_topk/dense": 64,
    "indexer_topk/conv": 16,
    "moba": 32,
    "nsa": 32,
    "nsa/conv": 32,
}


def slow(*values):
    """Cases left to `pytest -m slow`: each of the default ones takes another path through the code than these."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


OFTEN = [*MIXERS, *MLPS, *(name for name in VARIANTS if name.startswith("attention"))]
# Layers whose op another one of the list calls in the same way: what compiled programs say of it is asked once an op.
SAME_OP = {
    "attention/window", "delta_net", "hgrn2", "linear_attention", "log_linear_mamba2", "mamba2", "relu2", "retnet",
    "s5",
}  # fmt: skip


def cases(often):
    """All layers, those not named left to `pytest -m slow`."""
    return pytest.mark.parametrize("name", [*often, *slow(*(name for name in LAYERS if name not in often))])


layers, ops_once = cases(OFTEN), cases([name for name in OFTEN if name not in SAME_OP])


@functools.cache
def make(name):
    """The layer of a name, with every parameter moved off its initial value (zeros and ones hide faults)."""
    kind, options = LAYERS[name]
    cls = MIXERS.get(kind) or MLPS[kind]
    layer = cls(D, cls.Config(**options), nnx.Rngs(params=0))
    graph, params = nnx.split(layer)
    leaves, tree = jax.tree.flatten(nnx.as_pure(params))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return graph, jax.tree.unflatten(tree, noisy)


@functools.cache
def inputs(length, batch=2, seed=2):
    return jax.random.normal(jax.random.key(seed), (batch, length, D))


def packed(lengths_by_row, total):
    """Segments of rows given as lists of lengths; a negative length is padding."""
    ids, positions = np.zeros((2, len(lengths_by_row), total), np.int32)
    for row, lengths in enumerate(lengths_by_row):
        at = 0
        for number, length in enumerate(lengths, 1):
            if length > 0:
                ids[row, at : at + length], positions[row, at : at + length] = number, np.arange(length)
            at += abs(length)
        assert at == total
    return Segments.from_ids(ids, positions)


# On 8 shards of 8 tokens: documents that straddle an edge, touch one on either side, fill a shard exactly, span
# three shards and more with shards wholly inside them, are one token long; padding before, between and after.
ROWS = ([5, 11, 8, 30, 6, -4], [-3, 11, 8, 1, 1, -2, 30, 5, -3])
T = 64


def part(segments, start, stop):
    return jax.tree.map(lambda a: a[:, start:stop], segments)


def grow(segments, start, length):
    """Segments of `length` tokens that continue each row's last document, of which `start` tokens came before."""
    positions = jnp.broadcast_to(start[:, None] + jnp.arange(length), (start.shape[0], length))
    return Segments(jnp.ones_like(positions), positions, jnp.zeros(positions.shape, bool))


def close(actual, expected, tolerance, what):
    """Every leaf of `actual` is within `tolerance` of `expected`, relative to that leaf's largest entry."""
    chex.assert_trees_all_equal_structs(actual, expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.isfinite(a).all(), f"{what}{jax.tree_util.keystr(path)} is not finite"
        error, scale = np.abs(a - b).max(initial=0.0), np.abs(b).max(initial=1e-3)
        assert error <= tolerance * scale, f"{what}{jax.tree_util.keystr(path)}: error {error:.2e} at scale {scale:.2e}"


def with_gradients(run):
    """`run(params, x) -> y`, jitted, as a function that also returns the gradients of a fixed mixture of y."""

    def loss(params, x):
        y = run(params, x)
        return jnp.vdot(y, jnp.sin(jnp.arange(y.size, dtype=jnp.float32) * 0.7).reshape(y.shape)), y

    def both(params, x):
        (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, gradients

    return jax.jit(both)


def compare(actual, expected):
    close(actual[0], expected[0], OUTPUT_TOLERANCE, "output")
    close(actual[1], expected[1], GRADIENT_TOLERANCE, "gradient")


def test_every_registered_layer_is_here():
    assert {kind for kind, _ in LAYERS.values()} == {*MIXERS, *MLPS}


def test_devices_take_turns_only_where_states_do_not_compose():
    """A family that layers run by `sequence.recurrence` is whole; those that lack a `transition` are named above.

    Seen to fail: a `transition` left out, misspelt or None, a misspelt `deferred`.
    """
    families = {op.__name__.rpartition(".")[2]: op for op in FAMILIES if hasattr(op, "transition")}
    for op in families.values():
        family.check(op)
    assert {name for name, op in families.items() if op.transition is None} == IN_TURN
    assert {name for name, op in families.items() if hasattr(op, "deferred")} == DEFERRED
    assert {name for name, op in families.items() if hasattr(op, "gathers")} == GATHERING

    broken = types.ModuleType("broken")
    vars(broken).update({name: vars(linear_scan)[name] for name in family.NEEDED if name != "transition"})
    x = jnp.ones((1, 8, 2))
    with pytest.raises(ValueError, match="broken has no `transition`; define recurrent"):
        sequence.recurrence(broken, x, x, segments=None)
    broken = types.ModuleType("misspelt")
    vars(broken).update({name: vars(linear_scan)[name] for name in family.NEEDED} | {"defered": linear_scan.transition})
    with pytest.raises(ValueError, match="misspelt has a function `defered`; call it `deferred`"):
        sequence.recurrence(broken, x, x, segments=None)


@pytest.mark.parametrize("name", LAYERS)
def test_states_are_float32(name):
    """Under bfloat16 activations a state keeps its shapes and dtypes from span to span, and what it sums is float32.

    Only the keys and values of tokens, in a cache, have the activations' dtype. Nothing is computed. Seen to fail: a
    state that takes the dtype of what is written to it.
    """
    layer = nnx.merge(*make(name))
    before = jax.eval_shape(lambda: layer.init_state(2, T, jnp.bfloat16))
    x = jax.ShapeDtypeStruct((2, 16, D), jnp.bfloat16)
    after = jax.eval_shape(lambda x, state: layer(x, Segments.single(2, 16), state)[1], x, before)
    alone = jax.eval_shape(lambda x: layer(x, Segments.single(2, 16))[1], x)

    def carried(state):
        for path, leaf in jax.tree.leaves_with_path(state, is_leaf=lambda leaf: isinstance(leaf, KVCache)):
            where = jax.tree_util.keystr(path)
            yield from [(where + ".decay", leaf.decay)] if isinstance(leaf, KVCache) else [(where, leaf)]

    for where, leaf in [*carried(before), *carried(after), *carried(alone)]:
        held = leaf is None or jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype in (jnp.float32, jnp.complex64)
        assert held, f"{name}: the state's {where or 'only leaf'} is {leaf.dtype}, not float32"
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)


GOING_ON = [name for name in (*MIXERS, *MLPS) if name not in COUNTING]


@pytest.mark.parametrize("name", ["attention", *slow(*(name for name in GOING_ON if name != "attention"))])
def test_without_segments_the_document_goes_on(name):
    """A span without segments goes on with the state's document. That all of a document needs none, `test_pack` says.

    Seen to fail: the document begun anew; positions counted from the span's start.
    """
    layer = nnx.merge(*make(name))
    x = inputs(24)

    @jax.jit
    def run(x):
        y, state = layer(x[:, :13], Segments.single(2, 13), layer.init_state(2, 24, x.dtype))
        return layer(x)[0], jnp.concatenate([y, layer(x[:, 13:], None, state)[0]], axis=1)

    whole, parts = run(x)
    close(parts, whole, OUTPUT_TOLERANCE, "output")


@pytest.mark.parametrize("name", sorted(COUNTING))
def test_who_cannot_know_where_a_span_stands_says_so(name):
    layer = nnx.merge(*make(name))
    with pytest.raises(ValueError, match=r"how many tokens of the document came before.*offset"):
        jax.eval_shape(lambda x: layer(x, None, layer.init_state(2, 24, x.dtype)), inputs(24))


def test_every_mixer_has_a_short_convolution():
    """Those of `CONVOLVED` have it where they are asked for it."""
    assert not [name for name, cls in MIXERS.items() if not hasattr(cls.Config, "conv_width")]
    assert not [name for name in CONVOLVED if MIXERS[name].Config().conv_width]


# Lengths of documents in two rows: one token, one more than a chunk, and no multiple of any.
AWKWARD = ([1, 65, 434], [434, 1, 65])


@layers
@pytest.mark.parametrize("rows", [AWKWARD, *slow(([1], [1]), ([63], [63]), ([64], [64]), ([500], [500]))], ids=str)
def test_form(name, rows, monkeypatch):
    """Fast form = definition: token-by-token recurrences and dense softmax. Outputs, state, gradients.

    Seen to fail: gated_delta's inverse without its last power; the blockwise executor without the rescaling of its
    running sum.
    """
    graph, params = make(name)
    length = sum(rows[0])
    segments, after = packed(rows, length), grow(None, jnp.asarray([row[-1] for row in rows]), 3)

    def run(params, x):
        layer = nnx.merge(graph, params)
        y, state = layer(x[:, :length], segments, layer.init_state(2, length + 3, x.dtype))
        return jnp.concatenate([y, layer(x[:, length:], after, state)[0]], axis=1)

    fast = with_gradients(run)(params, inputs(length + 3))
    for op in FAMILIES:
        monkeypatch.setattr(op, "chunked", lambda *a, op=op, chunk=None, **k: op.recurrent(*a, **k))
    dense = functools.partial(attention.attention, implementation="dense")
    monkeypatch.setattr(attention, "attention", dense)
    compare(fast, with_gradients(lambda *a: run(*a))(params, inputs(length + 3)))


@layers
def test_split(name):
    """`f(x, s) = f(x[:k], s) ++ f(x[k:], s_k)`, again and again, on packed rows, gradients through the state included.

    Seen to fail: the causal convolution's tail taken one token early; a document start ignored when the cache is
    appended to.
    """
    graph, params = make(name)
    segments = packed(ROWS, T)

    def run(cuts, params, x):
        layer = nnx.merge(graph, params)
        state, outputs = layer.init_state(2, T, x.dtype), []
        for start, stop in itertools.pairwise(cuts):
            y, state = layer(x[:, start:stop], part(segments, start, stop), state)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)

    x = inputs(T)
    whole = with_gradients(functools.partial(run, (0, T)))(params, x)
    compare(with_gradients(functools.partial(run, (0, 1, 14, 54, T)))(params, x), whole)


SHARDINGS = {  # data x context x model
    "1x1x1": config.Mesh(1, 1, 1),
    "1x2x1": config.Mesh(1, 2, 1),
    "1x4x1": config.Mesh(1, 4, 1),
    "1x8x1": config.Mesh(1, 8, 1),
    "2x2x2": config.Mesh(2, 2, 2),
}


@layers
def test_shard(name):
    """The sequence split over 8 devices = one device, on packed rows, gradients of every parameter included.

    Seen to fail: the prefix scan composing (then, first); keys that are both global and in the halo counted twice.
    """
    _shard(name, "1x8x1")


@ops_once
@pytest.mark.parametrize("sharding", ["2x2x2", *slow("1x1x1", "1x2x1", "1x4x1")])
def test_shard_on_other_meshes(name, sharding):
    """The same where rows and heads are split as well, and on fewer devices; see `test_shard`."""
    _shard(name, sharding)


def _shard(name, sharding):
    graph, params = make(name)
    segments = packed(ROWS, T)

    def run(params, x, segments):
        layer = nnx.merge(graph, params)
        y, state = layer(x, segments)
        return y if name in GROWING_STATE else (y, state)

    x = inputs(T)
    expected = _state_and_gradients(run, params, x, segments)
    with jax.set_mesh(meshes.make(SHARDINGS[sharding])):
        spec = jax.P("data", "context")
        mesh = jax.sharding.get_mesh()
        place = functools.partial(jax.device_put, device=jax.sharding.NamedSharding(mesh, spec))
        variables = nnx.state(nnx.merge(graph, params), nnx.Param)
        params = jax.device_put(params, nnx.as_pure(rules.shardings(mesh, variables)))
        actual = _state_and_gradients(run, params, place(x), jax.tree.map(place, segments))
    compare(actual, expected)


def _state_and_gradients(run, params, x, segments):
    """Like `with_gradients`, for outputs that are a tree (y and the state)."""

    def loss(params, x):
        out = run(params, x, segments)
        leaves = [part for leaf in jax.tree.leaves(out) for part in _real_parts(leaf)]
        mixture = [jnp.sin(jnp.arange(leaf.size) * 0.7).reshape(leaf.shape) for leaf in leaves]
        return sum(jnp.vdot(leaf, weight) for leaf, weight in zip(leaves, mixture, strict=True)), out

    def both(params, x):
        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return out, gradients

    return jax.device_get(jax.jit(both)(params, x))


def _real_parts(leaf):
    """The numbers of an array that a loss may depend on."""
    if jnp.iscomplexobj(leaf):
        return [leaf.real, leaf.imag]
    return [leaf] if jnp.issubdtype(leaf.dtype, jnp.floating) else []


@layers
def test_pack(name):
    """A packed row = its documents run alone, without segments; padding gives what it may, documents do not see it.

    Seen to fail: document starts dropped from `Segments`; positions counted wrongly within the document; without
    segments, a document whose first token is not its start.
    """
    graph, params = make(name)
    layer = nnx.merge(graph, params)
    x = np.asarray(inputs(T))
    y = np.asarray(jax.jit(lambda x, segments: layer(x, segments)[0])(x, packed(ROWS, T)))
    run = jax.jit(lambda x: layer(x)[0])
    for row, lengths in enumerate(ROWS):
        at = 0
        for length in lengths:
            if length > 0:
                alone = run(x[row : row + 1, at : at + length])
                close(y[row : row + 1, at : at + length], alone, OUTPUT_TOLERANCE, f"row {row}, document at {at}: ")
            at += abs(length)


@layers
def test_step(name):
    """Token by token from a prefilled state = the full pass, across a document's start.

    Seen to fail: the cache's ring one slot short of its window.
    """
    graph, params = make(name)
    layer = nnx.merge(graph, params)
    x = inputs(T)
    segments = packed(ROWS, T)
    full = jax.jit(lambda x: layer(x, segments)[0])(x)
    prefill = 37
    step = jax.jit(lambda x, segments, state: layer(x, segments, state))
    y, state = step(x[:, :prefill], part(segments, 0, prefill), layer.init_state(2, T, x.dtype))
    outputs = [y]
    for t in range(prefill, T):
        y, state = step(x[:, t : t + 1], part(segments, t, t + 1), state)
        outputs.append(y)
    valid = segments.valid[..., None]
    close(jnp.concatenate(outputs, axis=1) * valid, full * valid, OUTPUT_TOLERANCE, "output")


@layers
def test_padding_leaves_the_state(name):
    """A span padded on the right leaves the state that the span alone leaves: the next tokens come out the same.

    Seen to fail: the decay of padding left at its gate's value; padding written to the cache.
    """
    graph, params = make(name)
    layer = nnx.merge(graph, params)
    x, length, padding = inputs(40), 21, 11
    after = grow(None, jnp.full(2, length), 8)

    @functools.partial(jax.jit, static_argnums=0)
    def run(padded, x):
        width = length + padded
        segments = Segments.from_ids(*(jnp.where(jnp.arange(width) < length, a, 0) for a in _ones(width)))
        _, state = layer(x[:, :width], segments, layer.init_state(2, 40, x.dtype))
        return layer(x[:, 32:], after, state)[0]

    close(run(padding, x), run(0, x), OUTPUT_TOLERANCE, "output")


def _ones(width):
    positions = jnp.broadcast_to(jnp.arange(width), (2, width))
    return jnp.ones_like(positions), positions


@layers
def test_extremes(name):
    """Inputs of 0 and of 1,000, and bfloat16: outputs and gradients are finite, and of the inputs' dtype.

    In bfloat16 the outputs are those of float32 to a tenth of their largest entry, most to far less: parameters,
    activations and outputs are rounded to eight bits, states and decays are not.

    Seen to fail: a root of 0, whose slope is not finite; an output left in float32.
    """
    graph, params = make(name)
    segments = packed(ROWS, T)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y = nnx.merge(graph, params)(x, segments)[0]
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, gradients

    x = inputs(T)
    for given in (jnp.zeros_like(x), 1e3 * x, x.astype(jnp.bfloat16)):
        y, gradients = run(params, given)
        assert y.dtype == given.dtype
        for path, leaf in jax.tree.leaves_with_path((y, gradients)):
            assert np.isfinite(np.asarray(leaf, np.float32)).all(), f"{jax.tree_util.keystr(path)} is not finite"
    exact = run(params, x)[0]
    close(y.astype(jnp.float32), exact, 0.1, "bfloat16: ")


@layers
def test_causality(name):
    """The gradient of output t with respect to inputs after t, and to other documents, is exactly zero.

    The message names the row, both tokens and their documents. Seen to fail: Causal showing one token ahead.
    """
    graph, params = make(name)
    layer = nnx.merge(graph, params)
    segments = packed(ROWS, T)
    ids = np.asarray(segments.ids)

    @jax.jit
    def influence(x, t):
        return jax.grad(lambda x: jnp.sum(jnp.square(layer(x, segments)[0][:, t])))(x)

    for t in (0, 4, 5, 23, 24, 40, 53, 59):
        gradient = np.abs(np.asarray(influence(inputs(T), t))).sum(-1)
        document = (np.arange(T) <= t) & (ids == ids[:, t : t + 1]) & (ids[:, t : t + 1] > 0)
        allowed = document | (np.arange(T) == t)  # what padding gives is nobody's business, if it reads itself alone
        for row, at in np.argwhere((gradient != 0) & ~allowed)[:1]:
            pytest.fail(f"output {t} of row {row}, {_what(ids[row, t])}, depends on input {at}, {_what(ids[row, at])}")
        for row in np.flatnonzero((gradient[:, t] == 0) & (ids[:, t] > 0)):
            pytest.fail(f"output {t} of row {row} does not depend on its own input")


def _what(document):
    return f"of document {document}" if document else "padding"


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
            y, _ = nnx.merge(graph, params)(x, segments)
            return jnp.sum(jnp.square(y))

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
