"""Log-linear attention against the sum over all pairs of tokens, in float64; its laws are in tests/laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import GATED_DELTA, GATED_LINEAR, LOG_LINEAR
from longctx.typing import Segments

B, H, K, V = 2, 2, 4, 3


def example(length, levels, delta):
    """Inputs as float64 numpy arrays; the second row has decays of 0, of 1 and of exp(-80), keys of norm 0 and 1e3."""
    rng = np.random.default_rng(length)
    q, k, v = (rng.normal(size=(B, length, H, width)) for width in (K, K, V))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay = -np.exp(rng.normal(size=(B, length, H)) - 2)
    log_decay[1] = rng.choice([-np.inf, -80.0, 0.0, -0.1], size=(length, H), p=[0.05, 0.05, 0.6, 0.3])
    beta = rng.choice([0.0, 0.5, 1.0, 2.0], size=(B, length, H)) if delta else None
    k[1] *= rng.choice([0.0, 1.0] if delta else [0.0, 1.0, 1e3], size=(length, 1, 1))
    return q, k, v, beta, log_decay, rng.random((B, length, H, levels))


def by_pairs(q, k, v, beta, log_decay, weight, positions):
    """For one row: y_i = sum over j <= i of its document of weight_i^level(i, j) q_i^T A_i ... A_{j+1} w_j v_j^T."""
    length, _, width = q.shape
    y = np.zeros_like(v)
    for h in range(H):
        steps, writes = [], []
        for t in range(length):
            b = 0.0 if beta is None else beta[t, h]
            steps.append(np.exp(log_decay[t, h]) * (np.eye(width) - b * np.outer(k[t, h], k[t, h])))
            writes.append(k[t, h] if beta is None else b * k[t, h])
        for i in range(length):
            through = q[i, h]
            for j in range(i, i - positions[i] - 1, -1):
                level = int(positions[i] ^ positions[j]).bit_length()
                y[i, h] += weight[i, h, min(level, weight.shape[-1] - 1)] * (through @ writes[j]) * v[j, h]
                through = through @ steps[j]
    return y


@pytest.mark.parametrize("delta", [False, True], ids=["decay", "delta"])
@pytest.mark.parametrize(("length", "levels"), [(1, 3), (70, 4), (70, 9)])
def test_pairs(length, levels, delta):
    """To 1e-5 of the largest entry, for documents that start anywhere, with fewer levels than scales and with more.

    Seen to fail: buckets merged into h in place of h + 1; positions counted from the row's start.
    """
    inputs = example(length, levels, delta)
    lengths = (11, length - 11) if length > 11 else (length,)
    positions = np.concatenate([np.arange(part) for part in lengths])
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    segments = Segments.from_ids(*(jnp.asarray(np.broadcast_to(leaf, (B, length))) for leaf in (ids, positions)))
    run = jax.jit(functools.partial(LOG_LINEAR, form="chunked", chunk=32))
    y, state = run(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs), segments=segments)
    assert np.isfinite(np.asarray(state)).all()
    for row in range(B):
        wanted = by_pairs(*(None if leaf is None else leaf[row] for leaf in inputs), positions)
        np.testing.assert_allclose(y[row], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("delta", [False, True], ids=["decay", "delta"])
def test_equal_weights_are_the_underlying_attention(delta):
    """With all weights 1 the buckets' sum is the one state, to 1e-5. Seen to fail: a bucket beyond the last."""
    q, k, v, beta, log_decay, weight = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), example(70, 5, delta))
    y, buckets = LOG_LINEAR(q, k, v, beta, log_decay, jnp.ones_like(weight), chunk=32)
    if delta:
        wanted = GATED_DELTA(q, k, v, beta, log_decay, form="recurrent")
    else:
        wanted = GATED_LINEAR(q, k, v, log_decay, form="recurrent")
    for have, want in zip((y, jnp.sum(buckets, axis=1)), wanted, strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_state_needs_positions():
    """Seen to fail: positions counted from the span's start, without a word."""
    inputs = jax.tree.map(jnp.asarray, example(4, 3, True))
    with pytest.raises(ValueError, match="positions"):
        LOG_LINEAR(*inputs, state=jnp.zeros((B, 3, H, K, V)))
