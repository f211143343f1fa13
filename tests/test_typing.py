"""`checked`: what an op is given has the shapes and numbers of its signature.

Broken by never refusing: all refusals fail.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, Int

from longctx.ops import GATED_DELTA, GATED_LINEAR
from longctx.typing import Segments, checked


@checked
def op(
    x: Float[Array, "B T K"],
    decay: Float[Array, "B T"] | Float[Array, "B T K"],
    last: Float[Array, "B W-1 K"],
    taps: Float[Array, "W K"],
    window: Float[Array, "B W-1"] | None = None,
    ids: Int[Array, "B T"] | Segments | None = None,
    scale: float = 1.0,
):
    return scale


def arguments(**other):
    shapes = {"x": (2, 5, 3), "decay": (2, 5), "last": (2, 3, 3), "taps": (4, 3)}
    return {name: jnp.zeros(shape) for name, shape in shapes.items()} | other


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"decay": jnp.zeros((2, 5, 3))},
        {"x": jnp.zeros((2, 5, 3), jnp.bfloat16), "scale": 2.0},
        {"window": jnp.zeros((2, 3)), "ids": jnp.zeros((2, 5), jnp.int32)},
        {"ids": Segments.single(2, 5)},
    ],
)
def test_what_fits_is_passed_on(other):
    given = arguments(**other)
    assert op(**given) == given.get("scale", 1.0)
    assert jax.jit(lambda arrays: op(**arrays | {"scale": 3.0}))({k: v for k, v in given.items() if k != "scale"}) == 3


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"x": jnp.zeros((2, 5))}, "op: x is float32[2, 5], expected Float[B, T, K]."),
        ({"x": jnp.zeros((2, 5, 3), jnp.int32)}, "op: x is int32[2, 5, 3], expected Float[B, T, K]."),
        (
            {"decay": jnp.zeros((2, 4))},
            "op: decay is float32[2, 4], expected Float[B, T] or Float[B, T, K], where the arguments before it have "
            "B = 2, T = 5, K = 3.",
        ),
        ({"taps": jnp.zeros((4, 2))}, "op: taps is float32[4, 2], expected Float[W, K]"),
        ({"window": jnp.zeros((2, 4))}, "op: window is float32[2, 4], expected Float[B, W-1]"),
        ({"ids": jnp.zeros((2, 5))}, "op: ids is float32[2, 5], expected Int[B, T]"),
    ],
)
def test_what_does_not_is_refused(other, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        op(**arguments(**other))


def test_an_op_says_what_is_wrong():
    x, heads = jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 8, 2))
    with pytest.raises(ValueError, match=re.escape("gated_delta: v is float32[1, 7, 2, 4], expected Float")):
        GATED_DELTA(x, x, x[:, 1:], heads, heads)
    with pytest.raises(ValueError, match=re.escape("gated_delta: the state is (1, 2, 4, 3), expected (1, 2, 4, 4)")):
        GATED_DELTA(x, x, x, heads, heads, state=jnp.zeros((1, 2, 4, 3)))
    with pytest.raises(ValueError, match="the heads of q and k must divide those of v"):
        GATED_LINEAR(x, x, jnp.zeros((1, 8, 3, 4)), jnp.zeros((1, 8, 3)))
