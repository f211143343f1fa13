"""Linear attention (Katharopoulos et al., 2020) as a mixer, with a choice of feature maps.

Group: linear attention and matrix memories with elementwise decay
Transition: S ↦ a ⊙ S + B
Devices: log₂P hops of H·F·(V+2)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, RMSNorm, ShortConv, like_queries, undo_values
from longctx.ops import feature_maps
from longctx.ops import gated_linear as ops
from longctx.parallel import sequence
from longctx.schema import Options, Seed
from longctx.typing import Segments

_MAPS = ("elu", "hedgehog", "performer", "relu2", "taylor")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearAttentionState:
    """The sums, float32, and the last inputs of the convolution (None without one)."""

    matrix: Float[Array, "B H F U"]
    conv: Float[Array, "B W-1 C"] | None


class LinearAttention(nnx.Module):
    """Attention by a kernel φ(q)·φ(k), whose sums over the document so far are the state.

    S_t = S_{t-1} + φ(k_t) v_tᵀ;  z_t = z_{t-1} + φ(k_t);  y_t = S_tᵀ φ(q_t) / max(z_t·φ(q_t), 1e-6).
    Without the normaliser z, y = Sᵀ φ(q) normalised per head. z is one more column of S, written with ones. Hedgehog's
    W are one per head for queries and one for keys, and begin as the identity; its losses of distillation are not here.
    State: `[B, H, F, V + 1]` float32 for F features, `[B, H, F, V]` without the normaliser; and W-1 inputs of the
    convolution, if there is one.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        key_width: int = 16  # K, of queries and keys before the feature map
        value_width: int = 32  # V
        feature_map: str = "elu"  # of ops/feature_maps.py: elu, hedgehog, performer, relu2 or taylor
        features: int = 64  # performer: F; the others' follows from K
        seed: Seed = 0  # performer: of its random directions, which are not trained and shared by heads and layers
        normalise: bool = True  # divide by the sum of the kernel; otherwise by the output's norm
        conv_width: int = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if min(self.heads, self.key_width, self.value_width, self.features) < 1:
                yield f"heads, widths and features must be at least 1, given {self}"
            if self.conv_width < 0:
                yield f"conv_width is {self.conv_width}; it must not be negative"
            if self.feature_map not in _MAPS:
                yield f"feature_map is '{self.feature_map}'; choose one of {', '.join(_MAPS)}"
            if self.feature_map == "performer" and self.key_width > 64:
                yield f"key_width is {self.key_width}; performer's kernel can overflow above 64"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        keys, values = options.heads * options.key_width, options.heads * options.value_width
        self.query = Linear(width, keys, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, options.heads, options.key_width)
        self.key = Linear(width, keys, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, values, ("embed", "heads"), rngs)
        lags = [0] * keys + [1] * keys + [0] * values
        self.conv = ShortConv(options.conv_width, lags, rngs) if options.conv_width else None
        learned = options.feature_map == "hedgehog"
        same = jnp.broadcast_to(jnp.eye(options.key_width), (options.heads, options.key_width, options.key_width))
        names = ("heads", "block", "block_out")
        self.query_map = nnx.Param(jnp.array(same), axes=names, decays=True) if learned else None
        self.key_map = nnx.Param(jnp.array(same), axes=names, decays=True) if learned else None
        self.norm = None if options.normalise else RMSNorm(options.value_width, ("head",))
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: LinearAttentionState | None = None
    ):
        """Returns `(y[B, T, D], LinearAttentionState)`."""
        options = self.options
        batch, length, _ = x.shape

        def heads(y):
            return y.reshape(batch, length, options.heads, -1)

        parts, tail = [self.query(x), self.key(x), self.value(x)], None
        if self.conv is not None:
            mixed, tail = self.conv(jnp.concatenate(parts, axis=-1), segments, None if state is None else state.conv)
            keys = options.heads * options.key_width
            parts = jnp.split(mixed, [keys, 2 * keys], axis=-1)
        q, k, v = map(heads, parts)
        q, k = self._features(q, self.query_map), self._features(k, self.key_map)
        if options.normalise:
            v = jnp.concatenate([v.astype(jnp.float32), jnp.ones(v[..., :1].shape)], axis=-1)
        no_decay = jnp.zeros((batch, length, options.heads))
        matrix = None if state is None else state.matrix
        y, matrix = sequence.recurrence(ops, q, k, v, no_decay, state=matrix, segments=segments)
        # Where nothing was written, both parts are 0, and so is the quotient.
        y = y[..., :-1] / jnp.maximum(y[..., -1:], 1e-6) if options.normalise else self.norm(y)
        return self.out(y.reshape(batch, length, -1).astype(x.dtype)), LinearAttentionState(matrix, tail)

    def _features(self, x, learned):
        options = self.options
        if options.feature_map == "hedgehog":
            return feature_maps.hedgehog(x, learned[...])
        if options.feature_map == "performer":
            projection = feature_maps.orthogonal(options.features, options.key_width, options.seed)
            return feature_maps.performer(x, projection)
        return getattr(feature_maps, options.feature_map)(x)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> LinearAttentionState:
        """The empty memory; `capacity` does not matter."""
        options = self.options
        keys, columns = options.key_width, options.value_width + options.normalise
        pairs = (keys + 1) * (keys + 2) // 2
        features = {"hedgehog": 2 * keys, "performer": options.features, "taylor": pairs}.get(options.feature_map, keys)
        matrix = jnp.zeros((batch, options.heads, features, columns), jnp.float32)
        return LinearAttentionState(matrix, None if self.conv is None else self.conv.init_state(batch))
