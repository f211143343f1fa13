"""How well fast weights are written: whether keys collide, and how many directions the writes use.

A sum of outer products keeps its values apart only as far as its keys are orthogonal, and it holds no more directions
than its rank. Both are measured on the keys and the writes of a mini-batch, outside of any layer and of training.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def key_collision(keys: Float[Array, "... C F"], others: Float[Array, "... S F"] | None = None) -> Float[Array, "..."]:
    """The mean |cosine| between keys: 0 if all are orthogonal, 1 if all are parallel.

    Args:
      keys: of one mini-batch, any dtype; a key of zeros collides with none.
      others: of another mini-batch; every key is compared with every one of them. None: the keys among themselves,
        each pair of two different ones (at least two keys).

    Returns:
      float32, one number per mini-batch.
    """
    cosines = jnp.abs(jnp.einsum("...cf,...sf->...cs", _unit(keys), _unit(keys if others is None else others)))
    if others is not None:
        return jnp.mean(cosines, axis=(-2, -1))
    count = keys.shape[-2]
    return jnp.sum(jnp.where(jnp.eye(count, dtype=bool), 0, cosines), axis=(-2, -1)) / (count * (count - 1))


def effective_rank(writes: Float[Array, "... F D"]) -> Float[Array, "..."]:
    """exp of the entropy of the singular values, divided by their sum: the rank, if they are all equal or zero.

    Reference: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", 2007.

    Args:
      writes: matrices, such as what a mini-batch adds to the weights, any dtype.

    Returns:
      float32, 1 to min(F, D); 0 for a matrix of zeros.
    """
    values = jnp.linalg.svd(writes.astype(jnp.float32), compute_uv=False)
    total = jnp.sum(values, axis=-1)
    shares = values / jnp.where(total > 0, total, 1)[..., None]
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0), axis=-1)
    return jnp.where(total > 0, jnp.exp(entropy), 0)


def _unit(keys):
    keys = keys.astype(jnp.float32)
    norm = jnp.linalg.norm(keys, axis=-1, keepdims=True)
    return keys / jnp.where(norm > 0, norm, 1)
