"""The notation that every public signature of longctx uses, and the documents of a packed row.

| letter | meaning                                   | letter | meaning                         |
|--------|-------------------------------------------|--------|---------------------------------|
| B      | batch                                     | D      | width of the model              |
| T      | tokens in the span                        | F      | hidden width of the MLP         |
| S      | keys a query may look at                  | N      | size of a vector state          |
| H      | heads                                     | C      | length of a chunk               |
| G      | key-value heads (G divides H)             | W      | window, or width of convolution |
| K      | key width per head                        | L      | layers                          |
| V      | value width per head (or the vocabulary)  |        |                                 |

Arrays are `[B, T, ...]`, batch and time first; heads are `[B, T, H, K]`.

A *span* is a run of consecutive tokens. A layer maps a span and the state before it to outputs and the
state after it. A row may hold several documents one after another (*packing*); what a layer must know of
them is in `Segments`, derived once per batch. The ops are `checked`: an array that contradicts its annotation is
refused in one sentence.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import AbstractArray, Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """Which document each token of a span belongs to.

    Documents are contiguous. Padding (id 0) may stand between documents and at the ends of a row; it never
    changes a state. Every layer reads document boundaries from here and nowhere else.

    Attributes:
      ids: `[B, T]` int32, 0 for padding, equal within a document, different for neighbouring documents.
      positions: `[B, T]` int32, index of the token within its document (0 for padding).
      starts: `[B, T]` bool, true where a document begins: what came before, the incoming state included,
        is forgotten. False on the first tokens of a span that continues the document the state comes from.
    """

    ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    starts: Bool[Array, "B T"]

    @property
    def valid(self) -> Bool[Array, "B T"]:
        """True for tokens of a document, false for padding."""
        return self.ids > 0

    @property
    def runs(self) -> Int[Array, "B T"]:
        """Documents begun so far in the span: 0 while it continues the state's document, then 1, 2, ..."""
        return jnp.cumsum(self.starts, axis=1, dtype=jnp.int32)

    @property
    def lengths(self) -> Int[Array, "B T"]:
        """Tokens of each token's document up to the end of the span, those before the span counted; 0 for padding.

        Documents of a row stand one after another, with padding before, between or after them.
        """
        size = self.ids.shape[1]
        index = jnp.arange(size, dtype=jnp.int32)
        last = jax.lax.cummax(jnp.where(self.valid, index, 0), axis=1)  # the last token at or before each one
        begins = jnp.where(self.starts, index, size)  # where the next document begins, after each token
        following = jax.lax.cummin(jnp.pad(begins[:, 1:], ((0, 0), (0, 1)), constant_values=size), axis=1, reverse=True)
        ends = jnp.take_along_axis(last, following - 1, axis=1)
        return jnp.where(self.valid, jnp.take_along_axis(self.positions, ends, axis=1) + 1, 0)

    def before(self, keys: Segments) -> Bool[Array, "B T S"]:
        """Whether each of `keys` is of the token's document and not after it; never for padding."""
        document = (self.ids[:, :, None] == keys.ids[:, None, :]) & self.valid[:, :, None]
        return document & (keys.positions[:, None, :] <= self.positions[:, :, None])

    @classmethod
    def single(cls, batch: int, length: int, offset: int | Int[Array, ""] = 0) -> Segments:
        """One document per row, of which the span is tokens `offset` to `offset + length`.

        Args:
          batch: B.
          length: T.
          offset: tokens of the document that came before the span; a document starts where it is 0.
        """
        positions = jnp.broadcast_to(offset + jnp.arange(length, dtype=jnp.int32), (batch, length))
        return cls(jnp.ones_like(positions), positions, positions == 0)

    @classmethod
    def from_ids(cls, ids: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None) -> Segments:
        """Segments from ids, and positions where they are known.

        Args:
          ids: `[B, T]`, 0 for padding.
          positions: `[B, T]`, index within the document; a document starts where it is 0. Without it a
            document starts where the id differs from that of the last token before it (padding passed over),
            the first document of the span continues the state, and positions count from the span's start.
        """
        ids = jnp.asarray(ids, jnp.int32)
        valid = ids > 0
        if positions is not None:
            positions = jnp.where(valid, jnp.asarray(positions, jnp.int32), 0)
            return cls(ids, positions, valid & (positions == 0))
        index = jnp.arange(ids.shape[1], dtype=jnp.int32)
        last = jax.lax.cummax(jnp.where(valid, index, -1), axis=1)  # the last token at or before each one
        before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        previous = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=1)
        starts = valid & (before >= 0) & (previous != ids)
        first = jnp.where(valid & (before < 0), index, 0)  # where the continued document enters the span
        origin = jax.lax.cummax(jnp.where(starts, index, first), axis=1)
        return cls(ids, jnp.where(valid, index - origin, 0), starts)

    @classmethod
    def of(cls, segments: Int[Array, "B T"] | Segments | None, batch: int, length: int) -> Segments:
        """What is made of ids, `Segments`, or None for a span of one document.

        A span of one document continues the state that is passed, so it has no start.
        """
        if segments is None:
            return dataclasses.replace(cls.single(batch, length), starts=jnp.zeros((batch, length), bool))
        segments = segments if isinstance(segments, Segments) else cls.from_ids(segments)
        if segments.ids.shape != (batch, length):
            raise ValueError(
                f"segments have shape {segments.ids.shape}, the span has batch {batch} and length {length}; "
                "pass one id per token."
            )
        return segments


def checked(op: Callable) -> Callable:
    """Decorates `op`: its arrays must have the shapes and kinds of numbers that its signature says.

    Sizes get their names in the order of the arguments: the first array with an axis K says what K is. Arguments that
    are no arrays are left to the op. Under `jax.jit` this costs nothing after tracing.

    Raises:
      ValueError: an array contradicts its annotation, or an array before it.
    """
    signature = inspect.signature(op)

    @functools.wraps(op)
    def call(*args, **kwargs):
        check(f"{op.__module__}.{op.__name__}", op, signature.bind(*args, **kwargs).arguments)
        return op(*args, **kwargs)

    return call


def check(name: str, annotated: Any, given: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> dict:
    """Refuses arrays that contradict their annotations.

    Args:
      name: of what the arrays are given to, for the message.
      annotated: a function, or a class with annotated fields.
      given: its arguments or fields by name; what is no array is passed over.
      sizes: of axes that are known already.

    Returns:
      The sizes of all named axes.

    Raises:
      ValueError: an array contradicts its annotation, or an array before it.
    """
    sizes = dict(sizes or {})
    for argument, kinds in _array_types(annotated).items():
        array = given.get(argument)
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            continue
        fits = [found for kind in kinds if (found := _fit(array, kind, sizes)) is not None]
        if not fits:
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise ValueError(
                f"{name}: {argument} is {array.dtype}{list(array.shape)}, expected "
                + " or ".join(f"{kind.dtype.__name__}[{', '.join(kind.dim_str.split())}]" for kind in kinds)
                + (f", where the arguments before it have {known}." if known else ".")
            )
        sizes |= fits[0]
    return sizes


@functools.cache
def _array_types(annotated) -> dict[str, list[type[AbstractArray]]]:
    """The array types of each argument or field that has any, read at the first use, when all names are defined."""
    hints = typing.get_type_hints(annotated)
    hints.pop("return", None)
    found = {
        name: [kind for kind in typing.get_args(hint) or [hint] if _is_array(kind)] for name, hint in hints.items()
    }
    return {name: kinds for name, kinds in found.items() if kinds}


def _is_array(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, AbstractArray)


def _fit(array, kind: type[AbstractArray], sizes: dict[str, int]) -> dict[str, int] | None:
    """The sizes that `array` gives names to beside the known `sizes`; None if it is not of this kind."""
    names, shape = kind.dim_str.split(), array.shape
    if names[:1] == ["..."]:
        names = names[1:]
        shape = shape[max(len(shape) - len(names), 0) :]
    if jnp.dtype(array.dtype).name not in kind.dtypes or len(names) != len(shape):
        return None
    found: dict[str, int] = {}
    for name, size in zip(names, shape, strict=True):
        terms = re.fullmatch(r"(\w+)([+-])(\w+)", name)
        left, sign, right = terms.groups() if terms else (name, "+", "0")
        known = sizes | found
        amounts = [int(term) if term.isdigit() else known.get(term) for term in (left, right)]
        if amounts[0] is None and not terms:
            found[name] = size
        elif None not in amounts and size != amounts[0] + (amounts[1] if sign == "+" else -amounts[1]):
            return None
    return found
