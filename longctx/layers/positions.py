"""How attention knows positions: the schemes that `positions.kind` names in an experiment file.

A scheme says what keys are stored as, how queries and keys are rotated for the keys that are visible to a query, and
what is added to logits. Here are those that rotate queries and keys once, by their positions, which every mixer with
keys takes; `layers/position_schemes.py` has the others. The formulas are in `ops/positions.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

from jaxtyping import Array, Float, Int

from longctx.ops import attention, biases, positions
from longctx.ops.attention import Part
from longctx.ops.patterns import Heads, Pattern
from longctx.ops.rotary import Rotation, rotate
from longctx.parallel import sequence
from longctx.schema import Chosen, Kinds, Options
from longctx.typing import Segments


class Positions(Options, Chosen):
    """A scheme; this one is none at all.

    Attributes:
      kinds: every scheme by the name that experiment files give it.
      kind: that name.
      axes: logical names of the axes of its parameter, where it has one.
      rotates: whether it is no more than one rotation of queries and keys, by their positions.
      several: whether it takes attention apart into several parts, which patterns by head do not allow.
      alone: whether it has neither patterns nor sinks, caps or persistent tokens.
    """

    kinds: ClassVar[Kinds] = Kinds()
    kind: ClassVar[str]
    axes: ClassVar[tuple[str | None, ...]] = ()
    rotates: ClassVar[bool] = False
    several: ClassVar[bool] = False
    alone: ClassVar[bool] = False

    def __init_subclass__(cls, kind: str | None = None):
        if kind is not None:
            Positions.kinds[kind] = cls

    def refusals(self, width: int) -> Iterator[str]:
        """What hinders it for heads of `width` channels."""
        try:
            self.rotation(width)
        except ValueError as error:
            yield str(error)

    def rotation(self, width: int) -> Rotation:
        """How channels rotate."""
        return positions.rope(0, 10_000.0)

    def initial(self, heads: int, width: int) -> Float[Array, "H ..."] | None:
        """What its parameter begins as, None without one."""
        return None

    def rotary(self, width: int) -> Iterator[str]:
        """What hinders it, as the field `positions` of a mixer that rotates queries and keys once and no more."""
        if not self.rotates:
            kinds = sorted(kind for kind, scheme in self.kinds.items() if scheme.rotates)
            yield f"positions '{self.kind}' do more than rotate queries and keys; choose one of {', '.join(kinds)}"
        yield from (f"positions.{problem}" for problem in self.refusals(width))

    def rotate(
        self, q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], segments: Segments
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"]]:
        """Queries and keys rotated once, by their positions; of schemes that are no more than that."""
        return q, k

    def sharing(self, share: float) -> Positions:
        """The scheme for a share of the channels of other heads, where it is of channels."""
        return self

    def bias(self, parameter: Float[Array, "H ..."] | None, heads: int) -> biases.Bias | None:
        """What is added to logits."""
        return None

    def stored(self, k: Float[Array, "B T G K"], at: Int[Array, "B T"]) -> Float[Array, "B T G K"]:
        """The keys as a cache holds them; `at` are their positions within their documents."""
        return k

    def parts(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        pattern: Pattern | Heads,
        queries: Segments,
        keys: Segments,
    ) -> list[Part]:
        """What is visible to queries, given keys as they are stored."""
        return [Part(q, k, pattern)]

    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        learned: tuple,
        segments: Segments,
        held: Segments | None,
        options: attention.Options,
    ) -> Float[Array, "B T H V"]:
        """Attention of a span to keys as they are stored.

        Args:
          q, k, v: queries, keys, values.
          learned: the scheme's parameter, sinks, a bias, and what is visible to all queries besides; each may be None.
          segments: of the queries.
          held: of the keys; None where they are the span's own.
          options: of attention, of a pattern that is not yet taken apart.
        """
        _, sinks, bias, besides = learned
        parts = self.parts(q, k, options.pattern, segments, segments if held is None else held)
        queries, keys, patterns = zip(*parts, strict=True)
        inputs = (queries, None, besides), (keys, v), (sinks, bias)
        options = dataclasses.replace(options, pattern=patterns)
        return sequence.attend(attention.ATTENTION, *inputs, segments=segments, key_segments=held, options=options).y


@dataclasses.dataclass(frozen=True)
class NoPositions(Positions, kind="nope"):
    """None: a causal pattern alone tells order (Kazemnejad et al., arXiv:2305.19466)."""

    rotates = True


@dataclasses.dataclass(frozen=True)
class Rope(Positions, kind="rope"):
    """Rotary positions, `longctx.ops.positions.rope`; the schemes below derive from it."""

    rotates = True
    base: float = 10_000.0  # b of the frequencies b^(-2j/R)
    share: float = 1.0  # of a head's channels that rotate, the first ones (partial rotary positions)

    def refusals(self, width: int) -> Iterator[str]:
        if not 0 < self.share <= 1 or self.rotating(width) % 2:
            yield f"share is {self.share} of {width} channels a head; it must be an even number of them, at least 2"
        else:
            yield from super().refusals(width)

    def rotating(self, width: int) -> int:
        """R, the channels that rotate."""
        return round(self.share * width)

    def rotation(self, width: int) -> Rotation:
        return positions.rope(self.rotating(width), self.base)

    def stored(self, k, at):
        return rotate(k, at, self.rotation(k.shape[-1]))

    def parts(self, q, k, pattern, queries, keys):
        return [Part(rotate(q, queries.positions, self.rotation(q.shape[-1])), k, pattern)]

    def rotate(self, q, k, segments):
        rotation = self.rotation(q.shape[-1])
        return rotate(q, segments.positions, rotation), rotate(k, segments.positions, rotation)

    def sharing(self, share):
        return dataclasses.replace(self, share=share)


ROPE = Rope()  # the default


@dataclasses.dataclass(frozen=True)
class Linear(Rope, kind="linear"):
    """`longctx.ops.positions.linear`: positions interpolated."""

    factor: float = 1.0  # s, the length to reach over the trained length

    def rotation(self, width):
        return positions.linear(self.rotating(width), self.base, self.factor)


@dataclasses.dataclass(frozen=True)
class NTK(Rope, kind="ntk"):
    """`longctx.ops.positions.ntk`: a larger base."""

    factor: float = 1.0  # s

    def rotation(self, width):
        return positions.ntk(self.rotating(width), self.base, self.factor)


@dataclasses.dataclass(frozen=True)
class NTKByParts(Rope, kind="ntk_by_parts"):
    """`longctx.ops.positions.ntk_by_parts`: fast pairs stay, slow ones are interpolated."""

    trained: int = 2048  # L
    factor: float = 1.0  # s
    beta_fast: float = 32.0  # turns in the trained length from which a pair stays
    beta_slow: float = 1.0  # and up to which it is interpolated

    def rotation(self, width):
        return positions.ntk_by_parts(
            self.rotating(width), self.base, self.factor, self.trained, self.beta_fast, self.beta_slow
        )


@dataclasses.dataclass(frozen=True)
class YaRN(NTKByParts, kind="yarn"):
    """`longctx.ops.positions.yarn`: by parts, and sharper logits."""

    truncate: bool = True  # the bounds are rounded to whole pairs
    magnitude: float = 0.0  # of queries and keys; 0: 0.1 ln s + 1

    def rotation(self, width):
        return positions.yarn(
            self.rotating(width), self.base, self.factor, self.trained, self.beta_fast, self.beta_slow,
            self.truncate, self.magnitude or None,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Llama3(Rope, kind="llama3"):
    """`longctx.ops.positions.llama3`: by parts, as Llama 3.1."""

    trained: int = 8192  # L
    factor: float = 1.0  # s
    low_frequency_factor: float = 1.0  # turns in the trained length up to which a pair is interpolated
    high_frequency_factor: float = 4.0  # and from which it stays

    def rotation(self, width):
        return positions.llama3(
            self.rotating(width), self.base, self.factor, self.trained, self.low_frequency_factor,
            self.high_frequency_factor,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GiraffePower(Rope, kind="giraffe_power"):
    """`longctx.ops.positions.giraffe_power`: the slower a pair, the more it is slowed."""

    power: float = 0.1  # k

    def rotation(self, width):
        return positions.giraffe_power(self.rotating(width), self.base, self.power)


@dataclasses.dataclass(frozen=True)
class GiraffeTruncated(Rope, kind="giraffe_truncated"):
    """`longctx.ops.positions.giraffe_truncated`: slow pairs stand still."""

    low: float = 2 * math.pi / 2048  # radians a token: pairs at most so fast stand still,
    high: float = 2 * math.pi / 512  # at least so fast stay,
    rho: float = 2 * math.pi / 1024  # and those between rotate so fast

    def rotation(self, width):
        return positions.giraffe_truncated(self.rotating(width), self.base, self.low, self.high, self.rho)
