"""Attention to chosen blocks, against a softmax over the keys of those blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import routed


def dense(q, k, v, chosen, scale):
    """Every query, every key; a mask says whose block was chosen."""
    seen = jax.nn.one_hot(chosen, k.shape[1]).sum(3) > 0  # [B, T, G, N]
    logits = jnp.einsum("btgrk,bncgk->btgrnc", q, k) * scale
    logits = jnp.where(seen[:, :, :, None, :, None], logits, -jnp.inf)
    total = jax.nn.logsumexp(logits, axis=(-1, -2), keepdims=True)
    weights = jnp.where(jnp.isneginf(total), 0.0, jnp.exp(logits - jnp.where(jnp.isneginf(total), 0.0, total)))
    return jnp.einsum("btgrnc,bncgv->btgrv", weights, v), total[..., 0, 0]


@pytest.mark.parametrize("length", [1, 50, 200])
def test_routed_is_dense(length):
    """Outputs, logsumexps and gradients; queries with no block, and a block that nobody chose.

    Seen to fail: a tile that is taken for the next block's; results of a query's blocks that do not merge; a tile too
    few; gradients of a block's keys from its last tile only, or without what the logsumexp passes on.
    """
    rng = np.random.default_rng(0)
    batch, groups, repeats, blocks, size, count = 2, 2, 3, 5, 8, 3
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    q, k = draw(batch, length, groups, repeats, 4), draw(batch, blocks, size, groups, 4)
    v = draw(batch, blocks, size, groups, 6)
    chosen = np.argsort(rng.random((batch, length, groups, blocks - 1)), axis=-1)[..., :count]
    chosen = np.where(rng.random(chosen.shape) < 0.2, -1, chosen)
    chosen[0, 0] = -1
    cotangents = draw(batch, length, groups, repeats, 6), draw(batch, length, groups, repeats)

    def run(attend):
        def loss(q, k, v):
            out, total = attend(q, k, v, jnp.asarray(chosen), 0.5)
            seen = jnp.isfinite(total)
            return jnp.vdot(out, cotangents[0]) + jnp.vdot(jnp.where(seen, total, 0), cotangents[1]), (out, total)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    ((_, found), gradients), ((_, expected), expected_gradients) = run(routed.attend), run(dense)
    for a, b in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert np.isneginf(found[1][0, 0]).all()
    assert (found[0][0, 0] == 0).all()
