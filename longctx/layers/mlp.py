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
    bias: bool = False  # of the projections

    def problems(self):
        if self.hidden < 1:
            yield f"hidden is {self.hidden}; it must be at least 1"
        if self.chunk < 0:
            yield f"chunk is {self.chunk}; give a number of tokens, or 0 for all at once"

    def activation(self, x: Float[Array, "... F"]) -> Float[Array, "... F"]:
        """f of the formulas below."""
        return jax.nn.silu(x)


@dataclasses.dataclass(frozen=True)
class HiddenGELU(Hidden):
    """The options of an MLP whose activation is GELU (Hendrycks and Gimpel, 2016)."""

    tanh: bool = False  # its approximation, x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2

    def activation(self, x):
        return jax.nn.gelu(x, approximate=self.tanh)


@dataclasses.dataclass(frozen=True)
class HiddenReLU2(Hidden):
    """The options of an MLP whose activation is the square of ReLU."""

    def activation(self, x):
        return jnp.square(jax.nn.relu(x))


class Plain(nnx.Module):
    """`f(x W_up) W_down`."""

    def __init__(self, width: int, options: Hidden, rngs: nnx.Rngs):
        self.options = options
        bias = 0.0 if options.bias else None
        self.up = Linear(width, options.hidden, ("embed", "mlp"), rngs, bias)
        self.down = Linear(options.hidden, width, ("mlp", "embed"), rngs, bias)
        # Half the usual size, so that the residual stream begins as mostly the token.
        self.down.weight[...] *= 0.5

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: None = None):
        """Returns `(y[B, T, D], None)`."""
        return by_chunks(type(self).tokens, self, x, self.options.chunk), None

    def tokens(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The MLP of each token."""
        return self.down(self.options.activation(self.up(x)))

    def init_state(self, batch: int, capacity: int, dtype) -> None:
        """This MLP has no state."""


class Gated(Plain):
    """`(f(x W_gate) ⊙ x W_up) W_down` (Shazeer, 2020)."""

    def __init__(self, width: int, options: Hidden, rngs: nnx.Rngs):
        self.gate = Linear(width, options.hidden, ("embed", "mlp"), rngs, 0.0 if options.bias else None)
        super().__init__(width, options, rngs)

    def tokens(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The MLP of each token."""
        return self.down(self.options.activation(self.gate(x)) * self.up(x))


class SwiGLU(Gated):
    """`(silu(x W_gate) ⊙ x W_up) W_down` (Shazeer, 2020), as Llama and Qwen have it."""

    Config = Hidden


class GeGLU(Gated):
    """`(gelu(x W_gate) ⊙ x W_up) W_down` (Shazeer, 2020), as Gemma has it, with `tanh`."""

    Config = HiddenGELU


class GELU(Plain):
    """`gelu(x W_up) W_down`, as GPT-NeoX and Falcon have it, and with `tanh` GPT-2, Phi and StarCoder2."""

    Config = HiddenGELU


class SquaredReLU(Plain):
    """`relu(x W_up)² W_down` (So et al., 2021, "Primer"); cheaper than SwiGLU on a CPU."""

    Config = HiddenReLU2
