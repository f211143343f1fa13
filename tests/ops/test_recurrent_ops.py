"""The laws that every recurrent family keeps: its fast form, its splits and its transition equal the definition.

All in float32, to 1e-4 of the largest entry of what is compared. Each row of a batch has gates of its own kind:
moderate, some exactly 0, most exactly 1, and some as small as exp(-80).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import GATED_DELTA, causal_conv, gated_linear, linear_scan, selective_scan

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


class gated_delta:  # the family's forms, called as the functions of the modules
    def recurrent(*inputs, state=None, segment_ids=None):
        return GATED_DELTA(*inputs, state=state, segments=segment_ids, form="recurrent")

    def chunked(*inputs, state=None, segment_ids=None):
        return GATED_DELTA(*inputs, state=state, segments=segment_ids, form="chunked")

    def transition(*inputs, segment_ids=None):
        return GATED_DELTA.transition(*GATED_DELTA.prepare(inputs, segments=segment_ids).span)

    def deferred(*inputs, segment_ids=None):
        return GATED_DELTA.deferred(*GATED_DELTA.prepare(inputs, segments=segment_ids).span)

    compose, apply = GATED_DELTA.compose, GATED_DELTA.apply


PARAMETERS = {causal_conv: 1, selective_scan: 1}  # the last inputs, which have no tokens
every_family = pytest.mark.parametrize("family", FAMILIES)


def log_decays(rng, length, shape):
    gates = -np.exp(rng.normal(size=(B, length, *shape)) - 2)
    chance = rng.random(gates.shape)
    gates[1] = np.where(chance[1] < 0.2, -np.inf, gates[1])
    gates[2] = np.where(chance[2] < 0.9, 0.0, gates[2])
    gates[3] = np.where(chance[3] < 0.2, -80.0, gates[3])
    return gates


def example(family, length):
    """The family's module, its inputs for `length` tokens, and a state."""
    rng = np.random.default_rng(length)

    def unit(*shape):
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    if family == "causal_conv":
        op, inputs, state = causal_conv, (rng.normal(size=(B, length, N)), rng.normal(size=(W, N))), (B, W - 1, N)
    elif family == "linear_scan":
        op, inputs, state = linear_scan, (rng.normal(size=(B, length, N)), log_decays(rng, length, (N,))), (B, N)
    elif family == "linear_scan_complex":
        x, decay = rng.normal(size=(B, length, N, 2)) @ (1, 1j), log_decays(rng, length, (N,)) + 0j
        decay.imag = rng.normal(size=decay.shape)
        state = jnp.asarray(rng.normal(size=(B, N, 2)) @ (1, 1j), jnp.complex64)
        return linear_scan, (jnp.asarray(x, jnp.complex64), jnp.asarray(decay, jnp.complex64)), state
    elif family == "selective_scan":
        steps = np.minimum(-log_decays(rng, length, (N,)), 1e3)
        x, b, c = (rng.normal(size=(B, length, width)) for width in (N, K, K))
        op, inputs, state = selective_scan, (x, steps, b, c, -np.exp(rng.normal(size=(N, K)))), (B, N, K)
    else:
        op = gated_delta if family.startswith("gated_delta") else gated_linear
        beta = (rng.random((B, length, H)),) if op is gated_delta else ()
        # Two heads a group and two groups: one group would not tell in which order heads share.
        heads = 2 * H if family.endswith("shared") else H
        keys = unit(B, length, H, K), unit(B, length, H, K), rng.normal(size=(B, length, heads, V))
        decay = log_decays(rng, length, (H, K) if family.endswith("channel") else (heads,))
        inputs, state = (*keys, *beta, decay), (B, heads, K, V)
    as_float32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    return op, jax.tree.map(as_float32, inputs), as_float32(rng.normal(size=state))


def cut(op, inputs, start, stop):
    """The inputs of some tokens, and the parameters."""
    tokens = len(inputs) - PARAMETERS.get(op, 0)
    return (*(x[:, start:stop] for x in inputs[:tokens]), *inputs[tokens:])


def packed(length):
    """Documents that touch chunk edges, straddle them, and lie within a chunk; padding first, between and last."""
    ids = np.zeros((B, length), np.int32)
    ids[0, :40], ids[0, 40:64], ids[0, 64:] = 1, 2, 3
    ids[1, 3:60], ids[1, 62:70], ids[1, 70:-5] = 1, 2, 3
    ids[2] = 1
    ids[3, : length // 2] = np.arange(length // 2) // 7 + 1
    return jnp.asarray(ids)


def close(got, wanted):
    paths, _ = jax.tree.flatten_with_path(wanted)
    for (path, want), have in zip(paths, jax.tree.leaves(got), strict=True):
        want, have = (np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64) for x in (want, have))
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(have)), name
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-4 * max(np.abs(want).max(initial=0), 1e-3), err_msg=name)


def with_gradients(form, inputs, state, **options):
    """y, the state after, and the gradients with respect to every input and the state before."""

    @jax.jit
    def run(inputs, state):
        outputs, pull = jax.vjp(lambda inputs, state: form(*inputs, state=state, **options), inputs, state)
        weights = [jnp.cos(jnp.arange(x.size)).astype(x.dtype).reshape(x.shape) for x in outputs]
        return outputs, pull(tuple(weights))

    return run(inputs, state)


@pytest.mark.parametrize("length", [65, 500, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 63, 64))])
@every_family
def test_form(family, length):
    """Chunked equals recurrent, gradients included. Fails when the chunk's incoming state is not decayed."""
    op, inputs, state = example(family, length)
    close(with_gradients(op.chunked, inputs, state), with_gradients(op.recurrent, inputs, state))


@every_family
def test_form_on_packed_rows(family):
    """The same with documents and padding. Fails when starts are ignored, or padding decays the state."""
    length = 130
    op, inputs, state = example(family, length)
    options = {"segment_ids": packed(length)}
    close(with_gradients(op.chunked, inputs, state, **options), with_gradients(op.recurrent, inputs, state, **options))


@every_family
def test_pack(family):
    """A packed row equals its documents run alone. Fails when a document sees the one before it."""
    op, inputs, _ = example(family, 130)
    y, state = jax.jit(op.chunked)(*inputs, segment_ids=packed(130))
    for row, start, stop in ((0, 40, 64), (0, 64, 130), (1, 62, 70)):
        alone, after = op.recurrent(*cut(op, inputs, start, stop))
        close(y[row, start:stop], alone[row])
        if stop == 130:
            close(state[row], after[row])
    assert not np.any(np.asarray(y)[1, -5:])


@every_family
def test_split(family):
    """A span equals its two parts in turn, cut unevenly. Fails when the state handed over is not the state."""
    op, inputs, state = example(family, 100)

    def in_parts(*inputs, state):
        parts = []
        for start, stop in ((0, 37), (37, 100)):
            y, state = op.chunked(*cut(op, inputs, start, stop), state=state)
            parts.append(y)
        return jnp.concatenate(parts, axis=1), state

    close(with_gradients(in_parts, inputs, state), with_gradients(op.chunked, inputs, state))


@every_family
def test_transition(family):
    """A span's transition gives the state after it; transitions compose. Fails when compose takes them in reverse."""
    op, inputs, state = example(family, 100)
    _, wanted = op.recurrent(*inputs, state=state)
    close(op.apply(jax.jit(op.transition)(*inputs), state), wanted)

    a, b, c = (op.transition(*cut(op, inputs, *span)) for span in ((0, 37), (37, 39), (39, 100)))
    left, right = op.compose(op.compose(a, b), c), op.compose(a, op.compose(b, c))
    close(left, right)
    close(op.apply(left, state), wanted)

    zeros = jax.tree.map(jnp.zeros_like, a)
    _, from_empty = op.recurrent(*cut(op, inputs, 37, 39))
    close(op.apply(op.compose(zeros, b), state), from_empty)


@every_family
def test_transition_of_packed_rows(family):
    """Nothing passes a document start, padding passes everything. Fails when a start only makes the decay small."""
    op, inputs, state = example(family, 130)
    ids = packed(130)
    after = op.apply(jax.jit(op.transition)(*inputs, segment_ids=ids), state)
    close(after, op.recurrent(*inputs, state=state, segment_ids=ids)[1])
    padding = op.transition(*inputs, segment_ids=jnp.zeros_like(ids))
    np.testing.assert_array_equal(op.apply(padding, state), state)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.startswith("gated_delta")])
def test_deferred(family):
    """One pass from no state, and then what the state adds, equals the definition, gradients included.

    Fails when the columns that tell what tokens read of the state start with something else than the identity.
    """
    op, inputs, state = example(family, 200)
    options = {"segment_ids": jnp.concatenate([packed(130), jnp.full((B, 70), 9)], axis=1)}

    def deferred(*inputs, state, segment_ids):
        transition, outputs = op.deferred(*inputs, segment_ids=segment_ids)
        return outputs(state), op.apply(transition, state)

    close(with_gradients(deferred, inputs, state, **options), with_gradients(op.recurrent, inputs, state, **options))


@every_family
def test_nothing_leaks(family):
    """No gradient flows back from the past, or across a document start: exactly zero, decays and state included."""
    op, inputs, state = example(family, 100)
    ids = jnp.asarray(np.where(np.arange(100) < 40, 1, 2)[None].repeat(B, 0), jnp.int32)

    @jax.jit
    def pull(inputs, state, weight):
        y, back = jax.vjp(lambda inputs, state: op.chunked(*inputs, state=state, segment_ids=ids)[0], inputs, state)
        return back(jnp.broadcast_to(weight.reshape(1, -1, *(1,) * (y.ndim - 2)), y.shape).astype(y.dtype))

    first, tokens = jnp.arange(100) < 40, len(inputs) - PARAMETERS.get(op, 0)
    later, _ = pull(inputs, state, first.astype(jnp.float32))
    earlier, from_state = pull(inputs, state, 1.0 - first)
    for gradient in cut(op, later, 40, 100)[:tokens]:
        assert not np.any(np.asarray(gradient))
    for gradient in (*cut(op, earlier, 0, 40)[:tokens], from_state):
        assert not np.any(np.asarray(gradient))


@pytest.mark.parametrize("family", ["causal_conv", "linear_scan", "selective_scan", "gated_linear", "gated_delta"])
def test_bfloat16(family):
    """The sums are in float32: only the output is rounded, to 2^-8. Fails when the state is kept in bfloat16."""
    op, inputs, state = example(family, 70)
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    y, after = jax.jit(op.chunked)(*inputs, state=state)
    exact, state = op.recurrent(*jax.tree.map(lambda x: x.astype(jnp.float32), inputs), state=state)
    assert y.dtype == jnp.bfloat16
    assert after.dtype == jnp.float32
    close(after, state)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4 * np.abs(exact).max())
