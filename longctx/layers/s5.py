"""S5 (Smith, Warrington and Linderman, 2022) as a mixer.

Group: diagonal state spaces and recurrences
Transition: s ↦ a ⊙ s + b
Devices: log₂P hops of 2·N
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import Linear, State, Taps, short_conv
from longctx.layers.recurrent import Recurrent
from longctx.ops.linear_scan import LINEAR_SCAN
from longctx.schema import Options, Size
from longctx.typing import Segments


class S5(Recurrent):
    """A diagonal state-space model of many inputs and outputs, s' = Λ s + B x, y = 2 Re(C s) + d x, made discrete.

    With a learned step Δ per state, as zero-order hold: a = exp(Δ Λ), scale (a - 1) / Λ; or bilinear:
    a = (1 + ΔΛ/2) / (1 - ΔΛ/2), scale Δ / (1 - ΔΛ/2). Then h_t = a ⊙ h_{t-1} + scale ⊙ x_t B;
    u = gelu(2 Re(h C) + d ⊙ x); y = u ⊙ σ(u W). Of each pair of conjugate states one is kept: N of the 2 N
    eigenvalues. They begin as those of the normal part of HiPPO-LegS, -1/2 + i ω. State: `[B, N]` complex64.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        hidden: Size = 64  # N, complex numbers: half the size of the state-space model
        discretisation: str = "zoh"  # zoh, for zero-order hold, or bilinear
        step_min: float = 1e-3  # the steps begin between these two, uniform in their logarithm
        step_max: float = 1e-1  # the longest
        conv_width: Taps = 0  # taps of a causal convolution on the inputs; 0: none

        def problems(self):
            if self.discretisation not in ("zoh", "bilinear"):
                yield f"discretisation is '{self.discretisation}'; choose zoh or bilinear"
            if not 0 < self.step_min <= self.step_max:
                yield f"step_min is {self.step_min} and step_max {self.step_max}; 0 < step_min <= step_max must hold"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        hidden, axes = options.hidden, ("heads",)
        # The normal part of HiPPO-LegS is -1/2 plus a skew-symmetric matrix. In the basis of its eigenvectors, a
        # normal B or C is normal again: they are drawn there.
        root = np.sqrt(2 * np.arange(2 * hidden) + 1)
        upper = np.triu(np.outer(root, root), 1) / 2
        frequencies = np.linalg.eigvalsh(1j * (upper - upper.T))[hidden:]
        self.log_rate = nnx.Param(jnp.full(hidden, jnp.log(0.5)), axes=axes)
        self.frequency = nnx.Param(jnp.asarray(frequencies, jnp.float32), axes=axes)
        low, high = np.log(options.step_min), np.log(options.step_max)
        self.log_step = nnx.Param(jax.random.uniform(rngs.params(), (hidden,), minval=low, maxval=high), axes=axes)
        real, imaginary = jax.random.normal(rngs.params(), (2, width, hidden)) / np.sqrt(2 * width)
        self.write_real = Linear(width, hidden, ("embed", "heads"), rngs, initial=real, decays=False)
        self.write_imaginary = Linear(width, hidden, ("embed", "heads"), rngs, initial=imaginary, decays=False)
        real, imaginary = jax.random.normal(rngs.params(), (2, hidden, width)) / np.sqrt(4 * hidden)
        self.read_real = Linear(hidden, width, ("heads", "embed"), rngs, initial=real)
        self.read_imaginary = Linear(hidden, width, ("heads", "embed"), rngs, initial=imaginary)
        self.conv = short_conv(options.conv_width, [0] * width, rngs, axis="width")
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (width,), jnp.float32), axes=("embed",))
        self.gate = Linear(width, width, ("embed", "width"), rngs)

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: State | None = None):
        """Returns `(y[B, T, D], State)`."""
        (x,), run = self.begin([x], segments, state)
        eigenvalues = jax.lax.complex(-jnp.exp(self.log_rate[...]), self.frequency[...])
        log_decay, scale = self._discrete(eigenvalues, jnp.exp(self.log_step[...]))
        u = jax.lax.complex(*(write(x).astype(jnp.float32) for write in (self.write_real, self.write_imaginary)))
        h, state = run(LINEAR_SCAN, scale * u, jnp.broadcast_to(log_decay, u.shape))
        y = self.read_real(h.real.astype(x.dtype)) - self.read_imaginary(h.imag.astype(x.dtype))
        y = jax.nn.gelu(2 * y + self.skip[...].astype(x.dtype) * x)
        return y * jax.nn.sigmoid(self.gate(y)), state

    def _discrete(self, eigenvalues, step):
        """The log decay of a step, and the factor of what is written in it."""
        if self.options.discretisation == "zoh":
            return step * eigenvalues, jnp.expm1(step * eigenvalues) / eigenvalues
        half = step * eigenvalues / 2
        return jnp.log1p(half) - jnp.log1p(-half), step / (1 - half)
