"""One shard's softmax attention under any pattern, inside a `jax.shard_map` over contiguous shards of the sequence.

A pattern is taken apart as on one device, and each part moves no more keys than it must; partial results merge.

| part of the pattern          | moves                                                                     |
|------------------------------|---------------------------------------------------------------------------|
| of bounded reach             | the last `reach` keys before the shard: a halo; of these only what is seen |
| ... with anchors             | also these, by a prefix scan                                              |
| at multiples of a stride     | each token once, to the device that has all tokens of its residue         |
| of unbounded reach, few seen | the keys that are seen, gathered                                          |
| ... seen by scattered blocks | the blocks that the shard's queries see, in rounds                        |
| of unbounded reach           | by a model of costs (`parallel/schemes.py`), or as the caller names it:    |
| ... "ring"                   | all keys, round a ring (`parallel/ring.py`)                               |
| ... "heads"                  | queries, keys and values, so that each device has all tokens of some of   |
|                              | the heads (`parallel/ulysses.py`)                                         |
| ... "both"                   | the latter among neighbours, and their keys round a ring                  |
| ... "gather"                 | all keys, to all devices                                                  |
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from longctx.ops import attention as ops
from longctx.ops.partial import Partial, add_sinks, merge
from longctx.ops.patterns import Heads, Keys, Pattern, Range, terms
from longctx.parallel import fetch, gather, halo, ring, schemes, ulysses
from longctx.parallel.all_to_all import all_to_all
from longctx.typing import Segments


def attention(
    queries: ops.Queries,
    keys: ops.Keys,
    parameters: ops.Parameters,
    segments: Segments,
    options: ops.Options,
    axis_name: str,
) -> Float[Array, "B T H V"]:
    """Attention of this shard's queries to the keys of all shards that a pattern lets them see.

    Args:
      queries, keys, parameters, options: as of `longctx.ops.attention.ATTENTION`, this device's shards; sums of log
        decays are counted from the start of documents.
      segments: of this shard's tokens; ids and positions are those of the whole rows.
      axis_name: the mesh axis.

    Raises:
      ValueError: a pattern looks ahead; the devices cannot share the heads as `context_parallel` says.
      NotImplementedError: an implementation other than "blockwise" is named where partial results are taken.
    """
    parts, (v, decay), sinks = ops.Part.all(queries, keys, options), keys[1:], ops.sinks(queries, parameters)
    if isinstance(parts[0].pattern, Heads):

        def call(q, k, v, pattern, bias, decay, sinks):
            besides, logits = (sinks, None) if isinstance(sinks, Partial) else (None, sinks)
            own = dataclasses.replace(options, pattern=pattern)
            inputs = ops.Queries(q, decay, besides), ops.Keys(k, v, decay), ops.Parameters(logits, bias)
            return attention(*inputs, segments, own, axis_name)

        q, k, heads = parts[0]
        return ops.by_head(call, heads, q, k, v, parameters.bias, decay=decay, sinks=sinks)
    for part in parts:
        if part.pattern.ahead != 0:
            raise ValueError(
                f"{part.pattern} lets a query see keys after it, and shards of a sequence only look back; "
                "combine it with Causal(), or set mesh.context to 1."
            )
    parts = [part._replace(pattern=term) for part in parts for term in terms(part.pattern)]
    added = {"bias": parameters.bias, "scale": options.scale, "soft_cap": options.soft_cap, "block": options.block}
    implementation = options.implementation
    if len(parts) == 1 and parts[0].pattern.reach is not None:
        q, k, pattern = parts[0]
        near = _keys_near(k, v, decay, segments, pattern, axis_name)
        neighbours = not pattern.anchors and pattern.seen(np.zeros(1, int)) is None
        before = near[0].shape[1] - q.shape[1] if neighbours else None
        added |= {"sinks": sinks, "implementation": implementation, "before": before}
        return _attend(ops.attention, q, decay, segments, near, pattern, **added)
    if implementation not in (None, "blockwise"):
        raise NotImplementedError(
            f"implementation '{implementation}' gives no partial results, which {parts[0].pattern} needs when several "
            "devices share the sequence; leave it None, or choose 'blockwise'."
        )
    scheme = options.context_parallel
    results = (_part(q, k, v, decay, segments, pattern, axis_name, scheme, **added) for q, k, pattern in parts)
    result = functools.reduce(merge, results)
    result = result if sinks is None else add_sinks(result, sinks)
    return result.output.astype(v.dtype)


def _part(
    q, k, v, decay, segments: Segments, pattern: Pattern, axis_name: str, context_parallel: str, **options
) -> Partial:
    """One part of a pattern that was taken apart."""
    devices = jax.lax.axis_size(axis_name)
    if pattern.reach is not None:
        keys = _keys_near(k, v, decay, segments, pattern, axis_name)
    elif pattern.seen(np.zeros(1, int)) is not None:
        keys = _keys_seen(k, v, decay, segments, pattern, axis_name)
    elif pattern.scattered:
        keys = _keys_scattered(k, v, decay, segments, pattern, axis_name)
    elif pattern.stride % devices == 0 and q.shape[1] % pattern.stride == 0:
        return _by_residue(q, k, v, decay, segments, pattern, axis_name, **options)
    else:
        return _everywhere(q, k, v, decay, segments, pattern, axis_name, context_parallel, **options)
    return _attend(ops.attention_partial, q, decay, segments, keys, pattern, **options)


def _everywhere(
    q, k, v, decay, segments: Segments, pattern: Pattern, axis_name: str, context_parallel: str, **options
) -> Partial:
    """One part of which a query may see any key before it."""
    scheme = schemes.choose(schemes.Case.of(q, k, v, pattern, axis_name), context_parallel)
    options |= {"decay": decay, "balanced": scheme.balanced}
    if scheme.among > 1:
        return ulysses.attention(q, k, v, pattern, segments, axis_name, among=scheme.among, **options)
    op = gather if scheme.name == "gather" else ring
    return op.attention(q, k, v, pattern, segments, axis_name, **options)


def _attend(op, q, decay, segments, keys, pattern, **options):
    *keys, key_decay, held = keys
    if decay is not None:
        options |= {"decay": decay, "key_decay": key_decay}
    return op(q, *keys, pattern, segments, held, **options)


def _keys_near(k, v, decay, segments: Segments, pattern: Pattern, axis_name: str):
    """Keys, values, decays and segments of the shard's own tokens, of the last ones before it, and of the anchors."""
    length = k.shape[1]
    own = (k, v, decay, segments)
    reach = min(pattern.reach, (jax.lax.axis_size(axis_name) - 1) * length)
    if reach and pattern.seen(np.zeros(1, int)) is not None:
        seen = _seen(own, min(reach, length), pattern, axis_name)
        before = halo.last(seen, -(-reach // length) * seen[0].shape[1], axis_name)
    else:
        before = halo.last(own, reach, axis_name)
    parts = [before, own]
    if pattern.anchors:
        # Those among the last tokens before the shard would count twice, as in `Dilated(24, 3) | Sinks(3)`.
        twice = Keys(pattern.anchors).seen(before[3].positions)
        held = dataclasses.replace(before[3], ids=jnp.where(twice, 0, before[3].ids))
        anchors = halo.anchors(own, segments, pattern.anchors, axis_name)
        parts = [anchors, (*before[:3], held), own]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def _keys_seen(k, v, decay, segments: Segments, pattern: Pattern, axis_name: str):
    """The same of the shard's own tokens, and of all before it that are seen."""
    own = (k, v, decay, segments)
    seen = _seen(own, k.shape[1], pattern, axis_name)
    gathered = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, axis=1, tiled=True), seen)
    shard = jnp.arange(gathered[0].shape[1]) // seen[0].shape[1]
    earlier = shard < jax.lax.axis_index(axis_name)
    gathered = *gathered[:3], dataclasses.replace(gathered[3], ids=jnp.where(earlier, gathered[3].ids, 0))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), gathered, own)


def _keys_scattered(k, v, decay, segments: Segments, pattern: Pattern, axis_name: str):
    """The same of the shard's own tokens, and of the blocks before it that any of its queries sees.

    Before the shard, its queries see only the document in progress where it begins: of that the places are known.
    """
    length, size = k.shape[1], pattern.scattered
    devices, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    blocks = -(-length // size)  # of a shard
    ongoing = segments.valid & (segments.runs == 0)
    entry = jnp.argmax(ongoing, axis=1)[:, None]
    document, position = (jnp.take_along_axis(x, entry, axis=1) for x in (segments.ids, segments.positions))
    start = device * length + entry - position  # its first token

    def cut(x, rest=0):
        x = jnp.pad(x, ((0, 0), (0, blocks * size - length), *((0, 0),) * (x.ndim - 2)), constant_values=rest)
        return x.reshape(x.shape[0], blocks, size, *x.shape[2:])

    limit = np.iinfo(np.int32).max // 2
    queries = Range(
        cut(jnp.where(ongoing, segments.positions, limit), limit).min(2)[:, :, None],
        cut(jnp.where(ongoing, segments.positions, -1), -1).max(2)[:, :, None],
    )
    number = jnp.arange(devices * blocks)
    place = np.arange(size)
    places = number[:, None] // blocks * length + jnp.minimum(number[:, None] % blocks * size + place, length - 1)
    keys = Range(jnp.maximum(places[:, 0] - start, 0)[:, None], (places[:, -1] - start)[:, None])
    wanted = pattern.touches(queries, keys) & (queries.first <= queries.last) & (keys.first <= keys.last)
    wanted = wanted.any(1) & (number // blocks < device)

    own = (k, v, decay)
    blocks_of_one = jax.tree.map(lambda x: cut(x)[:, :, :, None], own)
    found = fetch.blocks(blocks_of_one, jnp.where(wanted, number, -1)[:, None, None], axis_name)
    found = jax.tree.map(lambda x, like: x.reshape(x.shape[0], -1, *like.shape[2:]), found, own)
    # The last block of a shard may be shorter; its last token would count twice.
    inside = (number[:, None] % blocks * size + place < length) & (places >= start[..., None])
    ids = jnp.where(wanted[..., None] & inside, document[..., None], 0).reshape(len(k), -1)
    positions = jnp.maximum(places - start[..., None], 0).reshape(len(k), -1)
    held = Segments(ids, positions, jnp.zeros(ids.shape, bool))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), (*found, held), (*own, segments))


def _seen(own, count: int, pattern: Pattern, axis_name: str):
    """Of the last `count` tokens of a shard, those that later shards may see, and padding where there can be more.

    They are of the shard's last document, and seen by the pattern. `own`: arrays by token, and last their segments.
    """
    segments = own[-1]
    # How many of `count` neighbouring tokens can be seen, wherever they stand.
    sums = np.pad(np.cumsum(pattern.seen(np.arange(jax.lax.axis_size(axis_name) * segments.ids.shape[1]))), (1, 0))
    most = max(1, int((sums[count:] - sums[: len(sums) - count]).max()))
    chosen = segments.valid & (segments.runs == segments.runs[:, -1:]) & pattern.seen(segments.positions)
    own, chosen = jax.tree.map(lambda x: x[:, x.shape[1] - count :], (own, chosen))
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :most]
    held = dataclasses.replace(own[-1], ids=jnp.where(chosen, own[-1].ids, 0))

    def take(x):
        return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(take, (*own[:-1], held))


def _by_residue(q, k, v, decay, segments: Segments, pattern: Pattern, axis_name: str, **options) -> Partial:
    """Each device attends among all tokens of the row whose places have residues of its own, one row for each.

    A document is contiguous, so that places have the same distances as positions.
    """
    stride, devices, (batch, length) = pattern.stride, jax.lax.axis_size(axis_name), q.shape[:2]

    def out(x):
        x = jnp.moveaxis(x.reshape(batch, -1, devices, stride // devices, *x.shape[2:]), 2, 0)
        x = all_to_all(x, axis_name)  # [shard, batch, tokens, residue, ...]
        return jnp.moveaxis(x, (0, 3), (2, 1)).reshape(batch * stride // devices, -1, *x.shape[4:])

    def home(x):
        x = x.reshape(batch, stride // devices, devices, -1, *x.shape[2:])
        x = all_to_all(jnp.moveaxis(x, (2, 1), (0, 3)), axis_name)  # [residues, batch, tokens, residue, ...]
        return jnp.moveaxis(x, 0, 2).reshape(batch, length, *x.shape[4:])

    q, k, v, decay, segments = jax.tree.map(out, (q, k, v, decay, segments))
    # Segments on both sides: neighbours in these rows are `stride` apart, not the next tokens of their document.
    partial = ops.attention_partial(q, k, v, pattern.inside, segments, segments, decay=decay, **options)
    return jax.tree.map(home, partial)
