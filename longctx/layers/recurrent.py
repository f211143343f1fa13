"""What recurrent mixers share: projections, the short convolution, the state, and the call into the op.

A mixer has its parameters, and in `__call__` its mathematics from `begin` to `out`:

    (q, k, v), run = self.begin([self.query(x), self.key(x), self.value(x)], segments, state)
    y, state = run(FAMILY, q, k, v, ...)
    return self.out(flat(self.norm(y)) * jax.nn.silu(self.gate(x))), state
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.layers.basic import (
    Linear,
    ShortConv,
    State,
    convolved,
    l2_normalise,
    like_queries,
    short_conv,
    undo_values,
)
from longctx.ops.family import Recurrence
from longctx.parallel import sequence
from longctx.typing import Segments


class Recurrent(nnx.Module):
    """A mixer around one recurrence.

    Args:
      width: D, of the model.
      options: of the mixer.

    Attributes:
      conv: the convolution of what `begin` is given; None, unless a mixer makes one.
    """

    conv: ShortConv | None = None

    def __init__(self, width: int, options: Any):
        self.width, self.options = width, options

    def begin(
        self,
        parts: Sequence[Float[Array, "B T C"]],
        segments: Segments | None,
        state: State | None,
        bias: Float[Array, " C"] | None = None,
    ) -> tuple[list[Float[Array, "B T C"]], Callable]:
        """The parts convolved, and the op as a function of its inputs on this span.

        Args:
          parts: what is convolved, such as queries, keys and values.
          segments: the documents of the span; None is one document, which continues that of the state.
          state: before the span; None is the empty one.
          bias: of the convolution, for the channels of all parts.

        Returns:
          `(parts, run)`, with `run(family, *inputs, parameters=(), **options) -> (y, State)` as `sequence.run`.
        """
        parts, memory, tail = convolved(self.conv, parts, segments, state, bias)

        def run(family: Recurrence, *inputs, parameters=(), **options):
            made = family.options(**options)
            y, after = sequence.run(family, inputs, parameters, memory, segments=segments, options=made)
            return y, State(after, tail)

        return parts, run

    def init_state(self, batch: int, capacity: int, dtype=jnp.float32) -> State:
        """The state before any token: zeros of the shapes that a token leaves; `capacity` does not matter."""
        token = jax.ShapeDtypeStruct((batch, 1, self.width), dtype)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda x: self(x)[1], token))


def projections(width: int, heads: int, key_width: int, value_width: int, rngs: nnx.Rngs) -> tuple[Linear, ...]:
    """Queries, keys, values and the way back, with the initial values of `layers/basic.py`."""
    query = Linear(width, heads * key_width, ("embed", "heads"), rngs)
    key = Linear(width, heads * key_width, ("embed", "heads"), rngs, initial=like_queries(query, heads, key_width))
    value = Linear(width, heads * value_width, ("embed", "heads"), rngs)
    back = undo_values(value, heads, value_width)
    return query, key, value, Linear(heads * value_width, width, ("heads", "embed"), rngs, initial=back)


def qkv_conv(taps: int, query: Linear, key: Linear, value: Linear, rngs: nnx.Rngs) -> ShortConv | None:
    """The convolution of queries, keys and values, whose keys begin one token behind the others; None of no taps."""
    queries, keys, values = (linear.weight.shape[1] for linear in (query, key, value))
    return short_conv(taps, [0] * queries + [1] * keys + [0] * values, rngs)


def delta_inputs(q, k, v, heads: int, activation: Callable = jax.nn.silu):
    """Queries, keys and values of the delta rules, from parts `[B, T, H K]`, `[B, T, H K]` and `[B, T, H V]`.

    Returns:
      `(q[B, T, H, K], k[B, T, H, K], v[B, T, H, V])`: q and k after `activation`, of norm 1, and q scaled by 1/√K; v
      after SiLU.
    """
    q, k, v = (by_head(part, heads) for part in (q, k, v))
    return l2_normalise(activation(q)) * q.shape[-1] ** -0.5, l2_normalise(activation(k)), jax.nn.silu(v)


def slow_steps(count: int) -> Float[Array, " count"]:
    """Initial values of a step's bias: softplus of them is 1e-3 to 1e-1, for memories of 1,000 to 10 tokens."""
    step = jnp.geomspace(1e-3, 1e-1, count)
    return step + jnp.log(-jnp.expm1(-step))


def by_head(x: Float[Array, "B T C"], heads: int) -> Float[Array, "B T H C/H"]:
    """`x`, its channels shared out to the heads."""
    return x.reshape(*x.shape[:2], heads, -1)


def flat(y: Float[Array, "B T H V"]) -> Float[Array, "B T H*V"]:
    """`y`, all heads next to each other."""
    return y.reshape(*y.shape[:2], -1)


def standardised(y: Float[Array, "... V"], epsilon: float) -> Float[Array, "... V"]:
    """`(y - mean) / sqrt(variance + epsilon)` over the last axis: a layer norm before its scale."""
    y -= jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
