"""The entropy of attention, where it is known and against the weights of a dense softmax."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

from longctx.evals import entropy as evals
from longctx.evals import plots
from longctx.evals.entropy import by_length, entropy, plot
from longctx.ops.patterns import Causal, Dilated, Window
from longctx.typing import Segments

B, T, H, G, K = 2, 37, 4, 2, 8


@functools.cache
def inputs(length=T):
    rng = np.random.default_rng(0)
    return [jnp.asarray(2 * rng.standard_normal((B, length, n, K)), jnp.float32) for n in (H, G)]


def packed():
    ids = np.repeat([[1, 0, 2], [0, 3, 0]], (12, 3, 22), axis=1)
    origin = np.repeat([[0, 0, 15], [0, 12, 0]], (12, 3, 22), axis=1)
    return Segments.from_ids(ids, np.where(ids > 0, np.arange(T) - origin, 0))


def formula(q, k, pattern, segments, scale, sinks=None, soft_cap=None):
    """-sum p log p in float64, query by query; a key seen twice is there twice."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    ids, positions = np.asarray(segments.ids), np.asarray(segments.positions)
    found = np.zeros((B, T, H))
    for b, t, h in np.ndindex(B, T, H):
        times = np.asarray(pattern.times(positions[b, t], positions[b])) * (ids[b] == ids[b, t]) * (ids[b, t] > 0)
        logits = scale * np.repeat(k[b, :, h // (H // G)] @ q[b, t, h], times)
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        if sinks is not None and ids[b, t]:
            logits = np.append(logits, sinks[h])
        if logits.size:
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            found[b, t, h] = -np.sum(p * np.log(np.maximum(p, 1e-300)))
    return found


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        (Causal(), {"scale": 0.3}),
        (Causal() & ~Window(4), {"scale": 0.3}),
        (Causal() & (Dilated(8, 1) + Dilated(16, 2)), {"scale": 0.3}),
        (Causal(), {"scale": 1.0, "soft_cap": 2.0, "sinks": np.array([-1.0, 0.0, 3.0, 9.0])}),
    ],
)
@pytest.mark.parametrize("chunk", [5, 64])
def test_formula(pattern, options, chunk):
    """Packed rows, grouped keys. Seen to fail: the sink not counted; a key that is seen twice counted once."""
    arrays = {name: jnp.asarray(x) if name == "sinks" else x for name, x in options.items()}
    run = jax.jit(lambda *x: entropy(*x, pattern, packed(), chunk=chunk, **arrays))
    np.testing.assert_allclose(run(*inputs()), formula(*inputs(), pattern, packed(), **options), rtol=0, atol=1e-5)


def test_known():
    """Keys alike: log n. One key far ahead of the others: exactly 0, at logits of 1e6.

    Seen to fail: L less the logits, which at 1e6 has rounding of a quarter.
    """
    q, k = inputs()
    alike = entropy(q, jnp.ones_like(k))
    np.testing.assert_allclose(alike, np.broadcast_to(np.log(np.arange(1, T + 1))[:, None], alike.shape), atol=1e-5)
    ahead = entropy(jnp.ones_like(q), jnp.zeros_like(k).at[:, 0].set(1e6))
    assert not np.any(ahead)


def test_memory_is_linear():
    def bytes_at(length):
        shapes = [jax.ShapeDtypeStruct((B, length, n, K), jnp.float32) for n in (H, G)]
        return jax.jit(entropy).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert bytes_at(4096) <= 4.6 * bytes_at(1024)


def test_by_length():
    """Means by bucket, padding and lengths out of range left out. Seen to fail: positions in place of lengths."""
    segments = packed()
    lengths = np.asarray(segments.positions) + 1
    values = np.where(np.asarray(segments.valid), lengths, 1e9)[..., None] * np.array([1.0, 10.0])
    found = by_length(jnp.asarray(values), segments, [2, 3, 10, 16, 30, 40])
    # Documents of 12, 22 and 3 tokens.
    assert found.tokens.tolist() == [3, 1 + 7 * 2, 3 + 6, 7, 0]
    within = np.concatenate([np.arange(10, 13), np.arange(10, 16)])
    np.testing.assert_allclose(found.entropy[2], within.mean() * np.array([1, 10]))
    np.testing.assert_allclose(found.share[2], (within / np.log(within)).mean() * np.array([1, 10]))
    assert np.isnan(found.entropy[4]).all()


@pytest.mark.parametrize("edges", [[4], [1, 4], [4, 4], [8, 4]])
def test_refused_edges(edges):
    with pytest.raises(ValueError, match="give two lengths or more in ascending order, the first at least 2"):
        by_length(jnp.zeros((B, T, H)), packed(), edges)


def test_plot(monkeypatch):
    """A picture in both styles, whose curves are the means over heads. Seen to fail: curves of the first head."""
    drawn = []
    figure = plots.Figure
    monkeypatch.setattr(plots, "Figure", lambda **options: drawn.append(figure(**options)) or drawn[-1])
    edges = (2, 8, 32, 128)
    ends = np.sqrt(np.multiply(edges[:-1], edges[1:]))
    spread = np.log(ends)[:, None] * np.array([0.2, 0.6])
    wide = evals.Dilution(edges, spread, spread / np.log(ends)[:, None], np.ones(3, int))
    flat = evals.Dilution(edges, np.full((3, 2), 0.5), 0.5 / np.log(ends)[:, None] * np.ones(2), np.ones(3, int))
    picture = plot({"softmax": wide, "sharp": flat})
    assert image.imread(io.BytesIO(picture.light)).shape == (600, 1080, 4)
    assert picture.light != picture.dark
    left, right = drawn[0].axes
    curves = {line.get_label(): line.get_ydata() for line in right.lines}
    np.testing.assert_allclose(curves["softmax"], 0.4)
    np.testing.assert_allclose(left.lines[1].get_ydata(), 0.5)
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["softmax", "sharp"]
