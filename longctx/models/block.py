"""A residual block: a mixer over the sequence, then an MLP over the width, each behind a norm."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from longctx import config
from longctx.layers import MIXERS, MLPS
from longctx.layers.basic import RMSNorm
from longctx.typing import Segments


class Block(nnx.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`; the state is the pair of theirs.

    An MLP whose class says `reads_embedded = True` is also given the embeddings of the span's tokens, `embedded=`.
    """

    def __init__(self, width: int, options: config.Block, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(width)
        self.mixer = MIXERS[options.mixer.kind](width, options.mixer, rngs)
        self.mlp_norm = RMSNorm(width)
        self.mlp = MLPS[options.mlp.kind](width, options.mlp, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Segments | None = None,
        state: tuple | None = None,
        embedded: Float[Array, "B T D"] | None = None,
    ):
        """Returns `(y[B, T, D], (state of the mixer, state of the MLP))`."""
        mixer_state, mlp_state = (None, None) if state is None else state
        with jax.named_scope(type(self.mixer).__name__):
            y, mixer_state = self.mixer(self.mixer_norm(x), segments, mixer_state)
        x = x + y
        with jax.named_scope(type(self.mlp).__name__):
            more = {"embedded": embedded} if getattr(type(self.mlp), "reads_embedded", False) else {}
            y, mlp_state = self.mlp(self.mlp_norm(x), segments, mlp_state, **more)
        return x + y, (mixer_state, mlp_state)

    def init_state(self, batch: int, capacity: int, dtype) -> tuple:
        """The state of both before any token, with room for `capacity` tokens."""
        return self.mixer.init_state(batch, capacity, dtype), self.mlp.init_state(batch, capacity, dtype)
