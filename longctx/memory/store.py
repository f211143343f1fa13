"""What a mixer keeps of the tokens it has read: a store of their entries, made by a policy.

A mixer declares what a token leaves behind, one `Leaf` for each array; a policy makes the store that keeps it. A token
has two numbers: its position within the document, which decides what it means to a query, and the slot that its entries
are in, which is the store's own affair. A span is appended as a whole: what it evicts, it has attended to before.

The policy here is the ring: the last S tokens of the document in progress, in the order in which they were written.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from longctx.ops.backend import apart
from longctx.ops.patterns import Keys
from longctx.parallel import rules
from longctx.typing import Segments

_LAST = np.iinfo(np.int32).max
Entries = tuple[Array, ...]  # one array a leaf, [B, T, *shape]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of what a token leaves behind.

    Attributes:
      shape: of a token's entry.
      axes: logical names of its axes.
      dtype: it is kept in.
      exact: whether it is kept as it is by every policy, whatever else is rounded.
      slots: the axis of the entry in front of which slots stand in memory. Attention of one query reads keys
        `[B, G, K, N]` and values `[B, G, N, V]` where they lie; with slots first XLA:CPU copies all at every token.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: jax.typing.DTypeLike
    exact: bool = False
    slots: int = 0


ATTENDED = 2, 1  # `slots` of keys and values where all of them are read by softmax attention


def heads(count: int, width: int, dtype, slots: tuple[int, int] = (0, 0), values: int = 0) -> tuple[Leaf, Leaf]:
    """The keys and the values of `count` heads; `values`: the width of a value, if it is not that of a key."""
    widths = width, values or width
    return tuple(Leaf((count, w), ("heads", "head"), dtype, slots=axis) for w, axis in zip(widths, slots, strict=True))


class View(NamedTuple):
    """Entries that queries may see, `[B, N, *shape]`, and their tokens: id 0 where there is none."""

    entries: Entries
    segments: Segments


class Store(abc.ABC):
    """A pytree in which the first axis of every array is the row of the batch.

    Attributes:
      entries: one array a leaf, as they lie in memory.
      leaves: what a token leaves behind; part of the structure.
    """

    entries: Entries
    leaves: tuple[Leaf, ...]

    @property
    @abc.abstractmethod
    def tokens(self) -> Int[Array, " B"]:
        """How many tokens the document in progress has."""

    @abc.abstractmethod
    def append(self, entries: Entries, segments: Segments) -> Self:
        """The store after a span: its tokens added, padding left out, finished documents forgotten."""

    @abc.abstractmethod
    def read(self) -> View:
        """All slots; the document in progress has id 1."""

    @abc.abstractmethod
    def rewrite(self, entries: Entries) -> Self:
        """The same tokens with other entries, `[B, N, *shape]` as `read` gives them."""


class Policy(Protocol):
    """Which tokens are kept, a frozen dataclass of options."""

    def make(
        self,
        leaves: Sequence[Leaf],
        batch: int,
        capacity: int,
        reach: int | None = None,
        anchors: tuple[int, ...] = (),
        shared: bool = False,
    ) -> Store:
        """An empty store.

        Args:
          leaves: what a token leaves behind.
          batch: B.
          capacity: tokens of a document that there must be room for, if all are visible.
          reach: tokens that a query looks back; None: all.
          anchors: positions, ascending, of tokens that stay visible beyond a reach.
          shared: whether the devices along `context` share the slots, where all tokens are visible.
        """


@dataclasses.dataclass(frozen=True)
class Ring:
    """The last tokens: as many as a query sees, or `capacity`; and the anchors of a bounded reach."""

    def make(self, leaves, batch, capacity, reach=None, anchors=(), shared=False) -> RingStore:
        anchors = () if reach is None else anchors
        slots = (capacity if reach is None else reach + 1) + len(anchors)
        entries = tuple(jnp.zeros(_around(leaf, (batch,), slots), leaf.dtype) for leaf in leaves)
        positions, written = jnp.full((batch, slots), -1, jnp.int32), jnp.zeros(batch, jnp.int32)
        return RingStore(entries, positions, written, tuple(leaves), anchors, shared and reach is None)._placed()


def _around(leaf: Leaf, rows: tuple, slots) -> tuple:
    """The shape of a leaf in memory."""
    return (*rows, *leaf.shape[: leaf.slots], slots, *leaf.shape[leaf.slots :])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingStore(Store):
    """The last S tokens of the document in progress, and its n anchors in slots of their own after them; N = S + n.

    The next token takes the slot of number `written` modulo S. So slots are in the order of positions until the ring
    wraps, whichever tokens it holds.

    Attributes:
      entries: one array a leaf, `[B, *shape]` with N slots in front of the leaf's axis `slots`.
      positions: within the document, of the token in each slot, -1 where empty.
      written: tokens of the document in progress that the ring was given.
      leaves, anchors, shared: as the policy was given them; part of the structure.
    """

    entries: Entries
    positions: Int[Array, "B N"]
    written: Int[Array, " B"]
    leaves: tuple[Leaf, ...] = dataclasses.field(metadata={"static": True})
    anchors: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    shared: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def tokens(self) -> Int[Array, " B"]:
        return self.positions.max(axis=1) + 1

    def append(self, entries: Entries, segments: Segments) -> RingStore:
        """See `Store`. A span of more than S tokens leaves its last S, a longer document overwrites its oldest."""
        batch, slots = self.positions.shape
        size = slots - len(self.anchors)
        started = segments.runs[:, -1:]
        current = segments.valid & (segments.runs == started)
        before = jnp.where(started > 0, 0, self.written[:, None])
        number = before + jnp.cumsum(current, axis=1, dtype=jnp.int32) - 1
        written = number[:, -1:] + 1
        # Out of range: not written.
        slot = jnp.where(current & (number >= written - size), number % size, slots)
        row = jnp.arange(batch)[:, None]
        if self.anchors:
            which = jnp.searchsorted(jnp.array(self.anchors), segments.positions)
            anchor = jnp.where(current & Keys(self.anchors).seen(segments.positions), size + which, slots)

        def write(held, new, axis=0):
            to = (row, *(slice(None),) * axis)
            held = held.at[(*to, slot)].set(new.astype(held.dtype), mode="drop")
            return held.at[(*to, anchor)].set(new.astype(held.dtype), mode="drop") if self.anchors else held

        return dataclasses.replace(
            self,
            entries=tuple(map(write, self.entries, entries, (leaf.slots for leaf in self.leaves))),
            positions=write(jnp.where(started > 0, -1, self.positions), segments.positions),
            written=written[:, 0],
        )._placed()

    def read(self) -> View:
        """See `Store`. An anchor is visible in its own slot, not in the ring's."""
        held = self.positions >= 0
        if self.anchors:
            in_ring = jnp.arange(held.shape[1]) < held.shape[1] - len(self.anchors)
            held &= ~(in_ring & Keys(self.anchors).seen(self.positions))
        entries = (jnp.moveaxis(x, leaf.slots + 1, 1) for x, leaf in zip(self.entries, self.leaves, strict=True))
        positions = jnp.maximum(self.positions, 0)
        return View(tuple(entries), Segments(held.astype(jnp.int32), positions, jnp.zeros_like(held)))

    def rewrite(self, entries: Entries) -> RingStore:
        entries = (jnp.moveaxis(x, 1, leaf.slots + 1) for x, leaf in zip(entries, self.leaves, strict=True))
        return dataclasses.replace(self, entries=tuple(entries))

    def _placed(self) -> RingStore:
        """Slots that devices share are split along `context`, where they divide them."""
        if not self.shared:
            return self
        axes = (_around(dataclasses.replace(leaf, shape=leaf.axes), ("batch",), "slots") for leaf in self.leaves)
        entries = tuple(map(rules.constrain, self.entries, axes))
        return dataclasses.replace(self, entries=entries, positions=rules.constrain(self.positions, ("batch", "slots")))


def extend(store: Store, entries: Entries, segments: Segments, ordered: bool = False) -> tuple[View, Segments, Store]:
    """What the queries of a span may see, the documents of the span, and the store after it.

    Args:
      store: before the span.
      entries: of the span's tokens.
      segments: of the span.
      ordered: whether each document's tokens must be next to one another in order, padding last, as for what looks at
        neighbouring tokens, such as blocks of keys.

    Returns:
      `(view, span, after)`: in the view and the span the document in progress has id 1 and later ones 2, 3, ... A
      single token is in the store already: its view is the slots after it, in order unless the store has evicted.
    """
    if segments.ids.shape[1] == 1:  # its document is the one in progress, even where the token starts it
        after = apart(jnp.all(segments.positions >= 0), lambda store: store.append(entries, segments), store)
        return after.read(), dataclasses.replace(segments, ids=segments.valid.astype(jnp.int32)), after
    after, (view, span) = store.append(entries, segments), join(store.read(), entries, segments)
    if ordered:
        size = view.segments.ids.shape[1] - span.ids.shape[1]
        index = jnp.arange(view.segments.ids.shape[1], dtype=jnp.int32)
        rank = jnp.where(index < size, view.segments.positions - _LAST, index)  # the store's ahead of the span's
        order = jnp.argsort(jnp.where(view.segments.valid, rank, _LAST), axis=1, stable=True)

        def sort(x):
            return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

        view = jax.tree.map(sort, view)
    return view, span, after


def join(held: View, entries: Entries, segments: Segments) -> tuple[View, Segments]:
    """What a store holds and a span after it, one after another, and the documents of the span, numbered as there."""
    span = dataclasses.replace(segments, ids=jnp.where(segments.valid, segments.runs + 1, 0))
    own = View(tuple(entries), span)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], axis=1), held, own), span
