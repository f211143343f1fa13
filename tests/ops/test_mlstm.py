"""The mLSTM's gates at their extremes, against its recurrence without a stabiliser in float64; its transitions.

Queries and keys are positive: near n·q = 0 the quotient has no digits in any precision.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import MLSTM
from longctx.ops.mlstm import State
from longctx.typing import Segments

B, T, H, K, V = 4, 150, 2, 8, 4


def example():
    """Rows with moderate gates; input gates of exp(±80), and of 0; forget gates of exp(-80), 0 and 1; all of them."""
    rng = np.random.default_rng(0)
    q, k = np.abs(rng.normal(size=(2, B, T, H, K)))
    v = rng.normal(size=(B, T, H, V))
    log_input, log_forget = rng.normal(size=(B, T, H)), -np.exp(rng.normal(size=(B, T, H)) - 3)
    chance = rng.random((B, T, H))
    inputs = np.select([chance < 0.1, chance < 0.3, chance < 0.4], [80.0, -80.0, -np.inf], log_input)
    forgets = np.select([chance < 0.1, chance < 0.2, chance > 0.7], [-80.0, -np.inf, 0.0], log_forget)
    log_input[1], log_forget[2] = inputs[1], forgets[2]
    log_input[3], log_forget[3] = inputs[3], np.roll(forgets[3], 1, axis=0)
    return q, k, v, log_input, log_forget


def define(q, k, v, log_input, log_forget):
    """y, C and n of the paper, section 2.3, in float64; exp(80) is small there."""
    matrix, normaliser, outputs = np.zeros((B, H, K, V)), np.zeros((B, H, K)), []
    for t in range(q.shape[1]):
        forget, write = np.exp(log_forget[:, t])[..., None], np.exp(log_input[:, t])[..., None]
        matrix = forget[..., None] * matrix + write[..., None] * k[:, t, :, :, None] * v[:, t, :, None]
        normaliser = forget * normaliser + write * k[:, t]
        total = np.maximum(np.abs(np.sum(normaliser * q[:, t], axis=-1)), 1)
        outputs.append(np.einsum("bhkv,bhk->bhv", matrix, q[:, t]) / total[..., None])
    return np.stack(outputs, axis=1), matrix, normaliser


def in_float32(inputs):
    return [jnp.asarray(x, jnp.float32) for x in inputs]


def state(seed=1):
    rng = np.random.default_rng(seed)
    shapes = (B, H, K, V), (B, H, K), (B, H)
    return State(*(jnp.asarray(np.abs(rng.normal(size=shape)), jnp.float32) for shape in shapes))


def transition(*inputs, segments=None):
    return MLSTM.transition(*MLSTM.prepare(inputs, segments=segments).span)


def close(got, wanted, tolerance=1e-4):
    for have, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.all(np.isfinite(have))
        np.testing.assert_allclose(have, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-3))


@pytest.mark.parametrize("length", [1, T])
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_extremes(form, length):
    """Row by row, y, C and n to 1e-4 of their largest entry. Seen to fail: the scale left out of a chunk's writes."""
    inputs = [x[:, :length] for x in example()]
    wanted = define(*inputs)
    y, after = jax.jit(functools.partial(MLSTM, form=form))(*in_float32(inputs))
    scale = np.exp(np.asarray(after.log_scale, np.float64))
    got = y, scale[..., None, None] * after.matrix, scale[..., None] * after.normaliser
    for row in range(B):
        close([part[row] for part in got], [part[row] for part in wanted])


def test_gradients_at_extremes():
    """Chunked equals recurrent, row by row and to 1e-4, and both are finite, with a state and packed documents.

    Seen to fail: the input gates of padding let into the scale; gradients that flow through the scale.
    """
    ids = np.ones((B, T), np.int32)
    ids[0, 40:64], ids[0, 64:], ids[0, 145:], ids[1, :3], ids[1, 70:75], ids[3, 100:] = 2, 3, 0, 0, 0, 2
    inputs = in_float32(example())
    inputs[3] = inputs[3].at[0, 145:].set(80)

    def gradients(form):
        def run(inputs, state):
            segments = Segments.from_ids(ids)
            outputs, pull = jax.vjp(lambda *a: MLSTM(*a[0], state=a[1], segments=segments, form=form), inputs, state)
            weights = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), outputs)
            return outputs, pull(weights)

        return jax.jit(run)(inputs, state())

    chunked, recurrent = gradients("chunked"), gradients("recurrent")
    for row in range(B):
        close(*(jax.tree.map(lambda x, row=row: x[row], both) for both in (chunked, recurrent)))


def test_transition():
    """Transitions compose, give the state, and are associative. Seen to fail: compose in reverse."""
    inputs, before = in_float32(example()), state()

    def cut(start, stop):
        return [x[:, start:stop] for x in inputs]

    a, b, c = (transition(*cut(*span)) for span in ((0, 37), (37, 39), (39, T)))
    left, right = MLSTM.compose(MLSTM.compose(a, b), c), MLSTM.compose(a, MLSTM.compose(b, c))
    close(left, right)
    close(MLSTM.apply(left, before), MLSTM(*inputs, state=before, form="recurrent")[1])
    close(MLSTM.apply(jax.jit(transition)(*inputs), before), MLSTM(*inputs, state=before, form="recurrent")[1])
    zeros = jax.tree.map(jnp.zeros_like, a)
    close(MLSTM.apply(MLSTM.compose(zeros, b), before), MLSTM(*cut(37, 39), form="recurrent")[1])


def test_transition_of_packed_rows():
    """Nothing passes a document's start, padding passes everything, exactly. Seen to fail: starts not in `keep`."""
    inputs, before = in_float32(example()), state()
    nothing = transition(*inputs, segments=Segments.from_ids(jnp.zeros((B, T), jnp.int32)))
    jax.tree.map(np.testing.assert_array_equal, MLSTM.apply(nothing, before), before)
    segments = Segments.from_ids(np.where(np.arange(T) < 40, 1, 2)[None].repeat(B, 0))
    fresh = transition(*inputs, segments=segments)
    empty = jax.tree.map(jnp.zeros_like, before)
    jax.tree.map(np.testing.assert_array_equal, MLSTM.apply(fresh, before), MLSTM.apply(fresh, empty))
    close(MLSTM.apply(fresh, before), MLSTM(*inputs, state=before, segments=segments, form="recurrent")[1])


def test_bfloat16():
    """The sums are in float32: only the output is rounded, to 2^-8. Seen to fail: the memory kept in bfloat16."""
    inputs = [x.astype(jnp.bfloat16) for x in in_float32(example())]
    y, after = jax.jit(MLSTM)(*inputs)
    exact, wanted = MLSTM(*(x.astype(jnp.float32) for x in inputs), form="recurrent")
    assert y.dtype == jnp.bfloat16
    close(after, wanted)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4 * np.abs(exact).max())
