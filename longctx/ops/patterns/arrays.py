"""Arithmetic on positions: numpy's where they are known while tracing, jax's where they are not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def known(*arrays) -> bool:
    """Whether none of them is an array of jax."""
    return not any(isinstance(x, jax.Array) for x in arrays)


def larger(x, y):
    """The larger of two, elementwise."""
    return np.maximum(x, y) if known(x, y) else jnp.maximum(x, y)


def smaller(x, y):
    """The smaller of two, elementwise."""
    return np.minimum(x, y) if known(x, y) else jnp.minimum(x, y)


def take(table: np.ndarray, *index):
    """`table[index]`."""
    return table[index] if known(*index) else jnp.asarray(table)[index]
