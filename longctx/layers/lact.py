"""LaCT (Zhang et al., 2025) as a mixer: large-chunk test-time training beside sliding-window attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.attention import Attention, AttentionState
from longctx.layers.basic import Linear, RMSNorm, l2_normalise, like_queries, undo_values
from longctx.ops import lact as ops
from longctx.parallel import sequence
from longctx.schema import Options
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaCTState:
    """What the heads' MLPs have learned from the document, float32, and the window's keys and values."""

    model: ops.State
    window: AttentionState


class LaCT(nnx.Module):
    """Gated MLPs trained on the document, C tokens at a time, and attention to the window that they have not seen yet.

    Each head's f(x) = W1 (silu(W0 x) ⊙ W2 x) is put to q, then learns the mini-batch's (k, v), at rates
    r = softplus(x W_r + b) per token and matrix; q and k are silu(x W), normalised.
    y = attention(x) + norm(f(q)) W_out.
    State: the change of the three matrices, their sums of the mini-batch in progress, and with momentum their last
    updates, `[B, H, M, K]` each; and the `KVCache` of the window.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: int = 4  # H
        head_width: int = 16  # K, of keys and values
        hidden: int = 16  # M, of each head's MLP
        minibatch: int = 16  # C, tokens per update; the paper uses 2,048 and more
        rate: float = 0.1  # r at the beginning; the paper has 1e-3, with mini-batches of 2,048 and more
        momentum: bool = False  # updates are carried on, as much as each token says
        # Updates are orthogonalised (Muon). With fewer tokens than directions, those that no token wrote are rounding
        # errors blown up to the size of the rest, and the layer is chaos.
        orthogonal: bool = False
        window: int = 16  # tokens that attention looks back on; as many as a mini-batch has, that none be missed

        def problems(self):
            if min(self.heads, self.head_width, self.hidden, self.minibatch, self.window) < 1:
                yield f"heads, head_width, hidden, minibatch and window must be at least 1, given {self}"
            if self.rate <= 0:
                yield f"rate is {self.rate}; it must be above 0"
            if self.orthogonal and self.minibatch < max(self.head_width, self.hidden):
                yield (
                    f"minibatch is {self.minibatch}; orthogonal updates want at least as many tokens as head_width and "
                    f"hidden: {max(self.head_width, self.hidden)}"
                )

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        heads, size, hidden = options.heads, options.head_width, options.hidden
        window = Attention.Config(heads=heads, kv_heads=heads, head_width=size, pattern=f"Window({options.window})")
        self.window = Attention(width, window, rngs)
        self.query = Linear(width, heads * size, ("embed", "heads"), rngs)
        like_query = like_queries(self.query, heads, size)
        self.key = Linear(width, heads * size, ("embed", "heads"), rngs, initial=like_query)
        self.value = Linear(width, heads * size, ("embed", "heads"), rngs)
        self.rates = Linear(width, 3 * heads, ("embed", "heads"), rngs)
        start = jnp.log(jnp.expm1(options.rate))
        self.rate_bias = nnx.Param(jnp.full(3 * heads, start, jnp.float32), axes=("heads",))
        self.momentum = Linear(width, heads, ("embed", "heads"), rngs) if options.momentum else None
        normal = jax.nn.initializers.variance_scaling(1.0, "fan_out", "normal", batch_axis=(0,))
        inward, outward = (heads, hidden, size), (heads, size, hidden)
        self.fast_gate = nnx.Param(
            normal(rngs.params(), inward, jnp.float32), axes=("heads", None, "head"), decays=True
        )
        self.fast_down = nnx.Param(
            normal(rngs.params(), outward, jnp.float32), axes=("heads", "head", None), decays=True
        )
        self.fast_up = nnx.Param(normal(rngs.params(), inward, jnp.float32), axes=("heads", None, "head"), decays=True)
        self.norm = RMSNorm(size, ("head",))
        self.out = Linear(heads * size, width, ("heads", "embed"), rngs, initial=undo_values(self.value, heads, size))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments, state: LaCTState | None = None):
        """Returns `(y[B, T, D], LaCTState)`."""
        options = self.options
        batch, length, _ = x.shape
        near, window = self.window(x, segments, None if state is None else state.window)
        shape = (batch, length, options.heads, -1)
        q, k, v = (jax.nn.silu(part(x)).reshape(shape) for part in (self.query, self.key, self.value))
        rates = jax.nn.softplus(self.rates(x).astype(jnp.float32) + self.rate_bias[...]).reshape(shape)
        momentum = None if self.momentum is None else jax.nn.sigmoid(self.momentum(x).astype(jnp.float32))
        y, model = sequence.recurrence(
            ops, l2_normalise(q), l2_normalise(k), v, rates, momentum,
            parameters=(ops.Weights(self.fast_gate[...], self.fast_down[...], self.fast_up[...]),),
            state=None if state is None else state.model, segments=segments,
            minibatch=options.minibatch, orthogonal=options.orthogonal,
        )  # fmt: skip
        return near + self.out(self.norm(y).reshape(batch, length, -1)), LaCTState(model, window)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> LaCTState:
        """Nothing learned, and an empty window; `capacity` does not matter."""
        weights = ops.Weights(
            *(jnp.zeros((batch, *w.shape), jnp.float32) for w in (self.fast_gate, self.fast_down, self.fast_up))
        )
        before = share = None
        if self.options.momentum:
            before, share = weights, jnp.zeros((batch, self.options.heads), jnp.float32)
        return LaCTState(ops.State(weights, weights, before, share), self.window.init_state(batch, capacity, dtype))
