"""All-to-all over a mesh axis or among neighbours along it, made of permutations.

`jax.lax.all_to_all` inside a `jax.shard_map` over some axes of a mesh gathers what the compiler had split over the
others (seen on XLA:CPU in jax 0.10 to 0.12); permutations leave it split, and send the same number of bytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def all_to_all(x: Shaped[Array, "A ..."], axis_name: str) -> Shaped[Array, "A ..."]:
    """Entry n of the result is what the n-th of A neighbours had as entry of this device, inside a `jax.shard_map`.

    Args:
      x: an entry for each of the A neighbours, of whom this device is one; A divides the devices of the axis.
      axis_name: the mesh axis.
    """
    among = x.shape[0]
    mine, places = jax.lax.axis_index(axis_name) % among, jnp.arange(among)
    ahead = jnp.take(x, (mine + places) % among, axis=0)  # for the neighbour so many places on
    received = [ahead[0]]
    for hop in range(1, among):
        pairs = [(i, i - i % among + (i + hop) % among) for i in range(jax.lax.axis_size(axis_name))]
        received.append(jax.lax.ppermute(ahead[hop], axis_name, pairs))
    return jnp.take(jnp.stack(received), (mine - places) % among, axis=0)
