"""Projections, norms and the short convolution that the mixers share.

Parameters are float32 and carry the logical names of their axes (`axes=`), which `parallel.rules` maps to the
mesh. A matrix that multiplies activations also says `decays=True`: weight decay reaches it, and no other parameter.
Rates, gains, biases, mixing coefficients, taps and tables of positions are left where the loss wants them, however
many axes they have. Activations keep the dtype they come in.

Initial values are mimetic (Trockman and Kolter, 2023; Trockman et al., 2024, for recall). Keys are projected as
queries are, and convolved to be those of the token before: so a token is stored under what came before it, and a query
finds what followed its like. Outputs begin as the transpose of the values' projection: what is read is copied. Recall
then takes a hundred steps to learn instead of thousands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from longctx.architecture import Norm
from longctx.memory.store import Store
from longctx.ops.backend import merged, scaled
from longctx.ops.causal_conv import CAUSAL_CONV
from longctx.parallel import rules, sequence
from longctx.schema import Bound, Options
from longctx.typing import Segments

_RMS, _LAYER = Norm(), Norm("layer", bias=True)
_INITIAL = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class Linear(nnx.Module):
    """`x W`, without a bias unless asked for.

    Args:
      inputs, outputs: widths.
      axes: logical names of the two axes of W.
      rngs: source of the initial values: normal, of variance 1 / inputs.
      bias: initial value of a bias, or None for no bias.
      initial: `[inputs, outputs]` initial values, in place of random ones.
      decays: whether weight decay reaches W.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        bias: float | None = None,
        initial: Float[Array, "I O"] | None = None,
        decays: bool = True,
    ):
        if initial is None:
            initial = _INITIAL(rngs.params(), (inputs, outputs), jnp.float32)
        # A copy: parameters that start alike must not share a buffer, which training gives away.
        self.weight = nnx.Param(jnp.array(initial, copy=True), axes=axes, decays=decays)
        self.bias = None if bias is None else nnx.Param(jnp.full(outputs, bias, jnp.float32), axes=axes[1:])

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        weight = self.weight[...].astype(x.dtype)
        # Of few tokens, as in decoding, what the parts of W give is less to send than W: the compiler sums it.
        if x.size // x.shape[-1] > weight.shape[0]:
            weight = rules.gathered(weight, self.weight.axes)
        y = merged(x) @ weight
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def like_queries(query: Linear, key_heads: int, width: int) -> Float[Array, "D G*K"]:
    """Initial values of the keys' projection: those of the queries' first heads."""
    return query.weight[...][:, : key_heads * width]


def undo_values(value: Linear, heads: int, width: int) -> Float[Array, "H*V D"]:
    """Initial values of the output's projection: half the transpose of the values', shared as the heads share them."""
    shared = value.weight[...].T.reshape(-1, width, value.weight.shape[0])
    return 0.5 * jnp.repeat(shared, heads // shared.shape[0], axis=0).reshape(heads * width, -1)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + ε) · (offset + scale) + shift` over the last axis, in float32 (Zhang and Sennrich, 2019).

    Args:
      shape: of the scale: the width, or `(heads, width)` for a scale of each head's own.
      axes: logical names of the scale's axes.
      initial: what the normed vector is first multiplied by.
      options: ε, the offset, and whether there are a scale and a shift.
    """

    centred = False

    def __init__(
        self,
        shape: int | tuple[int, int],
        axes: tuple[str, ...] = ("embed",),
        initial: float = 1.0,
        options: Norm = _RMS,
    ):
        self.options = options
        first = jnp.full(shape, initial - options.offset, jnp.float32)
        self.scale = nnx.Param(first, axes=axes) if options.scale else None
        self.shift = nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes) if options.bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        if self.centred:
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.options.epsilon)
        if self.scale is not None:
            flat = y.reshape(*y.shape[: y.ndim - self.scale.ndim], -1)
            y = scaled(flat, self.scale[...].reshape(-1) + self.options.offset).reshape(x.shape)
        return (y if self.shift is None else y + self.shift[...]).astype(x.dtype)


class LayerNorm(RMSNorm):
    """`RMSNorm` of x less its mean, with a shift unless `options` say otherwise (Ba et al., 2016)."""

    centred = True

    def __init__(self, shape, axes=("embed",), initial: float = 1.0, options: Norm = _LAYER):
        super().__init__(shape, axes, initial, options)


def document(segments: Segments | None, x: Float[Array, "B T D"], state: Any) -> Segments:
    """The segments of a span, for a layer that asks where in its document a token is.

    Args:
      segments: as they are given; None is one document.
      x: inputs of the span.
      state: before the span. None: the document begins with the span. With a store in it, which knows the tokens
        before the span, the document goes on.

    Raises:
      ValueError: there are no segments, and a state that does not say how many tokens came before.
    """
    if segments is not None:
        return segments
    batch, length, _ = x.shape
    if state is None:
        return Segments.single(batch, length)
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, Store))
    known = [leaf.tokens for leaf in leaves if isinstance(leaf, Store)]
    if not known:
        raise ValueError(
            "the state does not say how many tokens of the document came before the span, which this layer must know; "
            f"give segments, such as Segments.single({batch}, {length}, offset=tokens before)."
        )
    return Segments.single(batch, length, known[0][:, None])


class ShortConv(nnx.Module):
    """A causal convolution of width W per channel, whose taps do not cross a document's start.

    Args:
      width: W, taps.
      lags: for each channel, how many tokens before the present one it begins by showing; at most W-1.
      rngs: source of noise, of deviation 0.1 on all taps.
      axis: logical name of the channels.
    """

    def __init__(self, width: int, lags: Sequence[int], rngs: nnx.Rngs, axis: str = "heads"):
        lags = jnp.asarray(np.minimum(np.asarray(lags, np.int32), width - 1))
        shown = jnp.arange(width)[:, None] == width - 1 - lags
        noise = 0.1 * jax.random.normal(rngs.params(), shown.shape, jnp.float32)
        self.kernel = nnx.Param(shown + noise, axes=("taps", axis))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None, state: Float[Array, "B W-1 D"] | None):
        """Returns `(y[B, T, D], the last W-1 inputs)`."""
        return sequence.run(CAUSAL_CONV, (x,), (self.kernel[...].astype(x.dtype),), state, segments=segments)

    def init_state(self, batch: int) -> Float[Array, "B W-1 D"]:
        """The inputs before any token: zeros, float32."""
        taps, channels = self.kernel.shape
        return jnp.zeros((batch, taps - 1, channels), jnp.float32)


Taps = Annotated[int, Bound(0, 256)]  # of a short convolution; 0: none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a mixer carries: its memory, and the last inputs of its short convolution, None without one."""

    memory: Any
    conv: Float[Array, "B W-1 C"] | None


def short_conv(width: int, lags: Sequence[int], rngs: nnx.Rngs, axis: str = "heads") -> ShortConv | None:
    """The convolution in front of a mixer, `ShortConv`; None if `width` is 0."""
    return ShortConv(width, lags, rngs, axis) if width else None


def convolved(
    conv: ShortConv | None,
    parts: Sequence[Float[Array, "B T C"]],
    segments: Segments | None,
    state: State | None,
    bias: Float[Array, " C"] | None = None,
):
    """What a mixer begins with, where it may have a short convolution.

    Args:
      conv: over the channels of all parts, one after another; None is none.
      parts: projections, such as queries, keys and values.
      segments: the documents of the span.
      state: before the span; None is the empty one.
      bias: of the convolution.

    Returns:
      `(parts convolved, the mixer's memory, the last inputs of the convolution)`.
    """
    memory, tail = (None, None) if state is None else (state.memory, state.conv)
    if conv is None:
        return list(parts), memory, None
    mixed, tail = conv(jnp.concatenate(parts, axis=-1), segments, tail)
    mixed = mixed if bias is None else mixed + bias.astype(mixed.dtype)
    edges = np.cumsum([part.shape[-1] for part in parts])[:-1]
    return jnp.split(mixed, edges, axis=-1), memory, tail


def empty_tail(conv: ShortConv | None, batch: int) -> Float[Array, "B W-1 C"] | None:
    """The inputs of a short convolution before any token."""
    return None if conv is None else conv.init_state(batch)


@dataclasses.dataclass(frozen=True)
class QKNorm(Norm):
    """The norm of queries and keys."""

    over: str = "head"  # a head, with one scale for all; "each": a head, each with its own; "all" heads together

    def problems(self):
        yield from super().problems()
        if self.over not in ("head", "each", "all"):
            yield f"over is '{self.over}'; choose head, each or all"

    def made(self, heads: int, width: int, initial: float = 1.0) -> RMSNorm:
        """The norm of `heads` heads of `width` channels."""
        shape = {"head": width, "each": (heads, width), "all": heads * width}[self.over]
        axes = {"head": ("head",), "each": ("heads", "head"), "all": ("heads",)}[self.over]
        return self.kinds[self.kind](shape, axes, initial, self)


BIASES = {"none": "", "qkv": "qkv", "out": "o", "all": "qkvo"}  # which projections have one


class Projections(nnx.Module):
    """Queries, keys and values of softmax attention, and the way back: what its mixers derive from.

    Args:
      width: D.
      options: a `Projections.Config`.
      rngs: source of the initial values.
      lags: of the convolution, for queries, keys and values; None for keys one token behind the others.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        kv_heads: int = 4  # G, divides H
        head_width: int = 32  # K
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none
        qk_norm: QKNorm | None = QKNorm()  # of queries and keys; False: none
        bias: str = "none"  # of the projections: none, qkv, out or all
        gate: str = "none"  # outputs times the sigmoid of a projection of x: none, one a head, or one a channel

        def problems(self):
            if min(self.heads, self.kv_heads, self.head_width) < 1 or self.heads % self.kv_heads:
                yield f"heads is {self.heads} and kv_heads is {self.kv_heads}; kv_heads must divide heads"
            if self.bias not in BIASES:
                yield f"bias is '{self.bias}'; choose one of {', '.join(BIASES)}"
            if self.gate not in ("none", "head", "channel"):
                yield f"gate is '{self.gate}'; choose none, head or channel"

        @property
        def of_values(self) -> int:
            """V, channels of a value."""
            return getattr(self, "value_width", 0) or self.head_width

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs, lags: Sequence[int] | None = None):
        self.width, self.options = width, options
        heads, groups, size = options.heads, options.kv_heads, options.head_width
        queries, keys, values = heads * size, groups * size, groups * options.of_values
        of_query, of_key, of_value, of_out = (0.0 if name in BIASES[options.bias] else None for name in "qkvo")
        self.query = Linear(width, queries, ("embed", "heads"), rngs, of_query)
        like_query = like_queries(self.query, groups, size)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, of_key, initial=like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs, of_value)
        back = undo_values(self.value, heads, options.of_values)
        self.out = Linear(heads * options.of_values, width, ("heads", "embed"), rngs, of_out, initial=back)
        lags = [0] * queries + [1] * keys + [0] * values if lags is None else lags
        self.conv = short_conv(options.conv_width, lags, rngs)
        norm = options.qk_norm
        self.query_norm = None if norm is None else norm.made(heads, size, initial=1.5)
        self.key_norm = None if norm is None else norm.made(groups, size)
        gates = {"none": 0, "head": heads, "channel": heads * options.of_values}[options.gate]
        self.gate = Linear(width, gates, ("embed", "heads"), rngs) if gates else None

    def project(self, x: Float[Array, "B T D"], segments: Segments, tail: Float[Array, "B W-1 C"] | None):
        """`(q[B, T, H, K], k[B, T, G, K], v[B, T, G, V], tail)`; the tail is that of the convolution, None without."""
        parts = [self.query(x), self.key(x), self.value(x)]
        (q, k, v), _, tail = convolved(self.conv, parts, segments, State(None, tail))
        v = v.reshape(*x.shape[:2], -1, self.options.of_values)
        return self.heads(q, self.query_norm), self.heads(k, self.key_norm), v, tail

    def heads(self, x: Float[Array, "... H*K"], norm: RMSNorm | None) -> Float[Array, "... H K"]:
        """Queries or keys by their heads, normed."""
        parted = (*x.shape[:-1], -1, self.options.head_width)
        if norm is None:
            return x.reshape(parted)
        return norm(x).reshape(parted) if norm.options.over == "all" else norm(x.reshape(parted))

    def back(self, x: Float[Array, "B T D"], y: Float[Array, "B T H V"]) -> Float[Array, "B T D"]:
        """What the mixer gives, of its input and of what its heads read."""
        if self.gate is not None:
            y *= jax.nn.sigmoid(self.gate(x)).reshape(*y.shape[:3], -1)
        return self.out(y.reshape(*y.shape[:2], -1))


def l2_normalise(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """`x / sqrt(Σx² + 1e-6)` over the last axis, in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
