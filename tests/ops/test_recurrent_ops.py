"""Recurrent families at gates that layers do not reach: the fast form and transitions against the definition.

All in float32, to 1e-4 of the largest entry of what is compared. Each row of a batch has gates of its own kind:
moderate, some exactly 0, most exactly 1, and some as small as exp(-80).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import CAUSAL_CONV, GATED_DELTA, GATED_LINEAR, LINEAR_SCAN, SELECTIVE_SCAN
from longctx.typing import Segments

B, H, K, V, N, W = 4, 2, 8, 4, 6, 4

FAMILIES = (
    "causal_conv",
    "linear_scan",
    "linear_scan_complex",
    "selective_scan",
    "gated_linear",
    "gated_linear_channel",
    "gated_linear_shared",
    "gated_delta",
    "gated_delta_channel",
)
every_family = pytest.mark.parametrize("family", FAMILIES)


def log_decays(rng, length, shape):
    gates = -np.exp(rng.normal(size=(B, length, *shape)) - 2)
    chance = rng.random(gates.shape)
    gates[1] = np.where(chance[1] < 0.2, -np.inf, gates[1])
    gates[2] = np.where(chance[2] < 0.9, 0.0, gates[2])
    gates[3] = np.where(chance[3] < 0.2, -80.0, gates[3])
    return gates


def example(family, length):
    """A family, its inputs for `length` tokens and then its parameters, and a state."""
    rng = np.random.default_rng(length)

    def unit(*shape):
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    if family == "causal_conv":
        op, inputs, state = CAUSAL_CONV, (rng.normal(size=(B, length, N)), rng.normal(size=(W, N))), (B, W - 1, N)
    elif family == "linear_scan":
        op, inputs, state = LINEAR_SCAN, (rng.normal(size=(B, length, N)), log_decays(rng, length, (N,))), (B, N)
    elif family == "linear_scan_complex":
        x, decay = rng.normal(size=(B, length, N, 2)) @ (1, 1j), log_decays(rng, length, (N,)) + 0j
        decay.imag = rng.normal(size=decay.shape)
        state = jnp.asarray(rng.normal(size=(B, N, 2)) @ (1, 1j), jnp.complex64)
        return LINEAR_SCAN, (jnp.asarray(x, jnp.complex64), jnp.asarray(decay, jnp.complex64)), state
    elif family == "selective_scan":
        steps = np.minimum(-log_decays(rng, length, (N,)), 1e3)
        x, b, c = (rng.normal(size=(B, length, width)) for width in (N, K, K))
        op, inputs, state = SELECTIVE_SCAN, (x, steps, b, c, -np.exp(rng.normal(size=(N, K)))), (B, N, K)
    else:
        op = GATED_DELTA if family.startswith("gated_delta") else GATED_LINEAR
        beta = (rng.random((B, length, H)),) if op is GATED_DELTA else ()
        # Two heads a group and two groups: one group would not tell in which order heads share.
        heads = 2 * H if family.endswith("shared") else H
        keys = unit(B, length, H, K), unit(B, length, H, K), rng.normal(size=(B, length, heads, V))
        decay = log_decays(rng, length, (H, K) if family.endswith("channel") else (heads,))
        inputs, state = (*keys, *beta, decay), (B, heads, K, V)
    as_float32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    return op, jax.tree.map(as_float32, inputs), as_float32(rng.normal(size=state))


def call(op, inputs, start=0, stop=None, state=None, segments=None):
    """What the forms of a family are called with, of some tokens."""
    tokens = len(inputs) - (op.parameters is not None)
    return op.prepare([x[:, start:stop] for x in inputs[:tokens]], inputs[tokens:], state, segments)


def packed(length):
    """Documents that touch chunk edges, straddle them, and lie within a chunk; padding first, between and last."""
    ids = np.zeros((B, length), np.int32)
    ids[0, :40], ids[0, 40:64], ids[0, 64:] = 1, 2, 3
    ids[1, 3:60], ids[1, 62:70], ids[1, 70:-5] = 1, 2, 3
    ids[2] = 1
    ids[3, : length // 2] = np.arange(length // 2) // 7 + 1
    return Segments.from_ids(ids)


def close(got, wanted):
    paths, _ = jax.tree.flatten_with_path(wanted)
    for (path, want), have in zip(paths, jax.tree.leaves(got), strict=True):
        want, have = (np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64) for x in (want, have))
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(have)), name
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-4 * max(np.abs(want).max(initial=0), 1e-3), err_msg=name)


def with_gradients(form, op, inputs, state, segments):
    """y, the state after, and the gradients with respect to every input and the state before."""

    @jax.jit
    def run(inputs, state):
        outputs, pull = jax.vjp(lambda inputs, state: form(*call(op, inputs, 0, None, state, segments)), inputs, state)
        weights = [jnp.cos(jnp.arange(x.size)).astype(x.dtype).reshape(x.shape) for x in outputs]
        return outputs, pull(tuple(weights))

    return run(inputs, state)


@every_family
def test_form_on_packed_rows(family):
    """Chunked equals recurrent, with documents and padding.

    Fails when starts are ignored, or padding decays the state, or the chunk's incoming state is not decayed.
    """
    op, inputs, state = example(family, 130)
    both = (with_gradients(form, op, inputs, state, packed(130)) for form in (op.chunked, op.recurrent))
    close(*both)


@every_family
def test_transition(family):
    """A span's transition gives the state after it; transitions compose. Fails when compose takes them in reverse."""
    op, inputs, state = example(family, 100)
    _, wanted = op.recurrent(*call(op, inputs, state=state))
    close(op.apply(jax.jit(lambda *x: op.transition(*call(op, x).span))(*inputs), state), wanted)

    a, b, c = (op.transition(*call(op, inputs, *span).span) for span in ((0, 37), (37, 39), (39, 100)))
    left, right = op.compose(op.compose(a, b), c), op.compose(a, op.compose(b, c))
    close(left, right)
    close(op.apply(left, state), wanted)

    zeros = jax.tree.map(jnp.zeros_like, a)
    _, from_empty = op.recurrent(*call(op, inputs, 37, 39))
    close(op.apply(op.compose(zeros, b), state), from_empty)


@every_family
def test_transition_of_packed_rows(family):
    """Nothing passes a document start, exactly; padding passes everything.

    Fails when a start only makes the decay small.
    """
    op, inputs, state = example(family, 130)
    packing = call(op, inputs, state=state, segments=packed(130))
    after = op.apply(jax.jit(lambda span: op.transition(*span, packing.options))(packing.span[:-1]), state)
    close(after, op.recurrent(*packing)[1])
    fresh = np.asarray(packing.segments.starts.any(1))
    empty = op.apply(op.transition(*packing.span), jnp.zeros_like(state))
    np.testing.assert_array_equal(after[fresh], empty[fresh])
    padding = Segments.from_ids(jnp.zeros((B, 130), jnp.int32))
    padding = op.transition(*call(op, inputs, segments=padding).span)
    np.testing.assert_array_equal(op.apply(padding, state), state)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.startswith("gated_delta")])
def test_deferred(family):
    """One pass from no state, and then what the state adds, equals the definition, gradients included.

    Fails when the columns that tell what tokens read of the state start with something else than the identity.
    """
    op, inputs, state = example(family, 200)
    segments = Segments.from_ids(jnp.concatenate([packed(130).ids, jnp.full((B, 70), 9)], axis=1))

    def deferred(inputs, parameters, state, segments, options):
        transition, outputs = op.deferred(inputs, parameters, segments, options)
        return outputs(state), op.apply(transition, state)

    both = (with_gradients(form, op, inputs, state, segments) for form in (deferred, op.recurrent))
    close(*both)
