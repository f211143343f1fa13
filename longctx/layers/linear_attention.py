"""Linear attention (Katharopoulos et al., 2020) as a mixer, with a choice of feature maps."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, RMSNorm, like_queries, undo_values
from longctx.ops import feature_maps
from longctx.ops import gated_linear as ops
from longctx.parallel import sequence
from longctx.typing import Segments

_MAPS = ("elu", "hedgehog", "performer", "relu2", "taylor")


class LinearAttention(nnx.Module):
    """Attention by a kernel φ(q)·φ(k), whose sums over the document so far are the state.

    S_t = S_{t-1} + φ(k_t) v_tᵀ;  z_t = z_{t-1} + φ(k_t);  y_t = S_tᵀ φ(q_t) / max(z_t·φ(q_t), 1e-6).
    Without the normaliser z, y = Sᵀ φ(q) normalised per head. z is one more column of S, written with ones.
    State: `[B, H, F, V + 1]` float32 for F features, `[B, H, F, V]` without the normaliser.
    """

    @dataclasses.dataclass(frozen=True)
    class Config:
        heads: int = 4  # H
        key_width: int = 16  # K, of queries and keys before the feature map
        value_width: int = 32  # V
        feature_map: str = "elu"  # of ops/feature_maps.py: elu, hedgehog, performer, relu2 or taylor
        features: int = 64  # performer: F; the others' follows from K
        seed: int = 0  # performer: of its random directions, which are not trained and shared by heads and layers
        normalise: bool = True  # divide by the sum of the kernel; otherwise by the output's norm

        def problems(self):
            if min(self.heads, self.key_width, self.value_width, self.features) < 1:
                yield f"heads, widths and features must be at least 1, given {self}"
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
        learned = options.feature_map == "hedgehog"
        same = jnp.broadcast_to(jnp.eye(options.key_width), (options.heads, options.key_width, options.key_width))
        names = ("heads", "block", "block_out")
        self.query_map = nnx.Param(jnp.array(same), axes=names) if learned else None
        self.key_map = nnx.Param(jnp.array(same), axes=names) if learned else None
        self.norm = None if options.normalise else RMSNorm(options.value_width, ("head",))
        back = undo_values(self.value, options.heads, options.value_width)
        self.out = Linear(values, width, ("heads", "embed"), rngs, initial=back)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments, state: Float[Array, "B H F U"] | None = None):
        """Returns `(y[B, T, D], state)`."""
        options = self.options
        batch, length, _ = x.shape

        def heads(y):
            return y.reshape(batch, length, options.heads, -1)

        q = self._features(heads(self.query(x)), self.query_map)
        k = self._features(heads(self.key(x)), self.key_map)
        v = heads(self.value(x))
        if options.normalise:
            v = jnp.concatenate([v.astype(jnp.float32), jnp.ones(v[..., :1].shape)], axis=-1)
        no_decay = jnp.zeros((batch, length, options.heads))
        y, state = sequence.recurrence(ops, q, k, v, no_decay, state=state, segments=segments)
        # Where nothing was written, both parts are 0, and so is the quotient.
        y = y[..., :-1] / jnp.maximum(y[..., -1:], 1e-6) if options.normalise else self.norm(y)
        return self.out(y.reshape(batch, length, -1).astype(x.dtype)), state

    def _features(self, x, learned):
        options = self.options
        if options.feature_map == "hedgehog":
            return feature_maps.hedgehog(x, learned[...])
        if options.feature_map == "performer":
            projection = feature_maps.orthogonal(options.features, options.key_width, options.seed)
            return feature_maps.performer(x, projection)
        return getattr(feature_maps, options.feature_map)(x)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> Float[Array, "B H F U"]:
        """The empty memory; `capacity` does not matter."""
        options = self.options
        keys, columns = options.key_width, options.value_width + options.normalise
        pairs = (keys + 1) * (keys + 2) // 2
        features = {"hedgehog": 2 * keys, "performer": options.features, "taylor": pairs}.get(options.feature_map, keys)
        return jnp.zeros((batch, options.heads, features, columns), jnp.float32)
