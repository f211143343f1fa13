"""MLPs over the width. They take the mixers' signature, since some of them have a state."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear
from longctx.typing import Segments


@dataclasses.dataclass(frozen=True)
class Hidden:
    """The options of an MLP with one hidden layer."""

    hidden: int = 256  # F

    def problems(self):
        if self.hidden < 1:
            yield f"hidden is {self.hidden}; it must be at least 1"


class SwiGLU(nnx.Module):
    """`(silu(x W_gate) ⊙ x W_up) W_down` (Shazeer, 2020)."""

    Config = Hidden

    def __init__(self, width: int, options: Hidden, rngs: nnx.Rngs):
        self.gate = Linear(width, options.hidden, ("embed", "mlp"), rngs)
        self.up = Linear(width, options.hidden, ("embed", "mlp"), rngs)
        self.down = _down(width, options, rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments, state: None = None):
        """Returns `(y[B, T, D], None)`."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x)), None

    def init_state(self, batch: int, capacity: int, dtype) -> None:
        """This MLP has no state."""


class SquaredReLU(nnx.Module):
    """`relu(x W_up)² W_down` (So et al., 2021, "Primer"); cheaper than SwiGLU on a CPU."""

    Config = Hidden

    def __init__(self, width: int, options: Hidden, rngs: nnx.Rngs):
        self.up = Linear(width, options.hidden, ("embed", "mlp"), rngs)
        self.down = _down(width, options, rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments, state: None = None):
        """Returns `(y[B, T, D], None)`."""
        return self.down(jnp.square(jax.nn.relu(self.up(x)))), None

    def init_state(self, batch: int, capacity: int, dtype) -> None:
        """This MLP has no state."""


def _down(width: int, options: Hidden, rngs: nnx.Rngs) -> Linear:
    """The projection back, of half the usual size, so that the residual stream begins as mostly the token."""
    down = Linear(options.hidden, width, ("mlp", "embed"), rngs)
    down.weight[...] *= 0.5
    return down
