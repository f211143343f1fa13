"""Positions in the attention layer: parts and stored keys give the logits of each scheme's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import config
from longctx.errors import UsageError
from longctx.layers import MIXERS, MLPS
from longctx.layers.attention import Attention
from longctx.layers.position_schemes import DualChunk, RandomPositions, SelfExtend, XPos
from longctx.layers.positions import NoPositions, Positions, Rope, YaRN
from longctx.ops.attention import ATTENTION
from longctx.ops.patterns import Causal
from longctx.typing import Segments

LENGTH, WIDTH = 60, 8


def logits(scheme, offset=0):
    """The logits that a scheme gives one head: those of each part where its pattern shows the key, else NaN."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, LENGTH, 1, WIDTH)), jnp.float32) for _ in range(2))
    segments = Segments.single(1, LENGTH, offset)
    stored = scheme.stored(k, segments.positions)
    found = np.full((LENGTH, LENGTH), np.nan)
    places = np.asarray(segments.positions[0])
    for part in scheme.parts(q, stored, Causal(), segments, segments):
        seen = np.asarray(part.pattern.mask(places[:, None], places[None, :]))
        assert np.isnan(found[seen]).all(), "two parts show the same pair"
        found[seen] = np.einsum("tk,sk->ts", part.q[0, :, 0], part.k[0, :, 0])[seen]
    return np.asarray(q[0, :, 0], np.float64), np.asarray(k[0, :, 0], np.float64), found


def turned(x, position, base=10_000.0):
    """The rotation of `ops/positions.py` as complex numbers, in float64."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


def self_extend(q, k, t, s):
    """arXiv:2401.01325, equations 3 and 4, with group 3 and window 7."""
    if t - s < 7:
        return turned(q, t) @ turned(k, s)
    return turned(q, t // 3 + 7 - 7 // 3) @ turned(k, s // 3)


def dual_chunk(q, k, t, s):
    """arXiv:2402.17463, equations 2 to 8, with chunks of 8 and 4 local tokens in a trained length of 12."""
    at = {0: t % 8, 1: min(t % 8 + 8, 11)}.get(t // 8 - s // 8, 11)
    return turned(q, at) @ turned(k, s % 8)


def xpos(q, k, t, s):
    """arXiv:2212.10554, algorithm 1: the product of each pair of channels fades with the distance."""
    fade = ((np.arange(0, WIDTH, 2) / WIDTH + 0.4) / 1.4) ** ((t - s) / 32)
    return (turned(q, t) * turned(k, s)) @ np.tile(fade, 2)


@pytest.mark.parametrize(
    ("scheme", "definition"),
    [
        (Rope(), lambda q, k, t, s: turned(q, t) @ turned(k, s)),
        (NoPositions(), lambda q, k, t, s: q @ k),
        (SelfExtend(group=3, window=7), self_extend),
        (DualChunk(trained=12, local=4), dual_chunk),
        (XPos(scale_base=32.0), xpos),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
@pytest.mark.parametrize("offset", [0, 24])
def test_logits_are_those_of_the_definition(scheme, definition, offset):
    """Seen to fail: keys of the far part at exact positions; the chunk before taken for an earlier one."""
    q, k, found = logits(scheme, offset)
    expected = np.full_like(found, np.nan)
    for t in range(LENGTH):
        for s in range(t + 1):
            expected[t, s] = definition(q[t], k[s], t + offset, s + offset)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scheme", [Rope(share=0.5), YaRN(factor=4.0, trained=16), NoPositions()], ids=lambda s: s.kind)
def test_rotated_once_is_what_attention_gets(scheme):
    """`rotate` gives the queries of the one part and the keys as they are stored."""
    q, k = (jnp.asarray(np.random.default_rng(i).standard_normal((1, 9, 2, WIDTH)), jnp.float32) for i in range(2))
    segments = Segments.single(1, 9, 24)
    (part,) = scheme.parts(q, scheme.stored(k, segments.positions), Causal(), segments, segments)
    for found, expected in zip(scheme.rotate(q, k, segments), part, strict=False):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "kind", ["nsa", "moba", "lsh", "infini", "lact", "block_recurrent", "ttt_linear", "indexer_topk"]
)
def test_mixers_that_rotate_once(kind):
    """They take the schemes that rotate and no more."""
    for name, scheme in Positions.kinds.items():
        if scheme.rotates:
            assert MIXERS[kind].Config(positions={"kind": name}).positions == scheme()
        else:
            with pytest.raises(UsageError, match=f"positions '{name}' do more than rotate"):
                MIXERS[kind].Config(positions={"kind": name})


def test_share_leaves_the_other_channels():
    q, k, found = logits(Rope(share=0.5))
    half = np.array([[turned(q[t, :4], t) @ turned(k[s, :4], s) + q[t, 4:] @ k[s, 4:] for s in range(9)] for t in [8]])
    np.testing.assert_allclose(found[8, :9], half[0], rtol=0, atol=2e-5)


def test_random_positions_cover_the_range_in_order():
    scheme = RandomPositions(span=4096, trained=64)
    drawn = np.asarray(scheme.drawn(jnp.arange(64)[None], jnp.full((1, 64), 64)))[0]
    assert (drawn // 64 == np.arange(64)).all()
    assert len(set(np.diff(drawn).tolist())) > 20
    longer = np.asarray(scheme.drawn(jnp.arange(256)[None], jnp.full((1, 256), 256)))[0]
    assert (np.diff(longer) > 0).all()
    assert longer.max() < 4096


def test_far_parts_are_merged():
    """Several parts are one softmax: with the same queries and keys in all of them, plain attention."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((1, LENGTH, 2, WIDTH)), jnp.float32) for _ in range(3))
    segments = Segments.single(1, LENGTH)
    parts = DualChunk(trained=12, local=4).parts(q, k, Causal(), segments, segments)
    patterns = tuple(part.pattern for part in parts)
    keys = tuple(part.k for part in parts)
    found = ATTENTION(((q,) * len(parts),), (keys, v), segments=segments, pattern=patterns).y
    expected = ATTENTION((q,), (keys[0], v), segments=segments, pattern=Causal()).y
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_xpos_refuses_what_float32_cannot_scale():
    layer = Attention(16, Attention.Config(heads=1, kv_heads=1, head_width=8, positions=XPos()), nnx.Rngs(0))
    with pytest.raises(ValueError, match="spans of at most 65"):
        jax.eval_shape(lambda x: layer(x, Segments.single(1, 70_000))[0], jnp.zeros((1, 70_000, 16)))


def attention(**options):
    model = {"width": 32, "pattern": ("a",), "repeats": 1, "blocks": {}}
    model["blocks"]["a"] = {"mixer": {"kind": "attention", **options}, "mlp": {"kind": "swiglu", "hidden": 32}}
    return config.parse({"model": model, "training": {"stages": ((1, 1, 64),)}}, MIXERS, MLPS).model.blocks["a"]


def test_every_kind_is_named_in_a_config():
    """The names of the schemes, and their options with defaults."""
    names = "rope linear ntk dynamic_ntk ntk_by_parts yarn llama3 longrope giraffe_power giraffe_truncated xpos nope"
    names = f"{names} alibi t5 cope self_extend dual_chunk random".split()
    assert sorted(Positions.kinds) == sorted(names)
    for name in names:
        assert attention(positions={"kind": name}).mixer.positions.kind == name
    assert attention(positions={"kind": "yarn", "factor": 8}).mixer.positions == YaRN(factor=8.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": {"kind": "rotary"}}, "positions.kind is 'rotary'; choose one of alibi"),
        ({"positions": "rope"}, "positions is 'rope'; give a dictionary"),
        ({"positions": {"kind": "yarn", "factors": 8}}, "factors is not a field; did you mean 'factor'"),
        ({"positions": {"kind": "yarn", "factor": 0.5}}, "positions.factor is 0.5; expected the length to reach"),
        ({"positions": {"kind": "rope", "share": 0.1}}, "it must be an even number"),
        ({"head_width": 31}, "it must be an even number"),
        ({"positions": {"kind": "longrope", "long": (1.0, 2.0)}}, "expected 16 positive ones"),
        ({"positions": {"kind": "dual_chunk", "local": 4096}}, "local must be less"),
        ({"positions": {"kind": "self_extend"}, "pattern": "Window(4), Causal()"}, "give one pattern"),
        ({"positions": {"kind": "cope"}, "pattern": "Window(4)"}, "'cope' has neither pattern"),
        ({"positions": {"kind": "cope", "max_position": 1}}, "give at least 2"),
        ({"positions": {"kind": "t5", "buckets": 1}}, "buckets is 1"),
        ({"positions": {"kind": "random", "span": 0}}, "both must be at least 1"),
        ({"positions": {"kind": "xpos", "scale_base": 0.0}}, "scale_base is 0.0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError) as error:
        attention(**options)
    assert message in str(error.value)
