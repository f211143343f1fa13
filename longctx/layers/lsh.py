"""Attention within buckets (Reformer, Kitaev et al., 2020; Routing Transformer, Roy et al., 2021) as a mixer.

Group: hierarchical and adaptive attention
Transition: the tokens themselves: concatenation
Devices: keys, values and hashes around a ring: grows with T
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers import reports
from longctx.layers.basic import (
    Linear,
    State,
    Taps,
    convolved,
    document,
    empty_tail,
    l2_normalise,
    short_conv,
    undo_values,
)
from longctx.layers.positions import ROPE, Positions
from longctx.memory.store import Leaf, Ring, Store, extend, heads
from longctx.ops import lsh as ops
from longctx.parallel import sequence
from longctx.schema import Options, Seed
from longctx.typing import Segments


class LSH(nnx.Module):
    """Causal softmax attention of each token to those that fell into its bucket, summed over rounds of hashing.

    Queries are x W; a key is its token's query, of norm 1, and the logit is q · k / √K: the query's norm times the
    cosine, over √K (Reformer's section 2, which omits 1/√K from equation 2 on for clarity). The authors' code (trax,
    and transformers after it) divides keys of norm √K by √K instead, which is `scale=1`.
    The bucket is the nearest of N directions by that cosine: of random ones and their opposites, or of centroids that
    begin there and are drawn to their members.

    What differs from Reformer: a query sees all of its bucket, not two chunks of the sorted row; a key that shares R
    buckets counts R times (`ops/lsh.py`); the random directions have norm 1 and are the same at every step; positions
    are rotary, applied after the bucket is chosen.
    State: `capacity` keys and values, [B, S, H, K] each, and R numbers of buckets per head.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        head_width: int = 32  # K
        positions: Positions = ROPE  # rotary ones of `layers/positions.py`, or {"kind": "nope"}
        rounds: int = 2  # R, of hashing
        buckets: int = 8  # N, a round; work is about T² / N
        seed: Seed = 0  # of the random directions
        scale: float = 0.0  # of the logits; 0: 1 / √K
        centroid_weight: float = (
            0.0  # of a token's Σ (1 - cosine) to its centroids in the training loss; 0: no centroids
        )
        conv_width: Taps = 0  # taps of a causal convolution on queries and values; 0: none

        def problems(self):
            if min(self.heads, self.head_width, self.rounds) < 1:
                yield f"heads, head_width and rounds must be at least 1, given {self}"
            if self.buckets < 2 or self.buckets % 2:
                yield f"buckets is {self.buckets}; give an even number, as directions come with their opposites"
            yield from self.positions.rotary(self.head_width)
            if min(self.centroid_weight, self.scale) < 0:
                yield "centroid_weight and scale must not be negative"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        inner = options.heads * options.head_width
        self.query = Linear(width, inner, ("embed", "heads"), rngs)
        self.value = Linear(width, inner, ("embed", "heads"), rngs)
        back = undo_values(self.value, options.heads, options.head_width)
        self.out = Linear(inner, width, ("heads", "embed"), rngs, initial=back)
        self.conv = short_conv(options.conv_width, [0] * 2 * inner, rngs)
        learned = options.centroid_weight > 0
        self.centroids = nnx.Param(self._random, axes=("heads", None, None, "head")) if learned else None

    @property
    def _random(self) -> Float[Array, "H R N K"]:
        """Directions of norm 1 and their opposites, the same whenever they are drawn."""
        options = self.options
        shape = options.heads, options.rounds, options.buckets // 2, options.head_width
        half = np.random.default_rng(options.seed).standard_normal(shape)
        half /= np.linalg.norm(half, axis=-1, keepdims=True)
        return jnp.asarray(np.concatenate([half, -half], axis=2), jnp.float32)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: Store | None = None):
        """Returns `(y[B, T, D], Store)`."""
        segments = document(segments, x, state)
        batch, length, _ = x.shape
        options = self.options
        # Float32, as rounding must not choose the bucket.
        parts = self.query(x.astype(jnp.float32)), self.value(x)
        parts, state, tail = convolved(self.conv, parts, segments, state)
        parts = parts[0], parts[1].astype(x.dtype)
        q, v = (part.reshape(batch, length, -1, options.head_width) for part in parts)
        k = l2_normalise(q)
        directions = self._random if self.centroids is None else l2_normalise(self.centroids[...])
        hashes, cosine = ops.nearest(jax.lax.stop_gradient(k), directions)
        q, k = q.astype(x.dtype), k.astype(x.dtype)
        q, k = options.positions.rotate(q, k, segments)
        own, documents = (k, v, hashes), {"segments": segments}
        if state is None:
            keys, after = own, self._empty(batch, length, x.dtype).append(own, segments)
        else:
            (keys, held), span, after = extend(state, own, segments, ordered=True)
            documents = {"segments": span, "key_segments": held}
        buckets = ops.Options(options.buckets, options.scale or None)
        y = sequence.attend(ops.LSH, (q, v, hashes), keys, options=buckets, **documents).y
        y = self.out(y.reshape(batch, length, -1))
        if self.centroids is not None:
            distance = jnp.sum(jnp.where(segments.valid[..., None, None], 1 - cosine, 0.0))
            reports.record("centroid_distance", distance, jnp.sum(segments.valid), options.centroid_weight)
        return y, State(after, tail)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> State:
        """The state before any token, with room for `capacity` tokens."""
        return State(self._empty(batch, capacity, dtype), empty_tail(self.conv, batch))

    def leaves(self, dtype) -> tuple[Leaf, ...]:
        """What a token leaves behind: its key, its value and the numbers of its buckets."""
        options = self.options
        buckets = Leaf((options.heads, options.rounds), ("heads", None), jnp.int32, exact=True)
        return *heads(options.heads, options.head_width, dtype), buckets

    def _empty(self, batch: int, capacity: int, dtype) -> Store:
        return Ring().make(self.leaves(dtype), batch, capacity)
