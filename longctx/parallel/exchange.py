"""All-to-all over a mesh axis, made of permutations.

`jax.lax.all_to_all` inside a `jax.shard_map` over some axes of a mesh gathers what the compiler had split over the
others (seen on XLA:CPU in jax 0.10 to 0.12); permutations leave it split, and send the same number of bytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def all_to_all(x: Shaped[Array, "P ..."], axis_name: str) -> Shaped[Array, "P ..."]:
    """Entry d of the result is what device d had as entry of this device, inside a `jax.shard_map`.

    Args:
      x: an entry for each of the P devices along `axis_name`.
      axis_name: the mesh axis.
    """
    devices, device = x.shape[0], jax.lax.axis_index(axis_name)
    ahead = jnp.take(x, (device + jnp.arange(devices)) % devices, axis=0)  # for the device so many places on
    received = [ahead[0]]
    for hop in range(1, devices):
        pairs = [(i, (i + hop) % devices) for i in range(devices)]
        received.append(jax.lax.ppermute(ahead[hop], axis_name, pairs))
    return jnp.take(jnp.stack(received), (device - jnp.arange(devices)) % devices, axis=0)
