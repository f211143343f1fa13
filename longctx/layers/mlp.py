"""MLPs over the width. They take the mixers' signature, since some of them have a state.

An MLP maps every token on its own, so that its hidden vectors, `[T, F]` and the largest arrays of a block, need not be
held at once: with `chunk` tokens at a time there are `[chunk, F]` of them (`longctx/parallel/chunks.py`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear
from longctx.parallel.chunks import by_chunks
from longctx.schema import Options
from longctx.typing import Segments


@dataclasses.dataclass(frozen=True)
class Hidden(Options):
    """The options of an MLP with one hidden layer."""

    hidden: int = 256  # F
    chunk: int = 0  # tokens of a device's shard that have their hidden vectors at once, at most; 0: all of them

    def problems(self):
        if self.hidden < 1:
            yield f"hidden is {self.hidden}; it must be at least 1"
        if self.chunk < 0:
            yield f"chunk is {self.chunk}; give a number of tokens, or 0 for all at once"


class SwiGLU(nnx.Module):
    """`(silu(x W_gate) ⊙ x W_up) W_down` (Shazeer, 2020)."""

    Config = Hidden

    def __init__(self, width: int, options: Hidden, rngs: nnx.Rngs):
        self.options = options
        self.gate = Linear(width, options.hidden, ("embed", "mlp"), rngs)
        self.up = Linear(width, options.hidden, ("embed", "mlp"), rngs)
        self.down = _down(width, options, rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: None = None):
        """Returns `(y[B, T, D], None)`."""
        return by_chunks(SwiGLU.tokens, self, x, self.options.chunk), None

    def tokens(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The MLP of each token."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def init_state(self, batch: int, capacity: int, dtype) -> None:
        """This MLP has no state."""


class SquaredReLU(nnx.Module):
    """`relu(x W_up)² W_down` (So et al., 2021, "Primer"); cheaper than SwiGLU on a CPU."""

    Config = Hidden

    def __init__(self, width: int, options: Hidden, rngs: nnx.Rngs):
        self.options = options
        self.up = Linear(width, options.hidden, ("embed", "mlp"), rngs)
        self.down = _down(width, options, rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: None = None):
        """Returns `(y[B, T, D], None)`."""
        return by_chunks(SquaredReLU.tokens, self, x, self.options.chunk), None

    def tokens(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The MLP of each token."""
        return self.down(jnp.square(jax.nn.relu(self.up(x))))

    def init_state(self, batch: int, capacity: int, dtype) -> None:
        """This MLP has no state."""


def _down(width: int, options: Hidden, rngs: nnx.Rngs) -> Linear:
    """The projection back, of half the usual size, so that the residual stream begins as mostly the token."""
    down = Linear(options.hidden, width, ("mlp", "embed"), rngs)
    down.weight[...] *= 0.5
    return down
