"""The platform that a program is traced for: that of the ambient mesh's devices, which need not be this machine's."""

from __future__ import annotations

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what the devices of `jax.set_mesh` are; without a mesh, JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
