"""What layers call: the ops on a span that the ambient mesh may split along its time.

Under a mesh (`jax.set_mesh`) whose `context` axis has several devices, each op runs as a `jax.shard_map` island over
that axis, on contiguous shards of the span; the axes `data` and `model` stay with the compiler. Otherwise, and for a
span of fewer tokens than devices (a decoding step), it is the plain op, the same on every device along `context`.
Islands of softmax attention are over `data` and `model` as well, where these divide rows and heads: fused kernels run
in them, which the compiler cannot split.

What a device must know of those before it, and the bytes it sends for that:

| op                           | moves                                         | bytes a device sends            |
|------------------------------|-----------------------------------------------|---------------------------------|
| recurrence, convolution      | transitions, by an exclusive prefix scan      | ⌈log₂ devices⌉ transitions      |
| ... of large matrices        | the state, in blocks, from device to device   | one state                       |
| ... of In-Place TTT, briefly | the tokens, where they are fewer numbers      | those of its tokens             |
| recurrence, not associative  | the state, device after device in turn        | devices - 1 states              |
| attention of bounded reach   | the last keys and values, by a halo exchange  | those of `reach` tokens         |
| ... with n anchors           | also these of the document, by a scan         | those of ⌈log₂ devices⌉ n       |
| ... to scattered blocks      | those that are visible, in rounds             | those of these                  |
| attention of unbounded reach | as the cheapest scheme does                   | `parallel/schemes.py` says      |
| ... balanced, in a ring      | half of queries, keys, values and results     | those of T / 2 tokens           |
| ... in a ring                | all keys and values                           | those of (devices - 1) T tokens |
| ... by heads                 | queries, keys, values, and results home       | those of T tokens               |
| ... gathered                 | all keys and values, to all                   | those of (devices - 1) T tokens |
| CoPE                         | the same                                      | those of T tokens               |
| a coarser row, and back      | what the last groups give, by a halo          | those of 2 groups               |
| PaTH attention               | the same, and each shard's product            | those of T tokens               |
| attention within buckets     | the same, and the numbers of the buckets      | those of T tokens               |
| attention to chosen blocks   | summaries of all blocks, and the chosen ones  | those of these                  |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from longctx.ops import resolution
from longctx.ops.family import Attending, Keyed, Recurrence, Result
from longctx.parallel import halo, mesh, prefix, tree
from longctx.parallel.shards import Shards
from longctx.typing import Segments

_WHOLE, _SHARD = PartitionSpec(), PartitionSpec(None, "context")


def run(
    family: Recurrence,
    inputs: tuple,
    parameters: tuple = (),
    state: Any = None,
    *,
    segments: Segments | None,
    options: Any = None,
) -> tuple[Array, Any]:
    """A family of recurrences on a span.

    Where the states of the family do not compose, devices take turns: each waits for the state that the one before it
    leaves, so that the span takes as long as on one device. Where a shard's tokens are less to send than a transition
    (`gathers`), every device gathers them and runs those before its own. Where the family has `deferred`, each device
    reads its tokens once, before their state is known, and not for the transition first.

    Args:
      family: such as `longctx.ops.gated_delta.GATED_DELTA`.
      inputs: its inputs, `[B, T, ...]`.
      parameters: its parameters, which have neither batch nor time.
      state: before the span; None is the empty state.
      segments: the documents of the span; None is one document, which continues that of the state.
      options: an object of its options; None for their defaults.

    Returns:
      `(y, state)`: the outputs `[B, T, ...]` and the state after the span.

    Raises:
      ValueError: T is not a multiple of the devices along `context`, or the arguments do not fit (`Recurrence`).
    """
    call = family.prepare(inputs, parameters, state, segments, options)
    if not _splits(call.segments.ids.shape[1]):
        return family.run(call)

    def shard(inputs, parameters, state, segments):
        def chunked(state, segments=segments, inputs=inputs):
            return family.chunked(inputs, parameters, state, segments, call.options)

        device, last = jax.lax.axis_index("context"), jax.lax.axis_size("context") - 1
        if family.gathers is not None and family.gathers(inputs):
            y, after = chunked(chunked(state, *_all_before(segments, inputs))[1])
        elif family.deferred is not None:
            transition, outputs = family.deferred(inputs, parameters, segments, call.options)
            entering = prefix.entering(family, transition, state, "context")
            y, after = outputs(entering), family.apply(transition, entering)
        elif family.transition is not None:
            transition = family.transition(inputs, parameters, segments, call.options)
            y, after = chunked(prefix.entering(family, transition, state, "context"))
        else:
            y, after = chunked(_in_turn(lambda state: chunked(state)[1], state, "context"))
        return y, jax.lax.psum(jax.tree.map(lambda x: jnp.where(device == last, x, 0), after), "context")

    island = _island(shard, (_SHARD, _WHOLE, _WHOLE, _SHARD), (_SHARD, _WHOLE))
    return island(call.inputs, _float32(call.parameters), _float32(call.state), call.segments)


def attend(
    family: Keyed,
    queries: tuple,
    keys: tuple,
    parameters: tuple = (),
    *,
    segments: Segments | None,
    key_segments: Segments | None = None,
    options: Any = None,
) -> Result:
    """A family of attentions on a span, whose queries attend to the span's own tokens or to others.

    Args:
      family: such as `longctx.ops.moba.MOBA`.
      queries: its queries, `[B, T, ...]`.
      keys: its keys, `[B, S, ...]`.
      parameters: its parameters, which have neither batch nor time.
      segments: the documents of the span; None is one document.
      key_segments: those of the keys, where a cache holds some of them; None: the keys are the queries' own tokens.
        Devices share the slots of a cache where it is one query that attends to them, the family says so, and they
        divide the slots, which are then expected to be split already.
      options: an object of its options; None for their defaults.

    Raises:
      ValueError: T is not a multiple of the devices along `context`, or the arguments do not fit (`Keyed`).
    """
    call = family.prepare(queries, keys, parameters, segments, key_segments, options)
    (length, slots), devices = (x.ids.shape[1] for x in (call.segments, call.key_segments)), mesh.context_size()
    time = "context" if key_segments is None and _splits(length) else None
    rows, heads = _by_hand(family, call) if key_segments is None else (None, None)
    if axes := {axis for axis in (rows, time, heads) if axis}:

        def shard(queries, keys, parameters, segments):
            own = Attending(queries, keys, parameters, segments, segments, call.options)
            return family.sharded(*own, Shards(time, segments.ids.shape[1])) if time else family.run(own)

        tokens = PartitionSpec(rows, time)
        each, of_heads = (PartitionSpec(rows, time, heads), PartitionSpec(heads)) if heads else (tokens, _WHOLE)
        island = _island(shard, (each, each, of_heads, tokens), each, axes)
        return island(call.queries, call.keys, _float32(call.parameters), call.segments)
    shares = family.shares_slots is not None and family.shares_slots(call.options)
    if key_segments is not None and shares and length == 1 and devices > 1 and slots % devices == 0:

        def share(*arrays):
            return tree.merged(family.partial(*arrays, call.options), "context")

        island = _island(share, (_WHOLE, _SHARD, _WHOLE, _WHOLE, _SHARD), _WHOLE)
        return family.finish(island(*call[:-1]), *call)
    return family.run(call)


def coarsen(x: Float[Array, "B T D"], segments: Segments, factor: int) -> tuple[Float[Array, "B N D"], Segments]:
    """The span at a coarser resolution, as `longctx.ops.resolution.coarsen`; each device has the groups that end on it.

    Raises:
      ValueError: T is not a multiple of the devices along `context`, or a device's share not one of `factor`.
    """
    if not _splits(x.shape[1]):
        return resolution.coarsen(x, segments, factor)
    share = x.shape[1] // mesh.context_size()
    if share % factor:  # else a coarse row would have gaps within documents
        raise ValueError(
            f"each device has {share} tokens of a span, which cannot be cut into groups of {factor}; "
            f"give rows whose share is a multiple of {factor}, or another factor."
        )
    return _island(lambda x, segments: resolution.coarsen(x, segments, factor), (_SHARD, _SHARD), _SHARD)(x, segments)


def refine(u: Float[Array, "B N C D"], last: Float[Array, "B C D"], segments: Segments) -> Float[Array, "B T D"]:
    """What each token reads of the last whole group, as `longctx.ops.resolution.refine`.

    Args:
      u: of each coarse token of `coarsen`.
      last: of the last whole group before the span.
      segments: of the tokens.
    """
    last = jnp.stack([last, last], axis=1)
    if not _splits(segments.ids.shape[1]):
        return resolution.refine(u, last, segments)

    def run(u, segments, last):
        before = jnp.where(jax.lax.axis_index("context") == 0, last, halo.last(u, 2, "context"))
        return resolution.refine(u, before.astype(u.dtype), segments)

    return _island(run, (_SHARD, _SHARD, _WHOLE), _SHARD)(u, segments, _float32(last))


def _splits(length: int) -> bool:
    """Whether the ambient mesh splits a span of `length` tokens."""
    devices = mesh.context_size()
    if devices == 1 or length < devices:
        return False
    if length % devices:
        raise ValueError(
            f"a span of {length} tokens cannot be split evenly over context={devices} devices; pad it to a multiple "
            f"of {devices}, such as {-(-length // devices) * devices}, or change the mesh."
        )
    return True


def _by_hand(family: Keyed, call: Attending) -> tuple[str | None, str | None]:
    """The mesh axes that split rows and heads by hand: those with several devices, which divide them."""
    if family.together is None:
        return None, None
    data, model = mesh.size("data"), mesh.size("model")
    queries, keys = jax.tree.leaves(call.queries), jax.tree.leaves(call.keys)
    each = [x.shape[2] // model for x in queries]  # heads of a device
    divided = all(x.shape[2] % model == 0 for x in queries + keys) and each[0] % family.together(call.options) == 0
    return (
        "data" if data > 1 and queries[0].shape[0] % data == 0 else None,
        "model" if model > 1 and divided else None,
    )


def _island(f: Callable, in_specs: Any, out_specs: Any, axes: set[str] = frozenset({"context"})) -> Callable:
    """`f` on the shards of each device along `axes`, and along axes of one device, since kernels want no axis left."""
    ambient = jax.sharding.get_abstract_mesh()
    alone = [name for name in ambient.auto_axes if ambient.shape[name] == 1 and name not in axes]

    def over(spec):  # also over these axes, or gradients would be summed over them, which is a copy
        first = spec[0] if spec and isinstance(spec[0], tuple) else spec[:1]
        return PartitionSpec(tuple(filter(None, (*first, *alone))), *spec[1:]) if spec and alone else spec

    in_specs, out_specs = jax.tree.map(over, (in_specs, out_specs), is_leaf=lambda x: isinstance(x, PartitionSpec))
    axes = {*axes, *alone}
    # Without the check of varying axes: ops know no mesh, and start their scans from plain zeros. Inside a jit: an
    # island over some of the mesh's axes does not run eagerly.
    island = jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)
    return jax.jit(island, inline=True)


def _float32(tree):
    """For what all shards share, whose gradient is a sum over them: exact, and XLA:CPU aborts on a bfloat16 sum."""

    def promote(x):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(promote, tree)


def _all_before(segments: Segments, inputs: tuple) -> tuple[Segments, tuple]:
    """The tokens of all devices, those of devices before this one as tokens and the others as padding."""
    length = segments.ids.shape[1]
    inputs, whole = jax.tree.map(lambda x: jax.lax.all_gather(x, "context", axis=1, tiled=True), (inputs, segments))
    before = jnp.arange(whole.ids.shape[1]) < jax.lax.axis_index("context") * length
    return Segments(jnp.where(before, whole.ids, 0), whole.positions, whole.starts & before), inputs


def _in_turn(run: Callable, state, axis_name: str):
    """The state that enters each device's span, each having run its span on what the one before it left.

    A device runs its span in its own turn and skips the others. The backward pass runs it again, from the
    state before it.
    """
    device, last = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name) - 1

    def take(number, coming, entering):
        return jax.tree.map(lambda new, old: jnp.where(device == number, new, old), coming, entering)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def turn(carry, number):
        coming, entering = carry
        left = jax.lax.cond(device == number, run, lambda state: state, coming)
        return (prefix.shift(left, 1, axis_name), take(number, coming, entering)), None

    return take(last, *jax.lax.scan(turn, (state, state), jnp.arange(last))[0])
