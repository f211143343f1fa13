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

from longctx.memory.cache import KVCache
from longctx.ops.backend import merged, scaled
from longctx.parallel import rules, sequence
from longctx.schema import Bound
from longctx.typing import Segments

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
    """`x / sqrt(mean(x²) + ε) · scale` over the last axis, in float32 (Zhang and Sennrich, 2019).

    Args:
      shape: of the scale: the width, or `(heads, width)` for a scale of each head's own.
      axes: logical names of the scale's axes.
      initial: value of the scale.
    """

    def __init__(self, shape: int | tuple[int, int], axes: tuple[str, ...] = ("embed",), initial: float = 1.0):
        self.scale = nnx.Param(jnp.full(shape, initial, jnp.float32), axes=axes)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        flat = y.reshape(*y.shape[: y.ndim - self.scale.ndim], -1)
        return scaled(flat, self.scale[...].reshape(-1)).reshape(x.shape).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + ε) · scale + shift` over the last axis, in float32 (Ba et al., 2016)."""

    def __init__(self, width: int, axes: tuple[str, ...] = ("embed",)):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes=axes)
        self.shift = nnx.Param(jnp.zeros(width, jnp.float32), axes=axes)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        return (scaled(y, self.scale[...]) + self.shift[...]).astype(x.dtype)


def document(segments: Segments | None, x: Float[Array, "B T D"], state: Any) -> Segments:
    """The segments of a span, for a layer that asks where in its document a token is.

    Args:
      segments: as they are given; None is one document.
      x: inputs of the span.
      state: before the span. None: the document begins with the span. With a `KVCache` in it, which knows the tokens
        before the span, the document goes on.

    Raises:
      ValueError: there are no segments, and a state that does not say how many tokens came before.
    """
    if segments is not None:
        return segments
    batch, length, _ = x.shape
    if state is None:
        return Segments.single(batch, length)
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, KVCache))
    known = [leaf.positions.max(axis=1) + 1 for leaf in leaves if isinstance(leaf, KVCache)]
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
        return sequence.convolution(x, self.kernel[...].astype(x.dtype), state, segments)

    def init_state(self, batch: int) -> Float[Array, "B W-1 D"]:
        """The inputs before any token: zeros, float32."""
        taps, channels = self.kernel.shape
        return jnp.zeros((batch, taps - 1, channels), jnp.float32)


Taps = Annotated[int, Bound(0, 256)]  # of a short convolution; 0: none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Convolved:
    """A mixer's state behind a short convolution: its own, and the last inputs of the convolution."""

    mixer: Any
    conv: Float[Array, "B W-1 C"]


def short_conv(width: int, lags: Sequence[int], rngs: nnx.Rngs, axis: str = "heads") -> ShortConv | None:
    """The convolution in front of a mixer, `ShortConv`; None if `width` is 0."""
    return ShortConv(width, lags, rngs, axis) if width else None


def convolved(conv: ShortConv | None, parts: Sequence[Float[Array, "B T C"]], segments: Segments | None, state: Any):
    """What a mixer begins with, where it may have a short convolution.

    Args:
      conv: over the channels of all parts, one after another; None is none.
      parts: projections, such as queries, keys and values.
      segments: the documents of the span.
      state: before the span, as `behind` gave it; None is the empty one.

    Returns:
      `(parts convolved, the mixer's own state, the last inputs of the convolution)`.
    """
    if conv is None:
        return list(parts), state, None
    mixer, tail = (None, None) if state is None else (state.mixer, state.conv)
    mixed, tail = conv(jnp.concatenate(parts, axis=-1), segments, tail)
    edges = np.cumsum([part.shape[-1] for part in parts])[:-1]
    return jnp.split(mixed, edges, axis=-1), mixer, tail


def behind(state: Any, tail: Float[Array, "B W-1 C"] | None) -> Any:
    """The state of a mixer that may have a short convolution: its own, and that one's last inputs if there are any."""
    return state if tail is None else Convolved(state, tail)


def empty_tail(conv: ShortConv | None, batch: int) -> Float[Array, "B W-1 C"] | None:
    """The inputs of a short convolution before any token."""
    return None if conv is None else conv.init_state(batch)


class Projections(nnx.Module):
    """Queries, keys and values of softmax attention, and the way back: what its mixers derive from.

    Args:
      width: D.
      options: with `heads`, `kv_heads`, `head_width`, `conv_width` (taps on queries, keys and values; 0: none) and
        `qk_norm`.
      rngs: source of the initial values.
      lags: of the convolution, for queries, keys and values; None for keys one token behind the others.
    """

    def __init__(self, width: int, options: Any, rngs: nnx.Rngs, lags: Sequence[int] | None = None):
        self.options = options
        queries, keys = options.heads * options.head_width, options.kv_heads * options.head_width
        self.query = Linear(width, queries, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.kv_heads, options.head_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, keys, ("embed", "heads"), rngs)
        back = undo_values(self.value, options.heads, options.head_width)
        self.out = Linear(queries, width, ("heads", "embed"), rngs, initial=back)
        lags = [0] * queries + [1] * keys + [0] * keys if lags is None else lags
        self.conv = ShortConv(options.conv_width, lags, rngs) if options.conv_width else None
        self.query_norm = RMSNorm(options.head_width, ("head",), initial=1.5) if options.qk_norm else None
        self.key_norm = RMSNorm(options.head_width, ("head",)) if options.qk_norm else None

    def project(self, x: Float[Array, "B T D"], segments: Segments, tail: Float[Array, "B W-1 C"] | None):
        """`(q[B, T, H, K], k[B, T, G, K], v[B, T, G, K], tail)`; the tail is that of the convolution, None without."""
        parts = [self.query(x), self.key(x), self.value(x)]
        width = parts[0].shape[-1]
        if self.conv is not None:
            mixed, tail = self.conv(jnp.concatenate(parts, axis=-1), segments, tail)
            parts = jnp.split(mixed, [width, width + parts[1].shape[-1]], axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.options.head_width) for part in parts)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v, tail


def l2_normalise(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """`x / sqrt(Σx² + 1e-6)` over the last axis, in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
