"""Which mesh axis splits which dimension: one table, read for parameters and for activations.

Parameters are split over `data` and `context` together (fully sharded data parallelism: each device keeps a part, and
`gathered` brings the rest together for the layer that needs it) and over `model` (tensor parallelism). Activations are
split by batch, time and heads; their width is whole on every device.

A layer names its parameters' dimensions, `nnx.Param(value, axes=("embed", "mlp"))`, and may name those of an
activation, `constrain(x, ("batch", "time", "width"))`; neither names a mesh axis.
"""

from __future__ import annotations

import functools
import logging

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

RULES = {
    "batch": ("data",),  # B
    "time": ("context",),  # T
    "slots": ("context",),  # N of a cache that devices share
    "embed": ("context", "data"),  # D of a parameter; in this order it is gathered backwards
    "width": (),  # D of an activation
    "heads": ("model",),  # H or G, and a projection's H * K
    "mlp": ("model",),  # F
    "vocab": ("model",),
    "head": (),  # K or V
    "taps": (),  # W of a convolution
    "rank": (),  # of a low-rank projection
    "block": (),  # of a block-diagonal matrix: its inputs
    "block_out": (),  # and its outputs
    "layers": (),  # L, in front of the parameters of a scanned stack
}

_log = logging.getLogger(__name__)


def spec(axes, shape, sizes, name: str | None = None) -> PartitionSpec:
    """How a mesh splits an array of `shape` whose dimensions have the logical names `axes`.

    A mesh axis that does not divide its dimension, or that an earlier dimension already uses, is left out: the
    array is whole along it.

    Args:
      axes: a name of `RULES`, or None, for each dimension. One name fewer than dimensions means a scanned stack,
        whose first dimension counts layers.
      shape: of the array.
      sizes: devices by mesh axis, a mesh's `shape`.
      name: of the array; with it, an axis left out is logged once.

    Raises:
      ValueError: `axes` does not fit the shape, or has an unknown name.
    """
    what = name or "an array"
    if len(axes) == len(shape) - 1:
        axes = ("layers", *axes)
    if len(axes) != len(shape):
        raise ValueError(f"{what} of shape {tuple(shape)} has the axes {tuple(axes)}; name each dimension once.")
    used: set[str] = set()
    entries = []
    for axis, dimension in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"{what} has an axis '{axis}'; choose among {', '.join(RULES)}, or None.")
        chosen: list[str] = []
        parts = 1
        for mesh_axis in RULES[axis] if axis else ():
            size = sizes.get(mesh_axis, 1)
            if size == 1 or mesh_axis in used:
                continue
            if dimension % (parts * size):
                if name is not None:
                    _note_whole(name, axis, dimension, mesh_axis, size)
                continue
            parts *= size
            chosen.append(mesh_axis)
        used.update(chosen)
        entries.append(tuple(chosen) if len(chosen) > 1 else (chosen or [None])[0])
    return PartitionSpec(*entries)


def shardings(mesh: jax.sharding.Mesh, state: nnx.State) -> nnx.State:
    """A `NamedSharding` per parameter, from the `axes` that each `nnx.Param` was given.

    Args:
      mesh: from `longctx.parallel.mesh.make`.
      state: what `nnx.split(model, nnx.Param)` gives, of arrays or of shapes. A parameter without `axes` is whole
        on every device.

    Returns:
      `state` with a sharding in place of each array; `nnx.as_pure` of it fits `nnx.as_pure` of `state`.
    """

    def place(path, variable):
        shape = variable.get_value().shape
        axes = variable.get_metadata().get("axes") or (None,) * len(shape)
        return variable.replace(NamedSharding(mesh, spec(axes, shape, mesh.shape, jax.tree_util.keystr(path))))

    return jax.tree_util.tree_map_with_path(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def constrain(x: jax.Array, axes) -> jax.Array:
    """`x` split as `RULES` say for its dimensions' names; `x` itself without an ambient mesh.

    Inside a `jax.shard_map` the axes already split by hand are left out.
    """
    sizes = _left_to_the_compiler()
    if not sizes:
        return x
    if len(axes) != x.ndim:
        raise ValueError(f"an activation of shape {x.shape} has the axes {tuple(axes)}; name each dimension once.")
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, sizes))


def gathered(x: jax.Array, axes) -> jax.Array:
    """A parameter of those `axes`, whole along `data` and `context`; `x` itself without an ambient mesh.

    The parts come together over one mesh axis after the other, and the sum of the gradient is scattered over one of
    them before it is taken over the other: s numbers are sent each way. Left to itself the compiler may take either in
    one sum over all devices, of 2 s: XLA:TPU does wherever they fill three axes of a torus. Compiled for a v5p it
    also left sums whole whose parts would have fewer than 256 columns: a weight whose columns are split is transposed.
    """
    transposed = axes[-1] == "embed" != axes[0]
    axes, shape = (axes[::-1], x.shape[::-1]) if transposed else (axes, x.shape)
    sizes = _left_to_the_compiler()
    specs = [spec(axes, shape, sizes)]
    for axis in reversed(RULES["embed"]):
        smaller = spec(axes, shape, sizes := sizes | {axis: 1})
        specs += [smaller] if smaller != specs[-1] else []
    if len(specs) == 1:
        return x
    return _in_turn(x.T, tuple(specs)).T if transposed else _in_turn(x, tuple(specs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _in_turn(x, specs):
    """`x`, split as the first of `specs` says, and then as each of the others."""
    for each in specs[1:]:
        x = jax.lax.with_sharding_constraint(x, each)
    return x


# The transpose of the last step would ask for the gradient's sum on every device first; it begins with the one before.
_in_turn.defvjp(lambda x, specs: (_in_turn(x, specs), None), lambda specs, _, g: (_in_turn(g, (None, *specs[-2::-1])),))


def _left_to_the_compiler() -> dict[str, int]:
    """Devices along the ambient mesh's axes, of those that have several and that no `jax.shard_map` splits by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {axis: size for axis, size in mesh.shape.items() if kinds[axis] == AxisType.Auto and size > 1}


@functools.cache
def _note_whole(name, axis, dimension, mesh_axis, size):
    _log.warning(
        "%s: %s=%d is not a multiple of the %d devices along '%s'; each of them holds it whole.",
        name, axis, dimension, size, mesh_axis,
    )  # fmt: skip
