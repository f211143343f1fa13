"""LaCT (Zhang et al., 2025) as a mixer: large-chunk test-time training beside sliding-window attention.

Group: fast weights and test-time training
Transition: none: the state does not compose
Devices: P-1 hops of the state, device after device; a halo
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.attention import attend
from longctx.layers.basic import Linear, RMSNorm, State, Taps, convolved, document, empty_tail, l2_normalise
from longctx.layers.positions import ROPE, Positions
from longctx.layers.recurrent import projections, qkv_conv
from longctx.memory.store import ATTENDED, Leaf, Ring, Store, extend, heads
from longctx.ops import lact as ops
from longctx.ops.patterns import Causal, Window
from longctx.parallel import sequence
from longctx.schema import Options, Size
from longctx.typing import Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaCTState:
    """What the heads' MLPs have learned from the document, float32, and the window's keys and values."""

    model: ops.State
    window: Store


class LaCT(nnx.Module):
    """Gated MLPs trained on the document, C tokens at a time, and attention to a window of tokens not learned yet.

    Both share q, k, v and the projection of the output. With s and o of each channel, |·| of norm 1 per MLP, and R the
    rotation of the attention's heads by the position in the document, each MLP f(u) = W1 (silu(W0 u) ⊙ W2 u) is given
    R |silu(s_q q + o_q)|, and then learns the mini-batch's (R |silu(s_k k + o_k)|, silu(v)), at rates
    r = softplus(x W_r + b_r) per token and matrix, with momentum σ(x W_m + b_m). W0 and W2 begin a document as a matrix
    of low rank plus half the identity.

        y = (attention(R q, R k, v) + silu(x W_s + b_s) norm(f)) W_out

    State: the change of the three matrices, their sums of the mini-batch in progress, and with momentum their last
    updates, `[B, F, M, K]` each; and keys and values of the window.

    As the authors' language model, whose results on the same weights are a golden of the tests. Not as theirs: the rate
    (see there); ε of the norms, added to squares; float32 where they orthogonalise in bfloat16; initial values of the
    slow projections (`layers/basic.py`). Left out are options that their published configurations do not take: a norm
    of q and k over the width, updates of weights whose norm is not restored ("prenorm"), a rate per channel.

    Source: Zhang et al., "Test-Time Training Done Right", 2025 (arXiv:2505.23884), and the authors' program.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Options):
        heads: Size = 4  # of the attention
        head_width: Size = 16  # of its queries, keys and values
        fast_width: Size = 16  # K, channels of an MLP, of all that there are; the paper has 4 MLPs beside 24 heads
        hidden: Size = 16  # M, of each MLP
        rank: int = 4  # of what W0 and W2 begin as, beside the identity; the paper has 32. 0: matrices of full rank
        minibatch: Size = 16  # C, tokens per update; the paper uses 2,048 and more
        rate: float = 0.1  # r at the beginning: 1.6 for a mini-batch, the paper's 2,048 tokens at 1e-3 are 2.0
        momentum: bool = True  # updates are carried on, as much as each token says
        # Updates are orthogonalised (Muon). With fewer tokens than directions, those that no token wrote are rounding
        # errors blown up to the size of the rest, and the layer is chaos.
        orthogonal: bool = False
        window: Size = 16  # tokens that attention looks back on; as many as a mini-batch has, that none be missed
        positions: Positions = ROPE  # rotary ones of `layers/positions.py`, or {"kind": "nope"}
        conv_width: Taps = 0  # taps of a causal convolution on queries, keys and values; 0: none

        def problems(self):
            if self.heads * self.head_width % self.fast_width:
                yield (
                    f"fast_width is {self.fast_width}; it must divide the channels, heads * head_width = "
                    f"{self.heads * self.head_width}"
                )
            if self.rate <= 0 or self.rank < 0:
                yield f"rate must be above 0 and rank not negative, given {self}"
            yield from self.positions.rotary(self.head_width)
            directions = max(self.fast_width, self.hidden)
            if self.orthogonal and self.minibatch < directions:
                yield (
                    f"minibatch is {self.minibatch}; orthogonal updates want at least as many tokens as an MLP has "
                    f"channels: {directions}"
                )

        @property
        def fast_heads(self) -> int:
            """F, the number of MLPs."""
            return self.heads * self.head_width // self.fast_width

    def __init__(self, width: int, options: Config, rngs: nnx.Rngs):
        self.options = options
        heads, size, fast = options.heads, options.head_width, options.fast_heads
        channels, fast_width = heads * size, options.fast_width
        self.query, self.key, self.value, self.out = projections(width, heads, size, size, rngs)
        self.conv = qkv_conv(options.conv_width, self.query, self.key, self.value, rngs)
        # Of the MLPs' queries and keys.
        self.scale = nnx.Param(jnp.ones((2, channels), jnp.float32), axes=(None, "heads"))
        self.offset = nnx.Param(jnp.zeros((2, channels), jnp.float32), axes=(None, "heads"))
        self.rates = Linear(width, 3 * fast, ("embed", "heads"), rngs, bias=math.log(math.expm1(options.rate)))
        self.momentum = Linear(width, fast, ("embed", "heads"), rngs, bias=0.0) if options.momentum else None
        self.share = Linear(width, fast, ("embed", "heads"), rngs, bias=0.0)
        self.fast_gate = FastWeight(fast, options.hidden, fast_width, options.rank, rngs)
        self.fast_down = FastWeight(fast, fast_width, options.hidden, 0, rngs)
        self.fast_up = FastWeight(fast, options.hidden, fast_width, options.rank, rngs)
        self.norm = RMSNorm(fast_width, ("head",))

    def __call__(self, x: Float[Array, "B T D"], segments: Segments | None = None, state: LaCTState | None = None):
        """Returns `(y[B, T, D], LaCTState)`."""
        segments = document(segments, x, state)
        options = self.options
        batch, length, _ = x.shape
        parts = self.query(x), self.key(x), self.value(x)
        (q, k, v), state, tail = convolved(self.conv, parts, segments, state)
        y, model = self._learned(x, q, k, v, segments, None if state is None else state.model)
        q, k, v = (part.reshape(batch, length, options.heads, -1) for part in (q, k, v))
        q, k = options.positions.rotate(q, k, segments)
        pattern = Causal() & Window(options.window)
        if state is None:
            window, held = self._empty(batch, x.dtype).append((k, v), segments), None
        else:
            ((k, v), held), segments, window = extend(state.window, (k, v), segments)
        near = attend(q, k, v, pattern, segments, held)
        return self.out(near.reshape(y.shape) + y), State(LaCTState(model, window), tail)

    def _learned(self, x, q, k, v, segments: Segments, state: ops.State | None):
        """What the MLPs give, `[B, T, C]`, and their state."""
        options = self.options
        batch, length, _ = x.shape
        scale, offset = self.scale[...].astype(x.dtype), self.offset[...].astype(x.dtype)
        by_head = (batch, length, options.heads, -1)
        by_mlp = (batch, length, options.fast_heads, -1)

        def direction(part, index):
            return l2_normalise(jax.nn.silu(part * scale[index] + offset[index]).reshape(by_mlp)).reshape(by_head)

        rotated = options.positions.rotate(direction(q, 0), direction(k, 1), segments)
        q, k = (part.reshape(by_mlp) for part in rotated)
        rates = jax.nn.softplus(self.rates(x).astype(jnp.float32)).reshape(by_mlp)
        momentum = None if self.momentum is None else jax.nn.sigmoid(self.momentum(x).astype(jnp.float32))
        inputs = q, k, jax.nn.silu(v).reshape(by_mlp), rates, momentum
        static = ops.Options(options.minibatch, options.orthogonal)
        y, state = sequence.run(ops.LACT, inputs, self._initial, state, segments=segments, options=static)
        y = self.norm(y) * jax.nn.silu(self.share(x))[..., None]
        return y.reshape(batch, length, -1), state

    @property
    def _initial(self) -> ops.Weights:
        return ops.Weights(self.fast_gate(), self.fast_down(), self.fast_up())

    def leaves(self, dtype) -> tuple[Leaf, ...]:
        """What a token leaves behind: its key and its value."""
        return heads(self.options.heads, self.options.head_width, dtype, ATTENDED)

    def _empty(self, batch: int, dtype) -> Store:
        return Ring().make(self.leaves(dtype), batch, 0, reach=self.options.window - 1)

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> LaCTState:
        """Nothing learned, and an empty window; `capacity` does not matter."""
        weights = jax.tree.map(lambda w: jnp.zeros((batch, *w.shape), jnp.float32), self._initial)
        before = share = None
        if self.options.momentum:
            before, share = weights, jnp.zeros((batch, self.options.fast_heads), jnp.float32)
        state = LaCTState(ops.State(weights, weights, before, share), self._empty(batch, dtype))
        return State(state, empty_tail(self.conv, batch))


class FastWeight(nnx.Module):
    """What a matrix of each head begins a document as: of low rank, plus half the identity; or any, of variance 1 / J.

    Args:
      heads: F.
      rows, columns: I and J.
      rank: of the product that is added to the identity, both factors normal, of a quarter of the variance that keeps
        norms; 0 for a matrix of full rank without identity.
      rngs: source of the initial values.
    """

    def __init__(self, heads: int, rows: int, columns: int, rank: int, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal
        axes = ("heads", None, None)
        if rank:
            self.left = nnx.Param(
                normal(0.5 * rank**-0.5)(rngs.params(), (heads, rows, rank), jnp.float32), axes=axes, decays=True
            )
            right = normal(0.5 * columns**-0.5)(rngs.params(), (heads, rank, columns), jnp.float32)
            self.right = nnx.Param(right, axes=axes, decays=True)
        else:
            self.weight = nnx.Param(
                normal(columns**-0.5)(rngs.params(), (heads, rows, columns), jnp.float32), axes=axes, decays=True
            )
        self.rank = rank

    def __call__(self) -> Float[Array, "F I J"]:
        """The matrices, float32."""
        if not self.rank:
            return self.weight[...]
        left, right = self.left[...], self.right[...]
        product = jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
        return product + 0.5 * jnp.eye(left.shape[1], right.shape[2])
