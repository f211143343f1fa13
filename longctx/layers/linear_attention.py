"""Linear attention (Katharopoulos et al., 2020) as a mixer, with a choice of feature maps.

Group: linear attention and matrix memories with elementwise decay
Transition: S ↦ a ⊙ S + B
Devices: log₂P hops of H·F·(V+2)
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import RMSNorm, State, Taps
from longctx.layers.recurrent import Recurrent, by_head, flat, projections, qkv_conv
from longctx.ops import feature_maps
from longctx.ops.gated_linear import GATED_LINEAR
from longctx.schema import Options, Seed, Size
from longctx.typing import Segments

_MAPS = ("elu", "hedgehog", "performer", "relu2", "taylor")


class LinearAttention(Recurrent):
    """Attention by a kernel φ(q)·φ(k), whose sums over the document so far are the state.

    S_t = S_{t-1} + φ(k_t) v_tᵀ;  z_t = z_{t-1} + φ(k_t);  y_t = S_tᵀ φ(q_t) / max(z_t·φ(q_t), 1e-6).
    Without the normaliser z, y = Sᵀ φ(q) normalised per head. z is one more column of S, written with ones. Hedgehog's
    W are one per head for queries and one for keys, and begin as the identity; its losses of distillation are not here.
    State: `[B, H, F, V + 1]` float32 for F features, `[B, H, F, V]` without the normaliser; and W-1 inputs of the
    convolution, if there is one.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # H
        key_width: Size = 16  # K, of queries and keys before the feature map
        value_width: Size = 32  # V
        feature_map: str = "elu"  # of ops/feature_maps.py: elu, hedgehog, performer, relu2 or taylor
        features: Size = 64  # performer: F; the others' follows from K
        seed: Seed = 0  # performer: of its random directions, which are not trained and shared by heads and layers
        normalise: bool = True  # divide by the sum of the kernel; otherwise by the output's norm
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if self.feature_map not in _MAPS:
                yield f"feature_map is '{self.feature_map}'; choose one of {', '.join(_MAPS)}"
            if self.feature_map == "performer" and self.key_width > 64:
                yield f"key_width is {self.key_width}; performer's kernel can overflow above 64"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        shape = options.heads, options.key_width, options.value_width
        self.query, self.key, self.value, self.out = projections(width, *shape, rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        learned = options.feature_map == "hedgehog"
        same = jnp.broadcast_to(jnp.eye(options.key_width), (options.heads, options.key_width, options.key_width))
        names = ("heads", "block", "block_out")
        self.query_map = nnx.Param(jnp.array(same), axes=names, decays=True) if learned else None
        self.key_map = nnx.Param(jnp.array(same), axes=names, decays=True) if learned else None
        self.norm = None if options.normalise else RMSNorm(options.value_width, ("head",))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
        q, k, v = (by_head(part, self.options.heads) for part in parts)
        q, k = self._features(q, self.query_map), self._features(k, self.key_map)
        if self.options.normalise:
            v = jnp.concatenate([v.astype(jnp.float32), jnp.ones(v[..., :1].shape)], axis=-1)
        y, state = run(GATED_LINEAR, q, k, v, jnp.zeros(v.shape[:3]))
        # Where nothing was written, both parts are 0, and so is the quotient.
        y = y[..., :-1] / jnp.maximum(y[..., -1:], 1e-6) if self.options.normalise else self.norm(y)
        return self.out(flat(y).astype(x.dtype)), state

    def _features(self, x, learned):
        options = self.options
        if options.feature_map == "hedgehog":
            return feature_maps.hedgehog(x, learned[...])
        if options.feature_map == "performer":
            projection = feature_maps.orthogonal(options.features, options.key_width, options.seed)
            return feature_maps.performer(x, projection)
        return getattr(feature_maps, options.feature_map)(x)
