"""The linear recurrent unit (Orvieto et al., 2023) as a mixer.

Group: diagonal state spaces and recurrences
Transition: s ↦ a ⊙ s + b
Devices: log₂P hops of 2·N
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, State, Taps, short_conv
from longctx.layers.recurrent import Recurrent
from longctx.ops.linear_scan import LINEAR_SCAN
from longctx.schema import Options, Size
from longctx.typing import Segments


class LRU(Recurrent):
    """A diagonal linear recurrence with complex eigenvalues, the same for all tokens, and a gated linear unit.

    λ = exp(-exp(ν) + i exp(θ));  h_t = λ ⊙ h_{t-1} + exp(γ) ⊙ x_t B;  u = gelu(Re(h C) + d ⊙ x);
    y = u W ⊙ σ(u W_g). B and C are complex; exp(γ) begins as √(1 - |λ|²). State: `[B, N]` complex64.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        hidden: Size = 64  # N, complex numbers
        r_min: float = 0.9  # eigenvalues begin uniform on the ring between this radius
        r_max: float = 0.999  # and this one
        max_phase: float = math.pi / 10  # and between the angles 0 and this
        conv_width: Taps = 0  # taps of a causal convolution on the inputs; 0: none

        def problems(self):
            if not 0 <= self.r_min < self.r_max < 1 or self.max_phase <= 0:
                yield f"r_min, r_max and max_phase must be 0 <= r_min < r_max < 1 and above 0, given {self}"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        hidden, axes = options.hidden, ("heads",)
        squares = jax.random.uniform(rngs.params(), (hidden,), minval=options.r_min**2, maxval=options.r_max**2)
        phase = options.max_phase * (1 - jax.random.uniform(rngs.params(), (hidden,)))
        self.log_rate = nnx.Param(jnp.log(-0.5 * jnp.log(squares)), axes=axes)
        self.log_phase = nnx.Param(jnp.log(phase), axes=axes)
        self.log_scale = nnx.Param(0.5 * jnp.log1p(-squares), axes=axes)
        real, imaginary = jax.random.normal(rngs.params(), (2, width, hidden)) / math.sqrt(2 * width)
        self.write_real = Linear(width, hidden, ("embed", "heads"), rngs, initial=real, decays=False)
        self.write_imaginary = Linear(width, hidden, ("embed", "heads"), rngs, initial=imaginary, decays=False)
        self.read_real = Linear(hidden, width, ("heads", "embed"), rngs)
        self.read_imaginary = Linear(hidden, width, ("heads", "embed"), rngs)
        self.conv = short_conv(options.conv_width, [0] * width, rngs, axis="width")
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (width,), jnp.float32), axes=("embed",))
        self.out = Linear(width, width, ("embed", "width"), rngs)
        self.gate = Linear(width, width, ("embed", "width"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        (x,), run = self.begin([x], segments, state)
        u = jax.lax.complex(*(write(x).astype(jnp.float32) for write in (self.write_real, self.write_imaginary)))
        log_decay = jax.lax.complex(-jnp.exp(self.log_rate[...]), jnp.exp(self.log_phase[...]))
        h, state = run(LINEAR_SCAN, jnp.exp(self.log_scale[...]) * u, jnp.broadcast_to(log_decay, u.shape))
        y = self.read_real(h.real.astype(x.dtype)) - self.read_imaginary(h.imag.astype(x.dtype))
        y = jax.nn.gelu(y + self.skip[...].astype(x.dtype) * x)
        return self.out(y) * jax.nn.sigmoid(self.gate(y)), state
