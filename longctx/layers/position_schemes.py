"""Schemes of positions that are more than one rotation of queries and keys: for attention alone.

Three depend on the length: `dynamic_ntk`, `longrope` and `random`. What counts is the length of the token's document up
to the end of the span (at most what a bounded pattern reaches), as the published codes have it for a row of one
document: not the length of the row, its padding, or the room of a cache. Up to the trained length they do not depend on
it. Beyond it the rotation of all keys of a document changes as the document grows. So these schemes cache keys that are
not rotated, and a document read in several spans is not what it is in one: each span sees the length so far. What its
last span gives is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longctx.layers.positions import Positions, Rope
from longctx.ops import biases, cope, positions
from longctx.ops.attention import Part
from longctx.ops.patterns import Chunked, Window
from longctx.ops.rotary import rotate
from longctx.parallel import sequence
from longctx.schema import Seed


@dataclasses.dataclass(frozen=True)
class ByLength(Rope):
    """Rotary positions that depend on the length of the document."""

    rotates = False

    def rotated(
        self, x: Float[Array, "B T H K"], at: Int[Array, "B T"], lengths: Int[Array, "B T"]
    ) -> Float[Array, "B T H K"]:
        """`x` rotated by its positions, given for each token the length of its document."""
        raise NotImplementedError

    def stored(self, k, at):
        return k

    def parts(self, q, k, pattern, queries, keys):
        own, held = queries.lengths, keys.ids.shape[1] - queries.ids.shape[1]
        known = own
        if held or own.shape[1] == 1:  # the keys begin with a cache's, all of the document in progress, which has id 1
            current = jnp.max(jnp.where(queries.ids == 1, own, 0), axis=1, keepdims=True)
            known = jnp.where(keys.ids == 1, current, jnp.pad(own, ((0, 0), (held, 0))))
        if (reach := pattern.union.reach) is not None:
            own, known = jnp.minimum(own, reach + 1), jnp.minimum(known, reach + 1)
        return [Part(self.rotated(q, queries.positions, own), self.rotated(k, keys.positions, known), pattern)]


@dataclasses.dataclass(frozen=True)
class DynamicNTK(ByLength, kind="dynamic_ntk"):
    """`longctx.ops.positions.dynamic_ntk`: a base that grows with the length."""

    trained: int = 2048  # L, tokens of the trained length
    factor: float = 1.0  # s, beside the length over the trained length

    def rotation(self, width):
        return positions.dynamic_ntk(self.rotating(width), self.base, self.factor, self.trained, self.trained)

    def rotated(self, x, at, lengths):
        return positions.rotate_dynamic_ntk(
            x, at, lengths, self.rotating(x.shape[-1]), self.base, self.factor, self.trained
        )


@dataclasses.dataclass(frozen=True)
class LongRoPE(ByLength, kind="longrope"):
    """`longctx.ops.positions.longrope`: a factor for every pair, as `short` and `long` give them."""

    trained: int = 2048  # L
    factor: float = 1.0  # s
    short: tuple[float, ...] = ()  # λ of each pair up to the trained length; empty: all 1
    long: tuple[float, ...] = ()  # λ beyond it; empty: all s
    magnitude: float = 0.0  # of queries and keys; 0: √(1 + ln s / ln L)

    def rotation(self, width, length: int = 1):
        """How channels rotate in a document of `length` tokens."""
        width = self.rotating(width)
        short, long = self.short or (1.0,) * (width // 2), self.long or (self.factor,) * (width // 2)
        return positions.longrope(
            width, self.base, self.factor, self.trained, length, short, long, self.magnitude or None
        )

    def rotated(self, x, at, lengths):
        short, long = (rotate(x, at, self.rotation(x.shape[-1], n)) for n in (self.trained, self.trained + 1))
        return jnp.where((lengths > self.trained)[..., None, None], long, short)


@dataclasses.dataclass(frozen=True)
class XPos(Rope, kind="xpos"):
    """Rotary positions whose products fade with the distance: `longctx.ops.positions.xpos_scales`.

    Queries grow as keys shrink, counted from the middle of the span: in float32 for spans of up to 65,000 tokens.
    """

    rotates = False
    scale_base: float = 512.0  # tokens after which the scales have gone one power further

    def refusals(self, width):
        if self.scale_base <= 0:
            yield f"scale_base is {self.scale_base}; give a number of tokens above 0"
        yield from super().refusals(width)

    def parts(self, q, k, pattern, queries, keys):
        (part,) = super().parts(q, k, pattern, queries, keys)
        span, held = queries.ids.shape[1], keys.ids.shape[1]
        scales = positions.xpos_scales(self.rotating(q.shape[-1]))
        if -math.log(scales[0]) * span / self.scale_base > 160:
            most = int(-160 * self.scale_base / math.log(scales[0]))
            raise ValueError(
                f"a span of {span} tokens is more than xpos can scale with scale_base={self.scale_base}; "
                f"read it in spans of at most {most} tokens, or give a larger scale_base."
            )
        # Indices along the row, which for tokens of one document are as far apart as their positions: 0, 1, ... in the
        # span, and before it by the positions of the document in progress, the only one of which a cache holds tokens.
        at = jnp.arange(span)[None]
        cached = jnp.arange(held)[None] - (held - span)
        if held != span or span == 1:
            current = queries.ids == 1
            first = jnp.argmax(current, axis=1, keepdims=True)
            origin = jnp.take_along_axis(queries.positions, first, axis=1) - first
            cached = jnp.where(keys.ids == 1, keys.positions - origin, cached)

        def scaled(x, at, sign):
            power = sign * (at[..., None] - span // 2) / self.scale_base * np.log(np.tile(scales, 2))
            scale = jnp.pad(jnp.exp(power), ((0, 0), (0, 0), (0, x.shape[-1] - power.shape[-1])), constant_values=1)
            return (x.astype(jnp.float32) * scale[:, :, None]).astype(x.dtype)

        return [part._replace(q=scaled(part.q, at, 1), k=scaled(part.k, cached, -1))]


@dataclasses.dataclass(frozen=True)
class RandomPositions(ByLength, kind="random"):
    """Positions drawn from a longer range, in order: Ruoss et al., arXiv:2305.16843.

    The range is cut into as many equal parts as the trained length has tokens, or the length if it is longer, and token
    p gets a place in part p that is always the same. A model so sees, at any length, distances of the whole range; the
    paper draws anew for every batch.
    """

    span: int = 65_536  # tokens of the range
    trained: int = 2048  # L
    seed: Seed = 0  # of the draws

    def refusals(self, width):
        if min(self.span, self.trained) < 1:
            yield f"span is {self.span} and trained is {self.trained}; both must be at least 1"
        yield from super().refusals(width)

    def drawn(self, at: Int[Array, "B T"], lengths: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """The positions in the range."""
        stride = jnp.maximum(1, self.span // jnp.maximum(self.trained, lengths))
        return positions.stratified(at, stride, self.seed)

    def rotated(self, x, at, lengths):
        return rotate(x, self.drawn(at, lengths), self.rotation(x.shape[-1]))


@dataclasses.dataclass(frozen=True)
class SelfExtend(Rope, kind="self_extend"):
    """Exact positions in a window, and coarse ones beyond it: Jin et al., arXiv:2401.01325. Needs no training.

    Beyond `window` tokens, query and key stand at p // g + w - w // g and s // g.
    """

    rotates, several = False, True
    group: int = 8  # g, tokens that share a coarse position
    window: int = 1024  # w, tokens within which positions are exact

    def refusals(self, width):
        if min(self.group, self.window) < 1:
            yield f"group is {self.group} and window is {self.window}; both must be at least 1"
        yield from super().refusals(width)

    def stored(self, k, at):
        return k

    def parts(self, q, k, pattern, queries, keys):
        moved = functools.partial(rotate, rotation=self.rotation(q.shape[-1]))
        near, far = Window(self.window), self.window - self.window // self.group
        return [
            Part(moved(q, queries.positions), moved(k, keys.positions), pattern & near),
            Part(
                moved(q, queries.positions // self.group + far), moved(k, keys.positions // self.group), pattern & ~near
            ),
        ]


@dataclasses.dataclass(frozen=True)
class DualChunk(Rope, kind="dual_chunk"):
    """Dual chunk attention: An et al., arXiv:2402.17463. Needs no training.

    Keys stand at s mod c, c = trained - local. For a query at p, they are exact in its own chunk of c tokens, where it
    stands at p mod c; in the chunk before it stands at min(p mod c + c, trained - 1), and beyond at trained - 1. So
    training has shown every distance. The authors' code stops one token later, at `trained`.
    """

    rotates, several = False, True
    trained: int = 2048  # tokens of the trained length
    local: int = 256  # w, tokens across the edge of a chunk whose distances stay exact

    def refusals(self, width):
        if not 0 <= self.local < self.trained:
            yield f"local is {self.local} and trained is {self.trained}; local must be less, and at least 0"
        yield from super().refusals(width)

    def stored(self, k, at):
        return super().stored(k, at % (self.trained - self.local))

    def parts(self, q, k, pattern, queries, keys):
        chunk = self.trained - self.local
        within, before = queries.positions % chunk, Chunked(chunk, back=1)
        moved = functools.partial(rotate, q, rotation=self.rotation(q.shape[-1]))
        return [
            Part(moved(within), k, pattern & Chunked(chunk)),
            Part(moved(jnp.minimum(within + chunk, self.trained - 1)), k, pattern & before & ~Chunked(chunk)),
            Part(moved(jnp.full_like(within, self.trained - 1)), k, pattern & ~before),
        ]


@dataclasses.dataclass(frozen=True)
class Alibi(Positions, kind="alibi"):
    """`longctx.ops.biases.Alibi` with the published slopes."""

    def bias(self, parameter, heads):
        return biases.Alibi(jnp.asarray(positions.alibi_slopes(heads), jnp.float32))


@dataclasses.dataclass(frozen=True)
class T5(Positions, kind="t5"):
    """`longctx.ops.biases.T5`: a learned bias per head and bucket of distances."""

    axes = ("heads", None)
    buckets: int = 32  # of distances: the first half exact, the others ever wider
    max_distance: int = 128  # tokens from which on all distances share a bucket

    def refusals(self, width):
        try:
            positions.t5_buckets(np.zeros(1, np.int32), self.buckets, self.max_distance)
        except ValueError as error:
            yield str(error)

    def initial(self, heads, width):
        return jnp.zeros((heads, self.buckets), jnp.float32)

    def bias(self, parameter, heads):
        return biases.T5(parameter, self.max_distance)


@dataclasses.dataclass(frozen=True)
class CoPE(Positions, kind="cope"):
    """Contextual positions, `longctx.ops.cope`: gates of query and key count the tokens between them."""

    axes = (None, "head")
    alone = True
    max_position: int = 64  # N, learned positions; what counts further has the last

    def refusals(self, width):
        if self.max_position < 2:
            yield f"max_position is {self.max_position}; give at least 2"

    def initial(self, heads, width):
        return jnp.zeros((self.max_position, width), jnp.float32)

    def attend(self, q, k, v, learned, segments, held, options):
        given = {"segments": segments, "key_segments": held, "options": cope.Options(scale=options.scale)}
        return sequence.attend(cope.COPE, (q,), (k, v), learned[:1], **given).y
