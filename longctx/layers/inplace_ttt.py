"""In-Place TTT (ICLR 2026) as an MLP: a gated MLP that goes on learning its last matrix from the document.

Group: fast weights and test-time training
Transition: S ↦ a ⊙ S + B with a constant a
Devices: log₂P hops of 3·F·D; or its tokens, D+F numbers each, where they are fewer than F·D
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import State, document
from longctx.layers.mlp import SwiGLU
from longctx.layers.recurrent import Recurrent
from longctx.ops import inplace_ttt as ops
from longctx.schema import Options, Size
from longctx.typing import Segments


class InPlaceTTT(Recurrent):
    """A SwiGLU whose W_down is the starting point of weights that the document writes, C tokens at a time.

    z = silu(x W_gate) ⊙ (x W_up);  y = z (W_down + ΔW_i) for the tokens of mini-batch i of the document, ΔW_0 = 0;
    ΔW_{i+1} = decay ΔW_i + clip(η zᵀ v) over mini-batch i, with targets v = conv(e) W_target from within it. e are the
    embeddings of the tokens, as the authors advise for training from scratch, or x, for a model that is continued.
    Without embeddings, as in a layer alone or in coarser rows, x stands for them.
    The convolution begins as zeros, so that the layer begins as the SwiGLU it continues, to the bit.
    State: ΔW and the sum of the mini-batch in progress, `[B, F, D]` each, and (W-1)/2 tokens of z and of targets.

    Not as published: `decay`, ours, 1 by default; document starts reset ΔW, and a mini-batch counts from there; rate
    and clip are options, where the authors' program has no clip; e is scaled to unit variance, as the model embeds.

    Source: "In-Place Test-Time Training", ICLR 2026 (arXiv:2604.06169), section 3, and the authors' program.
    """

    reads_embedded = True  # see `models/block.py`

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        hidden: Size = 128  # F
        minibatch: Size = 16  # C, tokens per update; the paper finds 512 to 1,024 best for models of billions
        conv_width: Size = 5  # taps of the targets' convolution, centred: odd
        targets: str = "embeddings"  # what they are made of: "embeddings" of the tokens, or the MLP's "inputs"
        rate: float = 0.3  # η
        clip: float = 0.0  # largest Frobenius norm of an update, 0: any; the paper uses 1e-5 on long inputs
        decay: float = 1.0  # what an update leaves of ΔW; less than 1 is ours, not the paper's

        def problems(self):
            if self.conv_width % 2 == 0:
                yield f"conv_width is {self.conv_width}; give an odd number"
            if self.targets not in ("embeddings", "inputs"):
                yield f"targets is '{self.targets}'; give 'embeddings' or 'inputs'"
            if min(self.rate, self.clip) < 0 or not 0 <= self.decay <= 1:
                yield f"rate and clip must not be negative, and decay must be from 0 to 1, given {self}"

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        mlp = SwiGLU(width, SwiGLU.Config(options.hidden), rngs)
        self.gate, self.up, self.down = mlp.gate, mlp.up, mlp.down
        self.taps = nnx.Param(jnp.zeros((options.conv_width, width), jnp.float32), axes=("taps", "embed"))
        diagonal = 0.02 * jax.random.normal(rngs.params(), (width,), jnp.float32)
        self.target = nnx.Param(jnp.diag(diagonal), axes=("embed", "width"), decays=True)

    @classmethod
    def from_swiglu(cls, mlp: SwiGLU, options: Config, rngs: nnx.Rngs) -> InPlaceTTT:
        """The layer that computes what `mlp` does until its convolution is trained; parameters are copied.

        Raises:
          ValueError: `options.hidden` is not the hidden width of `mlp`.
        """
        width, hidden = mlp.gate.weight.shape
        if options.hidden != hidden:
            raise ValueError(f"hidden is {options.hidden} and that of the MLP is {hidden}; give {hidden}.")
        layer = cls(width, options, rngs)
        for name in ("gate", "up", "down"):
            getattr(layer, name).weight[...] = jnp.array(getattr(mlp, name).weight[...], copy=True)
        return layer

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Segments | None = None,
        state: State | None = None,
        embedded: Float[Array, "B T D"] | None = None,
    ):
        """Returns `(y[B, T, D], State)`."""
        segments = document(segments, x, state)
        options = self.options
        _, run = self.begin([], segments, state)
        z = jax.nn.silu(self.gate(x)) * self.up(x)
        source = x if embedded is None or options.targets == "inputs" else embedded
        static = {name: getattr(options, name) for name in ("minibatch", "rate", "clip", "decay")}
        y, state = run(ops.INPLACE_TTT, z, source, parameters=(self.taps[...], self.target[...]), **static)
        return self.down(z) + y, state
