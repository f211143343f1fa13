"""Titans (Behrouz et al., 2025) as a mixer: a neural memory, alone, before sliding-window attention, or gating it.

Group: fast weights and test-time training
Transition: none: the state does not compose
Devices: P-1 hops of the state, device after device; a halo
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.attention import Attention, AttentionState
from longctx.layers.basic import Linear, RMSNorm, State, document, l2_normalise
from longctx.layers.recurrent import Recurrent, by_head, flat, projections, qkv_conv
from longctx.ops import titans as ops
from longctx.schema import Options, Size
from longctx.typing import Segments

_AXES = ("heads", "head", None)  # of a matrix per head


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TitansState:
    """The memory's weights and surprise, float32, with the convolution's last inputs; and the window, None without."""

    memory: State
    window: AttentionState | None


class NeuralMemory(Recurrent):
    """A mixer whose memory is an MLP per head: its gates per token, and the weights that a document begins with."""

    def _make_memory(self, rngs: nnx.Rngs) -> None:
        options, heads, size = self.options, self.options.heads, self.options.head_width
        self.forget = Linear(self.width, heads, ("embed", "heads"), rngs)
        self.momentum = Linear(self.width, heads, ("embed", "heads"), rngs, bias=0.0)
        self.rate = Linear(self.width, heads, ("embed", "heads"), rngs, bias=0.0)
        # The heads begin by forgetting over spans of 10 to 1,000 tokens.
        forget = jnp.geomspace(1e-3, 1e-1, heads)
        self.forget_bias = nnx.Param(jnp.log(forget) - jnp.log1p(-forget), axes=("heads",))
        shapes = [(size, size)] if options.depth == 1 else [(size, options.hidden), (options.hidden, size)]
        normal = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
        first, *second = (
            nnx.Param(normal(rngs.params(), (heads, *s), jnp.float32), axes=_AXES, decays=True) for s in shapes
        )
        self.memory_in, self.memory_out = first, second[0] if second else None

    @property
    def _initial(self) -> ops.Weights:
        return tuple(w[...] for w in (self.memory_in, self.memory_out) if w is not None)


class Titans(NeuralMemory):
    """An MLP per head that learns the document token by token, with momentum η, forgetting α and rate θ per token.

    m_t = M_t(q_t), S_t = η_t S_{t-1} - θ_t ∇|M(k_t) - v_t|², M_t = (1 - α_t) M_{t-1} + S_t, the gradient at the weights
    that the mini-batch started from. q, k, v come from a projection, a short convolution and SiLU; q and k have norm 1.
    With m normalised per head, gated by silu(x W_g) and projected, and attention to a window and to learned tokens p,

        mode "layer" (memory as a layer): y = attention(m), or m itself without a window
        mode "gate" (memory as a gate):   y = norm(attention(x)) ⊙ σ(norm(m)), with a learned scale per channel in each

    State: for each layer of the memory the weights, those at the mini-batch's start, and the surprise, `[B, H, ...]`
    float32; W-1 inputs of the convolution; and the window's `AttentionState`.

    There is no program of the authors'. As the paper has it, sections 3.1, 4.2 to 4.4, but for these: p is not put to
    the memory before a document, since what it would learn of p is a function of parameters alone, as the weights are
    that it starts from; in mode "layer" p is put to the attention, where the paper has the memory's outputs for p in
    the first window; the attention has rotary positions (the paper says nothing of any), q and k of a root mean square
    of 1 with learned scales, and no SiLU; in "gate" the paper leaves the non-linearity open, and we gate by one side;
    θ is at most `rate`, since steps of repeated keys diverge; initial values are those of `layers/basic.py`.

    Source: Behrouz et al., "Titans: Learning to Memorize at Test Time", 2025 (arXiv:2501.00663).
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 2  # H
        head_width: Size = 16  # K, of keys and values
        depth: int = 2  # layers of the memory: 1 or 2
        hidden: Size = 16  # width between the two layers
        minibatch: Size = 16  # C, tokens whose gradients are taken at the same weights
        rate: float = 0.02  # largest θ; repeated keys may diverge where C θ / (1 - η) is above 1
        conv_width: Size = 4  # taps of the convolutions, in the memory and in the attention
        mode: str = "layer"  # "layer" or "gate"
        window: int = 16  # tokens that attention looks back on; 0: no attention
        persistent: int = 4  # learned tokens that the attention reads besides

        def problems(self):
            if self.depth not in (1, 2):
                yield f"depth is {self.depth}; give 1 or 2"
            if min(self.rate, self.window, self.persistent) < 0:
                yield f"rate, window and persistent must not be negative, given {self}"
            if self.mode not in ("layer", "gate") or (self.mode == "gate" and not self.window):
                yield f"mode is '{self.mode}'; give 'layer', or 'gate' with a window"
            yield from self.attention.problems() if self.window else ()

        @property
        def attention(self) -> Attention.Config:
            """The options of the attention to the window."""
            shared = {name: getattr(self, name) for name in ("heads", "head_width", "conv_width", "persistent")}
            return Attention.Config(**shared, kv_heads=self.heads, pattern=f"Window({self.window})")

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        super().__init__(width, options)
        heads, size = options.heads, options.head_width
        channels = heads * size
        self.query, self.key, self.value, self.out = projections(width, heads, size, size, rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        self._make_memory(rngs)
        self.norm = RMSNorm(size, ("head",))
        self.gate = Linear(width, channels, ("embed", "heads"), rngs)
        self.window = Attention(width, options.attention, rngs) if options.window else None
        self.near_norm = RMSNorm(width) if options.mode == "gate" else None
        self.gate_norm = RMSNorm(width) if options.mode == "gate" else None

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: TitansState | None = None):
        """Returns `(y[B, T, D], TitansState)`."""
        segments = document(segments, x, state)
        options, (memory, window) = self.options, (None, None) if state is None else (state.memory, state.window)
        parts, run = self.begin([self.query(x), self.key(x), self.value(x)], segments, memory)
        q, k, v = (by_head(jax.nn.silu(part), options.heads) for part in parts)
        log_keep = jax.nn.log_sigmoid(-(self.forget(x).astype(jnp.float32) + self.forget_bias[...]))
        log_momentum = jax.nn.log_sigmoid(self.momentum(x).astype(jnp.float32))
        rate = options.rate * jax.nn.sigmoid(self.rate(x).astype(jnp.float32))
        y, memory = run(
            ops.TITANS, l2_normalise(q), l2_normalise(k), v, rate, log_keep, log_momentum, parameters=(self._initial,),
            minibatch=options.minibatch,
        )  # fmt: skip
        y = self.out(flat(self.norm(y)) * jax.nn.silu(self.gate(x)))
        if self.window is not None:
            near, window = self.window(y if options.mode == "layer" else x, segments, window)
            y = near if options.mode == "layer" else self.near_norm(near) * jax.nn.sigmoid(self.gate_norm(y))
        return y, TitansState(memory, window)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> TitansState:
        """Nothing learned, and an empty window; `capacity` does not matter."""
        zeros = tuple(jnp.zeros((batch, *w.shape), jnp.float32) for w in self._initial)
        window = None if self.window is None else self.window.init_state(batch, capacity, dtype)
        return TitansState(State(ops.State(zeros, zeros, zeros), self.conv.init_state(batch)), window)
