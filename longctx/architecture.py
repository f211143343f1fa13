"""What a model is made of, as frozen dataclasses: norms, blocks, the embedding, and groups of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from longctx.schema import Chosen, Options


class Mixer(Chosen):
    """Options of a mixer: those of one of `longctx.layers.MIXERS`."""


class MLP(Chosen):
    """Options of an MLP: those of one of `longctx.layers.MLPS`."""


@dataclasses.dataclass(frozen=True)
class Norm(Options):
    """A norm of vectors over their width."""

    kinds: ClassVar[Mapping[str, type]] = {}  # `longctx.layers.NORMS`

    kind: str = "rms"  # divides by the root of the mean square; "layer": of what is left when the mean is subtracted
    epsilon: float = 1e-6  # added to the mean square
    offset: float = 0.0  # added to the learned scale, which begins as much lower: 1 for Gemma's x (1 + w)
    scale: bool = True  # a learned factor per channel
    bias: bool = False  # a learned term per channel

    def problems(self):
        if self.kinds:  # known once the layers are
            yield from _one_of("kind", self.kind, tuple(self.kinds))
        if self.epsilon < 0:
            yield f"epsilon is {self.epsilon}; it must not be negative"


RESIDUALS = ("pre", "post", "sandwich", "parallel", "parallel_shared")


@dataclasses.dataclass(frozen=True)
class Block(Options):
    """One kind of block: a mixer over the sequence and an MLP over the width (`longctx.models.block`)."""

    mixer: Mixer | None  # its kind and options, such as {"kind": "attention", "heads": 8}; None: no mixer
    mlp: MLP | None  # likewise
    beside: Mixer | None = None  # a second mixer, whose output is added to the first one's
    norm: Norm = Norm()  # of what they read, or of what they give
    residual: str = "pre"  # where the norms are, and what is added: pre, post, sandwich, parallel or parallel_shared
    multiplier: float = 1.0  # of what is added

    def problems(self):
        if self.mixer is None and self.mlp is None:
            yield "mixer and mlp are both None; give at least one of them"
        if self.beside is not None and self.mixer is None:
            yield "beside is given without a mixer to be beside of; give it as mixer"
        yield from _one_of("residual", self.residual, RESIDUALS)
        if self.residual.startswith("parallel") and None in (self.mixer, self.mlp):
            yield f"residual is '{self.residual}', which adds a mixer and an MLP; give both, or choose another"

    @property
    def layers(self) -> dict[str, Any]:
        """The options of its mixers and its MLP, by field."""
        parts = {"mixer": self.mixer, "beside": self.beside, "mlp": self.mlp}
        return {name: part for name, part in parts.items() if part is not None}


@dataclasses.dataclass(frozen=True)
class Embedding(Options):
    """The vectors of tokens, and how logits are made of hidden vectors."""

    tied: bool = True  # one matrix is both; else each has its own, and they begin as the same
    scale: float = 0.0  # of the vectors of tokens; 0: √D
    logit_scale: float = 1.0  # of the logits
    bias: bool = False  # a learned term of each logit
    soft_cap: float = 0.0  # logits become cap · tanh(logits / cap); 0: none

    def problems(self):
        if min(self.scale, self.soft_cap) < 0 or self.logit_scale <= 0:
            yield (
                f"scale is {self.scale}, soft_cap is {self.soft_cap} and logit_scale is {self.logit_scale}; the first "
                "two must not be negative, and the last must be above 0"
            )


@dataclasses.dataclass(frozen=True)
class Group(Options):
    """Layers that one scan goes over: a pattern of blocks, whose parameters are stacked over its repeats."""

    pattern: tuple[str, ...]  # names of blocks, in order
    repeats: int = 1  # times

    def problems(self):
        if not self.pattern:
            yield "pattern is empty; name at least one block"
        if self.repeats < 1:
            yield f"repeats is {self.repeats}; it must be at least 1"


class Layer(NamedTuple):
    """Where the parameters of a layer are: in `blocks/<place>`, at index `repeat` of their first axis."""

    block: str  # its name
    group: int
    place: int  # in the patterns of all groups, one after another
    repeat: int


@dataclasses.dataclass(frozen=True)
class Model(Options):
    """A language model: a pattern of blocks, repeated; or several such groups, one after another.

    What the backward pass finds of a block, and recomputes the rest from, is what `remat` says:

    | remat     | kept                                        | when                                                  |
    |-----------|---------------------------------------------|-------------------------------------------------------|
    | "none"    | everything                                  | it fits: nothing is computed twice                    |
    | "dots"    | what the products with parameters give      | it nearly fits: little is computed twice              |
    | "full"    | the block's input, `[B, T, D]`              | long rows: the forward pass is computed twice         |
    | "offload" | the same, in the host's memory meanwhile    | the inputs of all blocks do not fit the device either |

    On a CPU, whose memory is the host's, "offload" is "full".
    """

    pattern: tuple[str, ...] = ()  # names of blocks, in order: the one group of layers, if `groups` is empty
    blocks: Mapping[str, Block] = dataclasses.field(default_factory=dict)  # the kinds of block that are named
    width: int = 128  # D
    repeats: int = 1  # times the pattern is repeated (its parameters stacked, one scan)
    groups: tuple[Group, ...] = ()  # (pattern, repeats) of each, where one does not say it; `grouped` finds them
    embedding: Embedding = Embedding()  # of tokens, and back
    final_norm: Norm = Norm()  # of what logits are made of
    dtype: str = "auto"  # of activations; "auto" is bfloat16 on GPU and TPU, float32 on CPU
    param_dtype: str = "float32"  # of the matrices that multiply activations; all other parameters are float32
    remat: str = "none"  # what the backward pass recomputes: "none", "dots", "full", "offload"; see above

    def problems(self):
        if self.width < 1 or self.repeats < 1:
            yield f"width is {self.width} and repeats is {self.repeats}; both must be at least 1"
        if not self.pattern and not self.groups:
            yield "pattern is empty; name at least one block, or give groups"
        if self.groups and (self.pattern or self.repeats != 1):
            yield "groups are given, and so is pattern or repeats, which are one group; leave them out"
        for name in dict.fromkeys([*self.pattern, *(name for group in self.groups for name in group.pattern)]):
            if name not in self.blocks:
                yield f"pattern names the block '{name}', not among blocks: {sorted(self.blocks)}"
        yield from _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        yield from _one_of("param_dtype", self.param_dtype, ("float32", "bfloat16"))
        yield from _one_of("remat", self.remat, ("none", "dots", "full", "offload"))

    @property
    def scans(self) -> tuple[Group, ...]:
        """The groups, whichever way they are given."""
        return self.groups or (Group(self.pattern, self.repeats),)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in order: of a layer's number, its block and where its parameters are."""
        found, first = [], 0
        for i, group in enumerate(self.scans):
            for repeat in range(group.repeats):
                found += [Layer(name, i, first + n, repeat) for n, name in enumerate(group.pattern)]
            first += len(group.pattern)
        return tuple(found)


def grouped(names: Sequence[str]) -> tuple[Group, ...]:
    """The groups of an irregular list of layers, with the fewest blocks to compile, and of these the fewest scans.

    So `("local",) * 5 + ("full",)` four times and then two more local layers are a group of six blocks and one of one.
    """
    names = tuple(names)
    best = [(0, 0, ())]  # blocks, scans and groups of the first layers
    for stop in range(1, len(names) + 1):
        ways = []
        for start, (blocks, scans, groups) in enumerate(best):
            part = names[start:stop]
            period = next(p for p in range(1, len(part) + 1) if part == part[:p] * (len(part) // p))
            ways.append((blocks + period, scans + 1, (*groups, Group(part[:period], len(part) // period))))
        best.append(min(reversed(ways), key=lambda way: way[:2]))
    return best[-1][2]


def _one_of(name: str, value: str, choices: tuple[str, ...]):
    if value not in choices:
        yield f"{name} is '{value}'; choose one of {', '.join(choices)}"
