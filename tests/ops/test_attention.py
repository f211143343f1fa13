"""Attention: the definition against a loop over tokens, every other form against the definition."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import attention as ops
from longctx.ops import biases, blockwise
from longctx.ops.attention import attention, attention_partial
from longctx.ops.kernels import splash
from longctx.ops.partial import Partial, add_sinks, merge
from longctx.ops.patterns import (
    Blocks,
    Causal,
    Chunked,
    Dilated,
    Fixed,
    Global,
    Heads,
    Keys,
    Queries,
    RandomBlocks,
    Range,
    ShiftedGroups,
    Sinks,
    Strided,
    Window,
    terms,
)
from longctx.planning.programs import operations
from longctx.typing import Segments

TOLERANCE = 2e-5  # float32, of values of order 1 to 10
LOCAL = Causal() & (Window(20) | Sinks(3))

attend = jax.jit(attention, static_argnames=("pattern", "scale", "soft_cap", "implementation", "block"))


def inputs(length, keys=None, heads=4, groups=2, batch=2):
    rng = np.random.default_rng(0)
    keys = keys or length
    shapes = {
        "q": (batch, length, heads, 8),
        "k": (batch, keys, groups, 8),
        "v": (batch, keys, groups, 6),
        "sinks": (heads,),
        "d": (batch, length, heads, 6),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def packed(length):
    """Two rows: padding at both ends and in the middle, documents of uneven lengths; one document and padding."""
    ids, positions = np.zeros((2, 2, length), np.int32)
    cuts = [length * share // 100 for share in (2, 35, 36, 40, 40, 98)]
    for number, (first, last) in enumerate([cuts[:2], cuts[2:4], cuts[4:]], start=1):
        ids[0, first:last] = number
        positions[0, first:last] = np.arange(last - first)
    whole = length - length // 5
    ids[1, :whole] = 9
    positions[1, :whole] = np.arange(whole)
    return Segments(ids, positions, (ids > 0) & (positions == 0))


def part(segments, tokens):
    return jax.tree.map(lambda x: x[:, tokens], segments)


def with_gradients(function, arguments, cotangent):
    """Outputs and gradients by name."""

    @jax.jit
    def run(arguments):
        y, pull = jax.vjp(lambda arguments: function(**arguments), arguments)
        return {"y": y, **pull(cotangent)[0]}

    return jax.tree.map(np.asarray, run(arguments))


def assert_close(found, expected):
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=name)


def compare(arguments, pattern, segments=None, key_segments=None, block=32, sinks=False, soft_cap=None):
    """Blockwise against dense, outputs and gradients."""
    cotangent = arguments["d"]
    arguments = {name: arguments[name] for name in ("q", "k", "v", *(["sinks"] if sinks else []))}

    def run(implementation):
        options = {"implementation": implementation, "block": block, "soft_cap": soft_cap}
        function = functools.partial(attention, pattern=pattern, **options)
        return with_gradients(
            lambda **arguments: function(segments=segments, key_segments=key_segments, **arguments),
            arguments,
            cotangent,
        )

    found, expected = run("blockwise"), run("dense")
    assert all(np.isfinite(x).all() for x in expected.values())
    assert_close(found, expected)
    return found


def test_dense_is_the_formula():
    """The definition against a loop over queries and heads in numpy. Fails if the sink is left out of the sum."""
    length, soft_cap = 40, 2.0
    x = inputs(length)
    segments = packed(length)
    ids, positions = segments.ids, segments.positions
    q, k, v, sinks = (x[name].astype(np.float64) for name in ("q", "k", "v", "sinks"))
    expected = np.zeros((2, length, 4, 6))
    for b, t, h in np.ndindex(2, length, 4):
        seen = [s for s in range(length) if ids[b, s] == ids[b, t] > 0 and LOCAL.mask(positions[b, t], positions[b, s])]
        logits = soft_cap * np.tanh(k[b, seen, h // 2] @ q[b, t, h] / np.sqrt(8) / soft_cap)
        expected[b, t, h] = np.exp(logits) @ v[b, seen, h // 2] / (np.exp(logits).sum() + np.exp(sinks[h]))
    x.pop("d")
    found = attend(**x, pattern=LOCAL, segments=segments, soft_cap=soft_cap, implementation="dense")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("pattern", "length", "block", "pack", "options"),
    [
        (Causal(), 1, 16, False, {"sinks": True}),
        (Causal(), 65, 64, False, {"soft_cap": 2.0}),
        (Causal(), 63, 16, True, {}),
        (Causal(), 200, 64, True, {"sinks": True, "soft_cap": 2.0}),
        (Window(20), 200, 32, True, {"soft_cap": 2.0}),
        (Causal() & Window(20), 200, 16, True, {"sinks": True}),
        (LOCAL, 200, 16, True, {"sinks": True}),
        (LOCAL, 130, 32, False, {}),
        (Sinks(5), 63, 64, True, {}),
    ],
    ids=str,
)
def test_blockwise_is_dense(pattern, length, block, pack, options):
    """Outputs and all gradients. Fails without the soft cap's slope, the mask's -inf, or the test for whole blocks."""
    compare(inputs(length), pattern, packed(length) if pack else None, block=block, **options)


SPARSE = [
    Causal() & Chunked(24),
    Causal() & ShiftedGroups(24),
    Causal() & Strided(5),
    Strided(3),
    Causal() & (Window(12) | Strided(12)),
    Causal() & (Chunked(16) | Fixed(16, 2)),
    Causal() & Dilated(64, 4, 1),
    Dilated(30, 7, 2),
    Causal() & (Window(9) | Global((3, 40))),
    Window(9) | Global(4),
    Keys((2, 50)) | Queries((7,)),
    Causal() & (Window(8) | Sinks(4) | RandomBlocks(8, 2)),
    Causal() & Blocks(np.random.default_rng(5).random((6, 8)) < 0.4, 16),
    Causal() & Strided(4) & ~Window(20),
    Causal() & Dilated(64, 4, 1) & Strided(8),
    Strided(4) & Sinks(9),
    Causal() & (Dilated(16, 1) + Dilated(32, 2) + Dilated(64, 4, 1)),
    Heads((Causal() & Chunked(24), Causal() & ShiftedGroups(24))),
    Heads((Causal() & Window(9), Causal(), Causal() & Window(9))),
]


def test_longnet_is_mixed_by_denominators():
    """Equation 9 of arXiv:2307.02486: each pair's softmax, weighted by its share of the sum of all denominators."""
    x, length = inputs(64), 64
    q, k, v = (x[name].astype(np.float64) for name in ("q", "k", "v"))
    outputs, totals = np.zeros((2, 2, length, 4, 6)), np.zeros((2, 2, length, 4))
    patterns = Causal() & Dilated(16, 1), Causal() & Dilated(64, 4, 1)
    for n, pattern in enumerate(patterns):
        for b, t, h in np.ndindex(2, length, 4):
            seen = [s for s in range(length) if pattern.mask(t, s)]
            weights = np.exp(k[b, seen, h // 2] @ q[b, t, h] / np.sqrt(8))
            totals[n, b, t, h] = weights.sum()
            outputs[n, b, t, h] = weights @ v[b, seen, h // 2] / max(weights.sum(), 1e-30)
    expected = (outputs * (totals / totals.sum(0))[..., None]).sum(0)
    for implementation in ("dense", "blockwise"):
        found = attend(x["q"], x["k"], x["v"], patterns[0] + patterns[1], implementation=implementation, block=16)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("pattern", SPARSE, ids=str)
def test_sparse_patterns_blockwise_are_dense(pattern, pack):
    """Outputs and all gradients, whatever order of tokens the parts of a pattern are worked on in.

    Fails if: a part is not made disjoint from those before it; a folded row is put back in another order; a chosen
    query's result goes to another query.
    """
    compare(inputs(100), pattern, packed(100) if pack else None, block=16, sinks=pack)


@pytest.mark.parametrize("pattern", SPARSE, ids=str)
def test_sparse_patterns_see_a_cache(pattern):
    """Keys that are not the queries' own tokens: what came before them, and themselves."""
    keys, queries = Segments.single(2, 100), Segments.single(2, 40, offset=60)
    compare(inputs(40, keys=100), pattern, queries, keys, block=16)


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 1)])
def test_groups_share_keys(heads, groups):
    """Every head its own keys, and one set of keys for all; the other tests have two groups of two heads."""
    compare(inputs(40, heads=heads, groups=groups), Causal(), packed(40), block=16)


@pytest.mark.parametrize(("pattern", "held"), [(Causal(), 120), (Causal() & Window(20), 30)])
def test_keys_of_a_cache(pattern, held):
    """Against a cache of 128 slots, `held` of them filled, and itself, a span of 40 tokens gives what the whole row
    gives for it: T != S."""
    x, segments = inputs(160), packed(160)
    slots = np.r_[120 - held : 120, np.full(128 - held, -1), 120:160]

    def keys(array):
        empty = np.zeros_like(array[:, :1])  # padding, in the last place
        return np.concatenate([array, empty], axis=1)[:, slots]

    span = {"q": x["q"][:, 120:], "k": keys(x["k"]), "v": keys(x["v"]), "d": x["d"][:, 120:]}
    found = compare(span, pattern, part(segments, slice(120, 160)), jax.tree.map(keys, segments))
    whole = attend(x["q"], x["k"], x["v"], pattern, segments, implementation="dense")
    np.testing.assert_allclose(found["y"], whole[:, 120:], rtol=0, atol=TOLERANCE)


def log_decays(length):
    """Per query head; some forget everything, and some nothing."""
    rng = np.random.default_rng(1)
    steps, chance = -rng.exponential(0.2, (2, length, 4)), rng.random((2, length, 4))
    return np.where(chance < 0.1, -80.0, np.where(chance < 0.3, 0.0, steps)).astype(np.float32)


def within_documents(steps, segments):
    """Sums from the start of each document."""
    sums = np.cumsum(steps.astype(np.float64), axis=1)
    first = np.maximum.accumulate(np.where(segments.starts, np.arange(steps.shape[1]), 0), axis=1)
    before = np.take_along_axis(sums - steps, first[..., None], axis=1)
    return (sums - before).astype(np.float32)


def test_decay_is_the_formula():
    """Logits with sums of log decays added, in float64 from the log decays themselves: what has decayed by exp(-80)
    is not there. Sums up to 500 leave 3e-5 of a logit's bits. Fails if query and key change places."""
    x, segments, steps = inputs(40), packed(40), log_decays(40)
    ids = segments.ids
    q, k, v = (x[name].astype(np.float64) for name in ("q", "k", "v"))
    expected = np.zeros((2, 40, 4, 6))
    for b, t, h in np.ndindex(2, 40, 4):
        seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t] > 0]
        passed = np.array([steps[b, s + 1 : t + 1, h].astype(np.float64).sum() for s in seen])
        weights = np.exp(k[b, seen, h // 2] @ q[b, t, h] / np.sqrt(8) + passed)
        expected[b, t, h] = weights @ v[b, seen, h // 2] / max(weights.sum(), 1e-300)
    decay = within_documents(steps, segments)
    found = attend(x["q"], x["k"], x["v"], Causal(), segments, decay=decay, implementation="dense")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("pattern", [Causal(), LOCAL], ids=str)
def test_blockwise_decays_as_dense(pattern, soft_cap):
    """Outputs and all gradients, those of the sums at queries and at keys apart. Fails if the gradient of a group's
    heads is summed, or taken after the soft cap's slope."""
    x, segments = inputs(70), packed(70)
    x.pop("sinks")
    cotangent = x.pop("d")
    decay = within_documents(log_decays(70), segments)
    x |= {"decay": decay, "key_decay": decay}
    options = {"pattern": pattern, "segments": segments, "soft_cap": soft_cap, "block": 16}
    found, expected = (
        with_gradients(functools.partial(attention, implementation=name, **options), x, cotangent)
        for name in ("blockwise", "dense")
    )
    assert_close(found, expected)
    assert np.abs(expected["key_decay"]).max() > 0.1


@pytest.mark.parametrize(("implementation", "platform"), [("cudnn", "gpu"), ("splash", "tpu")])
def test_kernels_refuse_decay(implementation, platform, monkeypatch):
    """Never silently without it. Fails if a kernel's refusal does not look at it."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = {name: jnp.asarray(inputs(16, groups=4)[name], jnp.bfloat16) for name in ("q", "k", "v")}
    with pytest.raises(NotImplementedError, match="decay"):
        attention(**x, decay=jnp.zeros((2, 16, 4)), implementation=implementation)


def test_partial_results_merge():
    """Attention over two parts of the keys, merged with the sinks: outputs and gradients of attention over all.

    Fails if the backward pass drops the logsumexp's cotangent.
    """
    x, segments = inputs(70), packed(70)

    def merged(q, k, v, sinks):
        parts = [
            attention_partial(q, k[:, tokens], v[:, tokens], LOCAL, segments, part(segments, tokens), block=16)
            for tokens in (slice(0, 35), slice(35, 70))
        ]
        return add_sinks(merge(*parts), sinks).output

    cotangent = x.pop("d")
    dense = functools.partial(attention, pattern=LOCAL, segments=segments, implementation="dense")
    assert_close(with_gradients(merged, x, cotangent), with_gradients(dense, x, cotangent))


def test_merge_is_associative_and_knows_nothing():
    """In any order, with one part that saw no key; far apart logsumexps overflow nothing."""
    rng = np.random.default_rng(0)
    parts = [Partial(rng.standard_normal((1, 3, 2, 4)), scale * rng.standard_normal((1, 3, 2))) for scale in (1, 99)]
    parts.append(Partial(np.zeros((1, 3, 2, 4)), np.full((1, 3, 2), -np.inf)))
    a, b, nothing = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), part) for part in parts]
    expected = merge(a, b)
    weights = np.exp(np.stack([a.logsumexp, b.logsumexp]).astype(np.float64))
    output = (weights[0, ..., None] * a.output + weights[1, ..., None] * b.output) / weights.sum(0)[..., None]
    np.testing.assert_allclose(expected.output, output, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(expected.logsumexp, np.log(weights.sum(0)), rtol=1e-6)
    for found in (merge(merge(nothing, a), b), merge(a, merge(b, nothing)), merge(b, a)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, expected)
    both = merge(nothing, nothing)
    assert (both.output == 0).all()
    assert (both.logsumexp == -np.inf).all()


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_nothing_to_see_gives_zero(implementation):
    """Not a uniform average: padding queries, and queries whose documents have no keys. Gradients are zero too."""
    x = inputs(24, keys=40)
    ids = np.tile(np.repeat([0, 1, 2], 8), (2, 1)), np.tile(np.repeat([1, 0, 3], [10, 20, 10]), (2, 1))
    queries, keys = (Segments(i, np.zeros_like(i), np.zeros_like(i, bool)) for i in ids)
    cotangent = x.pop("d")
    x.pop("sinks")
    options = {"segments": queries, "key_segments": keys, "implementation": implementation, "block": 8}
    found = with_gradients(functools.partial(attention, **options), x, cotangent)
    seen = np.zeros(24, bool)
    seen[8:16] = True
    for nothing in (found["y"][:, ~seen], found["q"][:, ~seen], found["k"][:, 10:], found["v"][:, 10:]):
        assert (nothing == 0).all()
    assert (found["y"][:, seen] != 0).all()


@pytest.mark.parametrize("pattern", [Causal(), Causal() & Window(40), LOCAL], ids=str)
def test_work_is_only_on_touched_blocks(pattern):
    """The schedule of a packed row holds every pair with something to see, and few others: ranges of ids and
    positions cannot tell which of a block's documents a position belongs to. Fails if either is left out.
    """
    length, block = 512, 16
    segments = jax.tree.map(lambda x: jnp.asarray(x[:1]), packed(length))
    tokens = blockwise.token_blocks(blockwise.Tokens(segments.ids, segments.positions), block)
    plan = blockwise.Plan(pattern, 1.0, None, block, block)
    place = Range(np.arange(length), np.arange(length))
    schedule = jax.tree.map(np.asarray, blockwise.make_schedule(plan, tokens, tokens, (place, place)))

    ids, positions = np.asarray(segments.ids[0]), np.asarray(segments.positions[0])
    mask = pattern.mask(positions[:, None], positions[None, :]) & (ids[:, None] == ids[None, :]) & (ids > 0)
    blocks = mask.reshape(length // block, block, length // block, block)
    touched, whole = blocks.any((1, 3)), blocks.all((1, 3))
    found, unmasked = np.zeros_like(touched), np.zeros_like(whole)
    found[schedule.queries[: schedule.touched], schedule.keys[: schedule.touched]] = True
    unmasked[schedule.queries[: schedule.whole], schedule.keys[: schedule.whole]] = True
    assert not (touched & ~found).any()
    assert (found & ~touched).sum() <= 0.1 * touched.sum()
    assert not (unmasked & ~whole).any()
    assert unmasked.sum() >= 0.9 * whole.sum()


def test_blocks_out_of_sight_are_never_read():
    """Keys that no query of the batch sees may hold anything, even NaN, if they fill a block. Fails if the positions
    are left out of the schedule."""
    x = inputs(32, keys=96)
    x["k"][:, :32] = x["v"][:, :32] = np.nan
    segments = {"segments": Segments.single(2, 32, offset=64), "key_segments": Segments.single(2, 96)}
    options = {"pattern": Causal() & Window(33), "implementation": "blockwise", "block": 32}
    assert np.isfinite(attend(x["q"], x["k"], x["v"], **segments, **options)).all()


def test_low_precision_inputs_have_float32_statistics():
    """bfloat16 in and out; the error is that of rounding inputs and weights, not of a bfloat16 sum over 300 keys."""
    x = [jnp.asarray(inputs(300)[name], jnp.bfloat16) for name in ("q", "k", "v")]
    found = attend(*x, implementation="blockwise", block=64)
    expected = attend(*(one.astype(jnp.float32) for one in x), implementation="dense")
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0, atol=2e-2)


BIASES = {
    "alibi": biases.Alibi(jnp.array([0.5, 0.25, 0.125, 0.01])),
    "t5": biases.T5(jnp.asarray(np.random.default_rng(1).standard_normal((4, 8), np.float32)), 30),
    "adaptive_span": biases.AdaptiveSpan(jnp.array([0.5, 7.3, 20.0, 90.0]), 8),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_are_their_formulas(name):
    """What each adds to the logit of a query d tokens after a key."""
    bias, distances = BIASES[name], range(60)
    found = bias(jnp.array(distances)[None, :, None])[0, :, :, 0]
    for head, d in np.ndindex(4, 60):
        if name == "alibi":
            expected = -[0.5, 0.25, 0.125, 0.01][head] * d
        elif name == "t5":  # 4 single distances, then up to 30 in geometric steps
            edges = [1, 2, 3, 4, 4 * 7.5**0.25, 4 * 7.5**0.5, 4 * 7.5**0.75]
            expected = bias.table[head, sum(d >= edge for edge in edges)]
        else:
            share = min(max((8 + [0.5, 7.3, 20.0, 90.0][head] - d) / 8, 0), 1)
            expected = math.log(share) if share else -math.inf
        np.testing.assert_allclose(found[head, d], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", [Causal(), LOCAL, Causal() & (Window(8) | Strided(8)), SPARSE[-1]], ids=str)
@pytest.mark.parametrize("name", BIASES)
def test_blockwise_biases_as_dense(name, pattern):
    """Outputs and gradients, those of the bias's parameters included.

    Fails if: the bias's gradient is not summed over blocks; a head of a group takes another's.
    """
    x, segments = inputs(100), packed(100)
    cotangent = x.pop("d")
    x.pop("sinks")
    x["bias"] = BIASES[name]

    def run(implementation):
        options = {"segments": segments, "implementation": implementation, "block": 16, "soft_cap": 2.0}
        found = with_gradients(functools.partial(attention, pattern=pattern, **options), x, cotangent)
        return found | {"bias": jax.tree.leaves(found["bias"])[0] / 10}  # a sum over distances, of order 100

    found, expected = run("blockwise"), run("dense")
    assert_close(found, expected)
    assert np.abs(expected["bias"]).max() > 0.01


@pytest.mark.parametrize("gradients", [False, True])
def test_work_follows_the_pattern(gradients):
    """Operations and temporary bytes, read off the compiled program: those of the touched blocks, within 1.3.

    Operations against the blocks that the exact map of each part says; bytes against arrays as large as the inputs, so
    that nothing grows faster than T.
    """
    block, width = 64, 32
    patterns = [
        Causal(),
        Causal() & Window(256),
        Causal() & (Window(256) | Sinks(4)),
        Causal() & Chunked(256),
        Causal() & (Window(128) | Strided(64)),
        Causal() & (Chunked(128) | Fixed(128, 8)),
        Causal() & (Dilated(256, 1) + Dilated(1024, 4)),
        Causal() & (Window(128) | Global((5, 700)) | RandomBlocks(64, 2)),
        Causal() & Blocks(np.random.default_rng(5).random((64, 64)) < 0.2, 64),
    ]

    def program(length, pattern):
        x = jax.ShapeDtypeStruct((1, length, 2, width), jnp.float32)

        def run(q, k, v):
            return attention(q, k, v, pattern, implementation="blockwise", block=block)

        run = jax.grad(lambda *x, run=run: run(*x).sum(), (0, 1, 2)) if gradients else run
        return jax.jit(run).lower(x, x, x).compile()

    products = 2 + 5 * gradients
    for pattern in patterns:
        work, memory = [], []
        for length in (4096, 8192):
            compiled = program(length, pattern)
            work.append(operations(compiled.as_text()))
            memory.append(compiled.memory_analysis().temp_size_in_bytes)
        expected = products * 2 * 2 * width * block**2 * touched_blocks(pattern, 4096, block)
        assert expected / 1.3 <= work[0] <= 1.3 * expected, (pattern, work[0] / expected)
        assert memory[1] <= 2.3 * memory[0], (pattern, memory)


def touched_blocks(pattern, length, block):
    """Blocks of tokens brought together as far as can be: those that are seen by any, at the distances there are."""
    count = 0
    for part in terms(pattern):
        positions = np.arange(length)
        seeing, seen = part.seeing(positions), part.seen(positions)
        if part.thin and seeing is None and seen is None:
            orders = [(positions[r :: part.stride],) * 2 for r in range(part.stride)]
        else:
            every = np.ones(length, bool)
            sides = (every if x is None else x for x in (seeing, seen))
            orders = [tuple(positions[x] for x in sides)]
        for queries, keys in orders:
            mask = part.mask(queries[:, None], keys[None, :])
            tall, wide = (-(-n // block) for n in mask.shape)
            mask = np.pad(mask, ((0, tall * block - mask.shape[0]), (0, wide * block - mask.shape[1])))
            count += mask.reshape(tall, block, wide, block).any((1, 3)).sum()
    return count


def test_memory_grows_linearly():
    """Temporary memory of forward and backward, from the compiled program; the logits alone would grow fourfold."""

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, ids):
            return attention(q, k, v, Causal(), ids, implementation="blockwise", block=128).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.3 * temporary(2048)


@pytest.mark.parametrize(("pack", "start"), [(False, 0), (True, 0), (True, 45)])
def test_splash_interpreted_is_dense(pack, start):
    """The TPU kernel in Pallas's interpret mode, forward; grouped keys, and queries that are the last of a row.

    Seen to fail: keys filled up at the end alone; the mask not moved by the tokens before.
    """
    q, k, v = (inputs(150)[name] for name in ("q", "k", "v"))
    pattern = Causal() & Window(60) if pack else Causal()
    segments = packed(150) if pack else None
    options = {"scale": 0.3, "soft_cap": 2.0}
    expected = attend(q, k, v, pattern, segments, implementation="dense", **options)[:, start:]
    held = segments if start else None
    segments = jax.tree.map(lambda x: x[:, start:], segments)
    options |= {"segments": segments, "key_segments": held, "before": start or None}
    run = functools.partial(splash.attention, pattern=pattern, interpret=True, **options)
    np.testing.assert_allclose(jax.jit(run)(q[:, start:], k, v), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("implementation", ["cudnn", "splash"])
def test_a_named_kernel_runs_or_refuses(implementation):
    x = inputs(16)
    with pytest.raises(NotImplementedError, match=f"'{implementation}' needs .* platform is cpu"):
        attention(x["q"], x["k"], x["v"], implementation=implementation)


def test_a_kernel_that_is_not_used_is_told(caplog, monkeypatch):
    """On a GPU packed rows take none, and training says so: it shows warnings alone."""
    for module in (ops, ops.cudnn):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    ops._log.cache_clear()
    x = inputs(256)
    with caplog.at_level(logging.WARNING):
        jax.eval_shape(attention, x["q"], x["k"], x["v"], segments=jnp.ones((2, 256), jnp.int32))
    assert "implementation 'blockwise' ('cudnn' takes rows of one document only" in caplog.text


def test_choice_is_logged_once(caplog):
    ops._log.cache_clear()
    x = inputs(16)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            attention(x["q"], x["k"], x["v"])
    assert [record.message for record in caplog.records].count("attention: implementation 'dense' (few logits)") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "flash"}, "choose one of dense, blockwise, cudnn, splash"),
        ({"k": jnp.zeros((2, 9, 2, 8)), "v": jnp.zeros((2, 9, 2, 8))}, "q has 8 tokens and k has 9"),
        ({"k": jnp.zeros((2, 8, 3, 8)), "v": jnp.zeros((2, 8, 3, 8))}, "q a multiple of k's heads"),
        ({"v": jnp.zeros((2, 7, 2, 8))}, r"v is float32\[2, 7, 2, 8\], expected Float\[B, S, G, V\]"),
        ({"key_segments": jnp.ones((2, 8), jnp.int32)}, "without segments"),
        ({"segments": jnp.ones((2, 9), jnp.int32)}, r"segments is int32\[2, 9\], expected Int\[B, T\]"),
        ({"segments": Segments.single(2, 9)}, "one id per token"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_a_sentence(change, message):
    arguments = {name: inputs(8)[name] for name in ("q", "k", "v")} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
