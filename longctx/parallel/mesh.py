"""The device mesh: `data` splits the batch, `context` the sequence, `model` the heads and hidden widths.

Everything outside the `jax.shard_map` islands of `longctx.parallel.sequence` is `jax.jit` with shardings, so the
axes are of type Auto. Code that needs the mesh reads the ambient one, which `jax.set_mesh(mesh)` sets.
"""

from __future__ import annotations

import logging
import math
import types
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from longctx import config
from longctx.errors import UsageError

AXES = ("data", "context", "model")

_log = logging.getLogger(__name__)


def make(
    sizes: config.Mesh,
    devices: Sequence[jax.Device] | None = None,
    shared: Mapping[str, int] = types.MappingProxyType({}),
) -> jax.sharding.Mesh:
    """The mesh over `devices`, with axes ("data", "context", "model").

    Args:
      sizes: devices along each axis; -1 takes what the others leave, or the most of it that divides what is `shared`. A
        product smaller than the number of devices uses the first ones, which only a single process may do.
      devices: the devices; all of them by default.
      shared: by axis, the number of things that its devices have to share equally, such as rows along "data".

    Raises:
      UsageError: the sizes do not fit the devices, or not the torus that their links make.

    On a torus an axis takes whole sides where it can, which are rings. Where no sides have its size it takes parts of
    them, which are lines: what goes around goes back over the same links.
    """
    devices = jax.devices() if devices is None else list(devices)
    given = {name: getattr(sizes, name) for name in AXES}
    fixed = math.prod(size for size in given.values() if size != -1)
    shape = tuple(len(devices) // fixed if size == -1 else size for size in given.values())
    what = f"mesh {', '.join(f'{name}={size}' for name, size in given.items())}"
    if -1 in given.values() and math.prod(shape) != len(devices):
        raise UsageError(
            f"{what} leaves no whole number of devices for the open axis: there are {len(devices)} and the other "
            f"axes take {fixed}; choose sizes whose product divides {len(devices)}."
        )
    shape = tuple(
        size if given[name] != -1 else next(n for n in range(size, 0, -1) if shared.get(name, 0) % n == 0)
        for name, size in zip(AXES, shape, strict=True)
    )
    used = math.prod(shape)
    if used > len(devices):
        raise UsageError(f"{what} needs {used} devices and there are {len(devices)}; make an axis smaller, or -1.")
    if used < len(devices) and jax.process_count() > 1:
        raise UsageError(
            f"{what} uses {used} of {len(devices)} devices, and with several processes all must be used; make an axis "
            "larger, and in training.stages batches multiples of mesh.data and lengths multiples of mesh.context."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices[:used])
    except (NotImplementedError, AssertionError):  # the torus has no such rings, or these devices are no torus
        coordinates = zip(*(device.coords for device in devices[:used]), strict=True)
        torus = f"a torus of {'x'.join(str(len(set(along))) for along in coordinates)} chips"
    try:
        grid = mesh_utils.create_device_mesh(shape, devices[:used], allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError) as error:
        raise UsageError(
            f"{what} cannot be laid over {torus}; give axes whose sizes divide products of its sides."
        ) from error
    _log.warning("%s takes parts of the sides of %s: some of its axes are lines, not rings.", what, torus)
    return jax.sharding.Mesh(grid, AXES, axis_types=kinds)


def size(axis: str) -> int:
    """Devices along `axis` of the ambient mesh; 1 without a mesh or without that axis."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def context_size() -> int:
    """Devices that share one sequence under the ambient mesh."""
    return size("context")
