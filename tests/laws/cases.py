"""The layers that the laws ask: every registered one with its default options, and variants.

A layer that is added to `MIXERS` or `MLPS` is under all laws; `VARIANTS` adds options that take another path through
the code (those of attention in every run, the rest by `pytest -m slow`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.layers import MIXERS, MLPS
from longctx.layers.attention import Attention
from longctx.layers.position_schemes import T5, Alibi, CoPE, DualChunk, RandomPositions, SelfExtend, XPos
from longctx.layers.positions import NoPositions, YaRN
from longctx.ops.patterns import causal, parse
from longctx.typing import Segments

D = 32

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
    "lsh/centroids": ("lsh", {"centroid_weight": 0.01, "rounds": 1, "buckets": 4, "positions": NoPositions()}),
    "indexer_topk/dense": (
        "indexer_topk",
        {"stage": "dense", "kv_heads": 2, "qk_norm": False, "positions": NoPositions()},
    ),
    "multi_resolution/attention": (
        "multi_resolution",
        {"factor": 2, "layers": 2, "inner": Attention.Config(pattern="Window(5)", conv_width=3)},
    ),
    "s5/bilinear": ("s5", {"discretisation": "bilinear"}),
    "infini/short": ("infini", {"segment": 7, "positions": NoPositions()}),
    "infini/delta": ("infini", {"segment": 7, "delta": True}),
    "forgetting/window": (
        "forgetting",
        {"window": 11, "kv_heads": 2, "qk_norm": False, "output_gate": False, "shift": False},
    ),
    "linear_attention/hedgehog": ("linear_attention", {"feature_map": "hedgehog", "normalise": False, "conv_width": 4}),
    "delta_net/relu": ("delta_net", {"activation": "relu"}),
    "inplace_ttt/clip+decay": ("inplace_ttt", {"minibatch": 5, "clip": 0.5, "decay": 0.9}),
    "block_recurrent/lstm": ("block_recurrent", {"gate": "lstm", "block": 5, "positions": NoPositions()}),
    "titans/gate": ("titans", {"mode": "gate", "depth": 1, "minibatch": 7}),
    "lact/orthogonal": (
        "lact",
        {
            "momentum": False,
            "orthogonal": True,
            "minibatch": 40,
            "rank": 0,
            "fast_width": 32,
            "positions": NoPositions(),
        },
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

# One layer of each family of ops: what the op and its place in a mesh decide, and not the layer, is asked of these.
ONE_A_FAMILY = [
    "attention", "attention/cope", "attention/everything", "attention/longnet", "attention/t5", "block_recurrent",
    "gated_delta", "gated_delta_product", "gla", "h_transformer", "indexer_topk", "infini", "inplace_ttt", "lact",
    "log_linear_gated_delta", "lsh", "mamba", "mlstm", "moba", "multi_resolution", "nsa", "path", "pyramid", "rglru",
    "rwkv7", "slstm", "swiglu", "titans", "titans_context", "ttt_linear",
]  # fmt: skip


def cases(often):
    """All layers, those not named left to `pytest -m slow`."""
    return pytest.mark.parametrize("name", [*often, *slow(*(name for name in LAYERS if name not in often))])


layers, families, ops_once = cases(OFTEN), cases(ONE_A_FAMILY), cases([name for name in OFTEN if name not in SAME_OP])


@functools.cache
def shapes(name):
    """The layer of a name: its graph, and its parameters as shapes, of which nothing is computed."""
    graph, params = nnx.split(nnx.eval_shape(functools.partial(_layer, name)))
    return graph, nnx.as_pure(params)


@functools.cache
def make(name):
    """The layer of a name, with every parameter moved off its initial value (zeros and ones hide faults)."""

    @jax.jit
    def moved():
        leaves, tree = jax.tree.flatten(nnx.as_pure(nnx.state(_layer(name))))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noise = (0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True))
        return jax.tree.unflatten(tree, map(jnp.add, leaves, noise))

    return shapes(name)[0], moved()


def _layer(name):
    kind, options = LAYERS[name]
    cls = MIXERS.get(kind) or MLPS[kind]
    return cls(D, cls.Config(**options), nnx.Rngs(params=0))


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
