"""Matrix products in full float32, and the inverse of a unit triangular matrix by them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def unit_inverse(n):
    """(I + N)^-1 for strictly lower triangular N [..., C, C], C a power of two.

    The two halves of the rows are inverted, and what stands below the first's inverse A is -B N' A, with B that of the
    second and N' the quarter of N between them. Eight rows are inverted by powers, (I - N)(I + N^2)(I + N^4). Powers
    of all C rows would not do: where keys repeat they grow like binomial coefficients, far beyond the inverse itself.
    """
    size = n.shape[-1]
    if size <= 8:
        square, one = matmul(n, n), jnp.eye(size)
        return matmul(matmul(one - n, one + square), one + matmul(square, square))
    half = size // 2
    blocks = jnp.concatenate([n[..., :half, :half], n[..., half:, half:]])
    first, second = jnp.split(unit_inverse(blocks), 2)
    below = -matmul(matmul(second, n[..., half:, :half]), first)
    return jnp.block([[first, jnp.zeros_like(below)], [below, second]])


@unit_inverse.defjvp
def _unit_inverse_jvp(primals, tangents):
    inverse = unit_inverse(*primals)
    return inverse, -matmul(matmul(inverse, tangents[0]), inverse)
