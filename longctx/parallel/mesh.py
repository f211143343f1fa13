"""The device mesh: `data` splits the batch, `context` the sequence, `model` the heads and hidden widths.

Everything outside the `jax.shard_map` islands of `longctx.parallel.sequence` is `jax.jit` with shardings, so the
axes are of type Auto. Code that needs the mesh reads the ambient one, which `jax.set_mesh(mesh)` sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType

from longctx import config
from longctx.errors import UsageError

AXES = ("data", "context", "model")


def make(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices`, with axes ("data", "context", "model").

    Args:
      sizes: devices along each axis; -1 takes what the others leave. Without a -1, a product smaller than the
        number of devices uses the first ones, which only a single process may do.
      devices: the devices; all of them by default.

    Raises:
      UsageError: the sizes do not fit the devices, or not the torus that their links make.
    """
    devices = jax.devices() if devices is None else list(devices)
    given = {name: getattr(sizes, name) for name in AXES}
    fixed = math.prod(size for size in given.values() if size != -1)
    shape = tuple(len(devices) // fixed if size == -1 else size for size in given.values())
    used = math.prod(shape)
    what = f"mesh {', '.join(f'{name}={size}' for name, size in given.items())}"
    if -1 in given.values() and used != len(devices):
        raise UsageError(
            f"{what} leaves no whole number of devices for the open axis: there are {len(devices)} and the other "
            f"axes take {fixed}; choose sizes whose product divides {len(devices)}."
        )
    if used > len(devices):
        raise UsageError(f"{what} needs {used} devices and there are {len(devices)}; make an axis smaller, or -1.")
    if used < len(devices) and jax.process_count() > 1:
        raise UsageError(
            f"{what} uses {used} of {len(devices)} devices, and with several processes all must be used; "
            "make an axis larger, or -1."
        )
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:used])
    except NotImplementedError as error:  # the torus has no such rings
        coordinates = zip(*(device.coords for device in devices[:used]), strict=True)
        sides = "x".join(str(len(set(along))) for along in coordinates)
        raise UsageError(
            f"{what} cannot be laid over a torus of {sides} chips; give axes whose sizes are products of its sides."
        ) from error


def size(axis: str) -> int:
    """Devices along `axis` of the ambient mesh; 1 without a mesh or without that axis."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def context_size() -> int:
    """Devices that share one sequence under the ambient mesh."""
    return size("context")
