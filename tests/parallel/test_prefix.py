"""The prefix scan and the halo against their definitions on the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longctx import config
from longctx.parallel import halo, mesh, prefix


def compose(first, then):
    """x ↦ A x + b on matrices: associative, not commutative."""
    return then[0] @ first[0], then[0] @ first[1] + then[1]


def on_shards(f):
    """`f` on contiguous shards of the first dimension, by hand along `context` alone."""
    return jax.shard_map(f, in_specs=P("context"), out_specs=P("context"), axis_names={"context"}, check_vma=False)


def ambient(devices):
    return jax.set_mesh(mesh.make(config.Mesh(data=1, context=devices)))


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 7, 8])
def test_exclusive_prefix(devices):
    """Fails if the composition order is swapped, a hop is left out, or a device without sender composes zeros.

    Float32, 1e-5 of products of at most 7 matrices of norm about 1.
    """
    keys = jax.random.split(jax.random.key(devices), 3)
    a = jax.random.normal(keys[0], (devices, 3, 3)) / jnp.sqrt(3)
    b = jax.random.normal(keys[1], (devices, 3, 2))
    weights = tuple(jax.random.normal(key, x.shape) for key, x in zip(jax.random.split(keys[2]), (a, b), strict=True))

    def defined(a, b):
        before = [(jnp.zeros_like(a[0]), jnp.zeros_like(b[0]))]
        for i in range(1, devices):
            before.append((a[0], b[0]) if i == 1 else compose(before[-1], (a[i - 1], b[i - 1])))
        return tuple(jnp.stack(x) for x in zip(*before, strict=True))

    def value_and_gradient(f):
        def loss(a, b):
            out = f(a, b)
            return sum(jnp.sum(w * x) for w, x in zip(weights, out, strict=True)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(a, b)

    expected = value_and_gradient(defined)
    with ambient(devices):
        sharded = value_and_gradient(
            on_shards(lambda a, b: jax.tree.map(lambda x: x[None], prefix.exclusive(compose, (a[0], b[0]), "context")))
        )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5), sharded, expected)


def test_hops_are_logarithmic():
    with ambient(8):
        scan = on_shards(lambda x: prefix.exclusive(lambda a, b: a + b, x, "context"))
        assert str(jax.make_jaxpr(scan)(jnp.ones(8))).count("ppermute[") == 3


@pytest.mark.parametrize("n", [0, 2, 3, 4, 9, 30])
def test_halo(n):
    """Shards of 3 tokens on 4 devices: within one shard, exactly one, several, and beyond the sequence's start.

    Fails if the pieces are joined in the wrong order or the missing front is not zero. Exact; gradients 1e-6.
    """
    devices, length = 4, 3
    x = jax.random.normal(jax.random.key(n), (2, devices * length))
    weights = jax.random.normal(jax.random.key(n + 1), (devices, 2, n))

    def defined(x):
        padded = jnp.pad(x, ((0, 0), (n, 0)))
        return jnp.stack([padded[:, i * length : i * length + n] for i in range(devices)])

    def sharded(x):
        def island(shard):
            return halo.last(shard.T, n, "context")[None]

        return on_shards(island)(x.T)

    def value_and_gradient(f):
        return jax.jit(jax.grad(lambda x: (jnp.sum(weights * f(x)), f(x)), has_aux=True))(x)

    gradient, expected = value_and_gradient(defined)
    with ambient(devices):
        got_gradient, got = value_and_gradient(sharded)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(got_gradient, gradient, atol=1e-6)
