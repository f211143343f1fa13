"""What a layer calls: families of ops as objects, with their definition, their fast form and how spans of them compose.

A recurrence maps a span and the state before it to outputs and the state after it; in a keyed family, whose state is
the tokens, queries attend to keys. The two forms of either, and all that devices need to share a span, are fields of
one `Recurrence` or `Keyed`; `longctx.ops.FAMILIES` lists them all, and

    y, state = GATED_DELTA(q, k, v, beta, log_decay)
    y, loss, _ = INDEXER_TOPK((q, index_q, weights), (k, v, index_k), count=2048)

run one on a span. Layers call `run` or `attend` of `longctx.parallel.sequence`, which share it between the devices of a
mesh.

All zeros are the empty state of every recurrence. A document's start forgets the state, padding leaves it as it is and
gives 0: `by_token` says so for the definitions.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.typing import Segments, check

_DEFINITIONS = contextvars.ContextVar("definitions", default=False)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a family whose only one is the length of a chunk, C: a power of two."""

    chunk: int = 64


@runtime_checkable
class Linear(Protocol):
    """A transition S -> A S + state, a named tuple.

    Attributes:
      state: what the span makes of the empty state.
      column_wise: the state is [B, H, K, V], and A treats all its columns alike.
    """

    state: Any
    column_wise: ClassVar[bool]

    def transposed(self) -> Linear:
        """The transition with A transposed."""


class Call(NamedTuple):
    """What the forms of a recurrence are called with, checked and complete."""

    inputs: Any
    parameters: Any
    state: Any
    segments: Segments
    options: Any

    @property
    def span(self) -> tuple:
        """What `transition` and `deferred` are called with: all but the state."""
        return self.inputs, self.parameters, self.segments, self.options


@dataclasses.dataclass(frozen=True, eq=False)
class Recurrence:
    """A family of recurrences.

    Attributes:
      name: its key in `longctx.ops.FAMILIES`.
      inputs: named tuple of arrays `[B, T, ...]`, of which some may be None.
      empty: `empty(inputs, parameters, options)`, the state before any token: zeros. Forms return states like it.
      recurrent: the definition, token by token: `recurrent(inputs, parameters, state, segments, options)` gives
        `(y[B, T, ...], state)`.
      chunked: the same, fast.
      transition: what a span does to any state: `transition(inputs, parameters, segments, options)`. None says that
        states do not compose, and devices take turns.
      compose: `compose(first, then)`, two transitions one after the other; associative. Zeros as `first` stand for the
        empty state.
      apply: `apply(transition, state)`, the state after the span.
      deferred: one pass over the span before its state is known; arguments as `transition`. Gives the transition, and
        the outputs as a function of the state.
      gathers: `gathers(inputs)`, whether the tokens of a shard are fewer numbers than its transition.
      parameters: named tuple of what has neither batch nor time; None for none.
      options: frozen dataclass of what is static.
      counts: it reads positions, so that a state is of no use without `Segments`.
      refusal: `refusal(inputs, parameters, options)`, a sentence that says why it does not run on these, or None.
    """

    name: str
    inputs: type
    empty: Callable[..., Any]
    recurrent: Callable[..., tuple]
    chunked: Callable[..., tuple]
    transition: Callable[..., Any] | None
    compose: Callable[[Any, Any], Any] | None = None
    apply: Callable[[Any, Any], Any] | None = None
    deferred: Callable[..., tuple] | None = None
    gathers: Callable[..., bool] | None = None
    parameters: type | None = None
    options: type = Options
    counts: bool = False
    refusal: Callable[..., str | None] | None = None

    def __post_init__(self):
        composing = [self.compose is not None, self.apply is not None]
        if composing != [self.transition is not None] * 2:
            raise ValueError(
                f"{self.name} needs `transition`, `compose` and `apply`, or none of them where its states do not "
                "compose and devices are to take turns."
            )

    def __call__(
        self, *inputs, parameters=(), state=None, segments: Segments | None = None, form: str | None = None, **options
    ):
        """The op on a span, on one device.

        Args:
          inputs: the fields of `inputs`, in their order.
          parameters: those of `parameters`.
          state: before the span; None is the empty state.
          segments: the documents of the span; None is one document, which continues that of the state.
          form: "recurrent" or "chunked"; None is the definition for one token, or within `definitions`, and the fast
            form otherwise.
          options: fields of `options`.

        Returns:
          `(y, state)`: the outputs `[B, T, ...]` and the state after the span.

        Raises:
          ValueError: arrays contradict their annotations or each other, or `refusal` has a reason.
        """
        return self.run(self.prepare(inputs, parameters, state, segments, self.options(**options)), form)

    def run(self, call: Call, form: str | None = None) -> tuple:
        """`(y, state)`; `form` as of a call."""
        if form is None:
            form = "recurrent" if _DEFINITIONS.get() or call.segments.ids.shape[1] == 1 else "chunked"
        return {"recurrent": self.recurrent, "chunked": self.chunked}[form](*call)

    def prepare(self, inputs: tuple, parameters=(), state=None, segments: Segments | None = None, options=None) -> Call:
        """What the forms are called with, where all of it fits together; arguments and errors as of a call.

        call = GATED_DELTA.prepare((q, k, v, beta, log_decay))
        GATED_DELTA.recurrent(*call), GATED_DELTA.chunked(*call), GATED_DELTA.transition(*call.span)
        """
        options = self.options() if options is None else options
        inputs = self.inputs(*inputs)
        parameters = None if self.parameters is None else self.parameters(*parameters)
        sizes = check(self.name, self.inputs, inputs._asdict())
        if parameters is not None:
            check(self.name, self.parameters, parameters._asdict(), sizes)
        if self.refusal is not None and (reason := self.refusal(inputs, parameters, options)):
            raise ValueError(f"{self.name}: {reason}")
        if self.counts and state is not None and segments is None:
            raise ValueError(
                f"{self.name} depends on how many tokens of the document came before; with a state, pass `Segments`, "
                "whose positions say so."
            )
        segments = Segments.of(segments, *inputs[0].shape[:2])
        if state is None:
            return Call(inputs, parameters, self.empty(inputs, parameters, options), segments, options)
        empty = jax.eval_shape(lambda: self.empty(inputs, parameters, options))
        shapes = [jax.tree.map(lambda leaf: (*leaf.shape,), tree) for tree in (state, empty)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{self.name}: the state is {shapes[0]}, expected {shapes[1]}, as a span of these inputs leaves."
            )
        state = jax.tree.map(lambda given, wanted: given.astype(wanted.dtype), state, empty)
        return Call(inputs, parameters, state, segments, options)


class Queries(NamedTuple):
    """Queries alone; head h reads the keys and values of group h // (H // G)."""

    q: Float[Array, "B T H K"]


class Keys(NamedTuple):
    """Keys and values, of a row in which documents are contiguous; it holds the queries' own tokens."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]


class Result(NamedTuple):
    """What queries read.

    Attributes:
      y: in the dtype of the values; 0 for padding, and for a query that sees nothing.
      loss: of each token, float32, where a part of the family learns by a loss of its own.
      keys: the keys after the span, float32, where its tokens change them.
    """

    y: Float[Array, "B T H V"]
    loss: Float[Array, "B T"] | None = None
    keys: Float[Array, "B S H K"] | None = None


class Attending(NamedTuple):
    """What the forms of a keyed family are called with, checked and complete."""

    queries: Any
    keys: Any
    parameters: Any
    segments: Segments
    key_segments: Segments
    options: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Keyed:
    """A family whose state is the tokens: queries that attend to keys.

    Its forms are called with the fields of `Attending` and give a `Result`.

    Attributes:
      name: its key in `longctx.ops.FAMILIES`.
      queries: named tuple of arrays `[B, T, ...]`, of which some may be None.
      keys: the same for keys, `[B, S, ...]`.
      definition: by the formula.
      chunked: the same, fast.
      partial: a `Partial`, which merges with those of other keys; None where results do not merge.
      sharded: the same as `chunked` on a part of a row, a `longctx.ops.row.Row`, which is one argument more.
      finish: `finish(partial, *attending)`, the `Result` when those of all keys have been merged.
      shares_slots: `shares_slots(options)`, whether devices share the slots of a cache; None: never.
      together: `together(options)`, how many neighbouring heads must stay on one device, where heads know nothing of
        each other, are the third axis of queries and keys and the first of parameters. Islands then split rows and
        heads by hand, so that kernels may run in them. None: the compiler splits them.
      parameters: named tuple of what has neither batch nor time; None for none.
      options: frozen dataclass of what is static.
    """

    name: str
    queries: type
    keys: type
    definition: Callable[..., Result]
    chunked: Callable[..., Result]
    partial: Callable[..., Any] | None
    sharded: Callable[..., Result]
    finish: Callable[..., Result] | None = None
    shares_slots: Callable[[Any], bool] | None = None
    together: Callable[[Any], int] | None = None
    parameters: type | None = None
    options: type = Options

    def __call__(
        self,
        queries: tuple,
        keys: tuple,
        parameters: tuple = (),
        segments: Segments | None = None,
        key_segments: Segments | None = None,
        form: str | None = None,
        **options,
    ) -> Result:
        """The op on one device.

        Args:
          queries: the fields of `queries`, in their order.
          keys: those of `keys`.
          parameters: those of `parameters`.
          segments: the documents of the queries; None is one document.
          key_segments: those of the keys; None: they are the queries' own tokens.
          form: "definition" or "chunked"; None is the fast form, or within `definitions` the definition.
          options: fields of `options`.

        Raises:
          ValueError: arrays contradict their annotations or each other.
        """
        return self.run(self.prepare(queries, keys, parameters, segments, key_segments, self.options(**options)), form)

    def run(self, call: Attending, form: str | None = None) -> Result:
        """The op; `form` as of a call."""
        if form is None:
            form = "definition" if _DEFINITIONS.get() else "chunked"
        return {"definition": self.definition, "chunked": self.chunked}[form](*call)

    def prepare(
        self, queries: tuple, keys: tuple, parameters=(), segments=None, key_segments=None, options=None
    ) -> Attending:
        """What the forms are called with, where all of it fits together; arguments and errors as of a call."""
        parameters = None if self.parameters is None else self.parameters(*parameters)
        parts, sizes = (self.queries(*queries), self.keys(*keys), parameters), {}
        for part in parts[: 2 if parameters is None else 3]:
            sizes = check(self.name, type(part), part._asdict(), sizes)
        (batch, length), (_, tokens) = (jax.tree.leaves(part)[0].shape[:2] for part in parts[:2])
        if key_segments is None and length != tokens:
            raise ValueError(
                f"{self.name}: {length} queries and {tokens} keys; pass key_segments where the keys are not the "
                "queries' own tokens."
            )
        segments = Segments.of(segments, batch, length)
        key_segments = segments if key_segments is None else Segments.of(key_segments, batch, tokens)
        return Attending(*parts, segments, key_segments, self.options() if options is None else options)


@contextlib.contextmanager
def definitions() -> Iterator[None]:
    """Within it every family runs by its definition, slowly, in what is traced there for one device."""
    token = _DEFINITIONS.set(True)
    try:
        yield
    finally:
        _DEFINITIONS.reset(token)


def by_token(step: Callable, state: Any, tokens: tuple, segments: Segments, dtype) -> tuple[Any, Any]:
    """A definition: one token after the other, in float32.

    Args:
      step: `step(state, *token) -> (y[B, ...], state)`, of a token of a document.
      state: before the span.
      tokens: `[B, T, ...]` arrays or None.
      segments: where documents start, which is to forget the state, and padding, which leaves it and gives 0.
      dtype: of y.
    """

    def where(flags, new, old):
        return jax.tree.map(lambda a, b: jnp.where(flags.reshape(-1, *(1,) * (b.ndim - 1)), a, b), new, old)

    def one(state, token):
        start, valid, token = token
        y, after = step(where(start, jax.tree.map(jnp.zeros_like, state), state), *token)
        return where(valid, after, state), where(valid, y, jnp.zeros_like(y))

    def wide(x):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    rows = segments.starts, segments.valid, tuple(jax.tree.map(wide, tuple(tokens)))
    state, y = jax.lax.scan(one, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), rows))
    return jnp.moveaxis(y, 0, 1).astype(dtype), state
