"""A stack of layers at a coarser resolution (Nawrot et al., 2021) as a mixer: downsample, process, upsample.

Group: resolution
Transition: those of the mixers inside
Devices: what the mixers inside send; a halo of C-1 inputs, and what two neighbouring groups exchange
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.architecture import Mixer
from longctx.layers.basic import Linear, RMSNorm, ShortConv, State, Taps, convolved, document, empty_tail, short_conv
from longctx.layers.gated_delta import GatedDelta
from longctx.layers.mlp import Hidden, SwiGLU
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments

_INNER = GatedDelta.Config()  # the default
_LAYERS = 16  # at most: they are no scan, and each is compiled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MultiResolutionState:
    """The last inputs, what tokens read of the last whole group, and the states of the layers inside."""

    conv: Float[Array, "B C-1 D"]
    read: Float[Array, "B C D"]
    inner: tuple[Any, ...]


class MultiResolution(nnx.Module):
    """Layers over one token for every `factor` tokens of a document (`ops/resolution.py`).

    A coarse token is a learned weighted sum of its group, per channel, and a projection of that; then `layers` times
    `z + mixer(norm(z))`, `z + mlp(norm(z))`; a projection makes of the result what each of the tokens after it reads,
    to which the weighted sum at the token itself is added (Nawrot et al., 2021, Hourglass). State: `factor` - 1 inputs,
    `factor` outputs, and the states of the mixers for `capacity` / `factor` tokens.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        factor: int = 4  # C, tokens of a coarse token
        layers: int = 1  # inside
        hidden: int = 256  # F of their MLPs, SwiGLU
        inner: Mixer = _INNER  # their mixer, such as {"kind": "attention", "heads": 8}
        conv_width: Taps = 0  # taps of a causal convolution on the inputs; 0: none

        def problems(self):
            if min(self.factor, self.layers, self.hidden) < 1:
                yield f"factor, layers and hidden must be at least 1, given {self.factor}, {self.layers}, {self.hidden}"
            if self.all_layers > _LAYERS:
                yield f"layers is {self.layers}; with those of layers within, at most {_LAYERS} are possible"

        @property
        def all_layers(self) -> int:
            """Those inside, and inside those."""
            within = getattr(self.inner, "all_layers", 0)
            return self.layers * (1 + within)

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        self.conv = short_conv(options.conv_width, [0] * width, rngs, axis="width")
        # The newest token shows first; the others come in with noise.
        self.pool = ShortConv(options.factor, [0] * width, rngs)
        self.down = Linear(width, width, ("embed", "heads"), rngs)
        mixer = Mixer.kinds[options.inner.kind]
        self.mixers = nnx.List([mixer(width, options.inner, rngs) for _ in range(options.layers)])
        self.mlps = nnx.List([SwiGLU(width, Hidden(options.hidden), rngs) for _ in range(options.layers)])
        self.norms = nnx.List([RMSNorm(width) for _ in range(2 * options.layers)])
        self.up = Linear(width, options.factor * width, ("heads", "embed"), rngs)
        self.out = Linear(width, width, ("embed", "heads"), rngs)

    def __call__(
        self, x: Float[Array, "B T D"], segments: Segments | None = None, state: MultiResolutionState | None = None
    ):
        """Returns `(y[B, T, D], MultiResolutionState)`."""
        segments = document(segments, x, state)
        factor = self.options.factor
        (x,), state, last = convolved(self.conv, (x,), segments, state)
        pooled, tail = self.pool(x, segments, None if state is None else state.conv)
        z, coarse = sequence.coarsen(self.down(pooled), segments, factor)
        states = []
        for n, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            y, after = mixer(self.norms[2 * n](z), coarse, None if state is None else state.inner[n])
            z += y
            z += mlp(self.norms[2 * n + 1](z), coarse)[0]
            states.append(after)
        u = self.up(z).reshape(*z.shape[:2], factor, -1)
        read = jnp.zeros(u.shape[:1] + u.shape[2:], jnp.float32) if state is None else state.read
        y = self.out(pooled + sequence.refine(u, read.astype(u.dtype), segments))
        # By a sum, which devices that share the row can each begin.
        newest = coarse.valid & (jnp.cumsum(coarse.valid[:, ::-1], axis=1)[:, ::-1] == 1)
        latest = jnp.sum(jnp.where(newest[..., None, None], u.astype(jnp.float32), 0), axis=1)
        read = jnp.where(coarse.valid.any(1)[:, None, None], latest, read)
        return y, State(MultiResolutionState(tail, read, tuple(states)), last)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> MultiResolutionState:
        """The state before any token, with room for `capacity` tokens."""
        factor, width = self.options.factor, self.down.weight.shape[0]
        inner = tuple(mixer.init_state(batch, -(-capacity // factor), dtype) for mixer in self.mixers)
        state = MultiResolutionState(self.pool.init_state(batch), jnp.zeros((batch, factor, width)), inner)
        return State(state, empty_tail(self.conv, batch))
