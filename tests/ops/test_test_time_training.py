"""Test-time training against float64 numpy, mini-batch by mini-batch of one document, at extremes.

The numpy definitions take a document whole and share nothing with the ops, which go token by token or along a grid:
convolutions over a mini-batch's tokens, gradients written out, orthogonalisation on singular values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import INPLACE_TTT, LACT, TITANS, TTT_LINEAR, lact
from longctx.typing import Segments

H, K, M, C, T = 2, 8, 6, 5, 23


def sigmoid(x):
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def silu(x):
    return x * sigmoid(x)


def silu_slope(x):
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def define_inplace(z, x, taps, target, minibatch, rate, clip, decay):
    """Equations of section 3 for one document `[T, F]`, `[T, D]`."""
    weights, y, reach = np.zeros((z.shape[1], x.shape[1])), [], len(taps) // 2
    for start in range(0, len(z), minibatch):
        keys, inputs = z[start : start + minibatch], x[start : start + minibatch]
        y.append(keys @ weights)
        if len(keys) == minibatch:
            wide = np.pad(inputs, ((reach, reach), (0, 0)))
            conv = sum(tap * wide[i : i + minibatch] for i, tap in enumerate(taps))
            update = rate * keys.T @ conv @ target
            weights = decay * weights + update * min(1, clip / np.linalg.norm(update)) if clip else weights + update
    return np.concatenate(y)


def define_ttt_linear(q, k, v, rate, initial, scale, shift, discount):
    """One head of one document, `[T, K]`."""

    def standard(z):
        deviation = np.sqrt(z.var() + 1e-6)
        return (z - z.mean()) / deviation, deviation

    weights, bias, y = initial[:-1], initial[-1], np.zeros_like(v)
    for start in range(0, len(k), len(discount)):
        down, down_bias = np.zeros_like(weights), np.zeros_like(bias)
        for t in range(start, min(start + len(discount), len(k))):
            x, deviation = standard(k[t] @ weights + bias)
            # The norm's Jacobian is symmetric.
            jacobian = (np.eye(len(x)) - 1 / len(x) - np.outer(x, x) / len(x)) / deviation
            gradient = jacobian @ (scale * (scale * x + shift - (v[t] - k[t])))
            down, down_bias = down + rate[t] * np.outer(k[t], gradient), down_bias + rate[t] * gradient
            step = discount[t - start]
            read, _ = standard(q[t] @ (weights - step * down) + bias - step * down_bias)
            y[t] = q[t] + scale * read + shift
        weights, bias = weights - step * down, bias - step * down_bias
    return y


def define_titans(q, k, v, rate, log_keep, log_momentum, initial, minibatch):
    """One head of one document, `[T, K]`, memories of one or two layers."""
    weights, base, y = list(initial), list(initial), np.zeros_like(v)
    surprise = [np.zeros_like(w) for w in initial]
    for t in range(len(k)):
        if len(base) == 1:
            gradients = [2 * np.outer(k[t], k[t] @ base[0] - v[t])]
        else:
            z = k[t] @ base[0]
            error = 2 * (silu(z) @ base[1] - v[t])
            gradients = [np.outer(k[t], silu_slope(z) * (base[1] @ error)), np.outer(silu(z), error)]
        surprise = [np.exp(log_momentum[t]) * s - rate[t] * g for s, g in zip(surprise, gradients, strict=True)]
        weights = [np.exp(log_keep[t]) * w + s for w, s in zip(weights, surprise, strict=True)]
        y[t] = q[t] @ weights[0] if len(base) == 1 else silu(q[t] @ weights[0]) @ weights[1]
        if t % minibatch == minibatch - 1:
            base = weights
    return y


def define_lact(q, k, v, rates, momentum, initial, minibatch, orthogonal):
    """One head of one document, `[T, K]`."""
    weights, y = list(initial), np.zeros_like(v)
    before = [np.zeros_like(w) for w in initial]
    for start in range(0, len(k), minibatch):
        part = slice(start, start + minibatch)
        gate, down, up = weights
        y[part] = silu(q[part] @ gate.T) * (q[part] @ up.T) @ down.T
        if len(k[part]) < minibatch:
            break
        z, u, back = k[part] @ gate.T, k[part] @ up.T, v[part] @ down
        r = rates[part]
        steps = [
            (r[:, :1] * back * u * silu_slope(z)).T @ k[part],
            (r[:, 1:2] * v[part]).T @ (silu(z) * u),
            (r[:, 2:] * back * silu(z)).T @ k[part],
        ]
        steps = before = [s + momentum[part].mean() * b for s, b in zip(steps, before, strict=True)]
        for i, (first, step) in enumerate(zip(initial, steps, strict=True)):
            if orthogonal:
                left, values, right = np.linalg.svd(step, full_matrices=False)
                values = values / np.linalg.norm(values)
                for a, b, c in lact._STEPS:
                    values = a * values + b * values**3 + c * values**5
                step = left * values @ right
            new = weights[i] + step
            weights[i] = new * np.linalg.norm(first, axis=1, keepdims=True) / np.linalg.norm(new, axis=1, keepdims=True)
    return y


def example(family, length=T):
    """An op, its inputs with time and heads for one document, its parameters, and the definition of one head.

    Keys have norm 1, but one of 0, and one of 1e3 at a rate of 1e-6.
    """
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(length, H, K)) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    rate = 0.1 * rng.random((length, H))
    if length > 8:
        k[2], k[7], rate[7] = 0, 1e3 * k[7], 1e-6
    if family == "ttt_linear":
        parameters = (rng.normal(size=(H, K + 1, K)), rng.normal(size=(H, K)), rng.normal(size=(H, K)), rng.random(C))
        shared = parameters[-1:]
        return TTT_LINEAR, (q, k, v, rate), parameters, lambda i, p: define_ttt_linear(*i, *p, *shared), {}
    if family.startswith("titans"):
        # Gates of exactly 0 and 1, and decays of exp(-80).
        gates = np.log(rng.random((2, length, H)))
        for at, gate in ((1, -np.inf), (4, 0), (6, -80), (10, -np.inf), (11, -np.inf), (16, 0)):
            gates[:, at % length, at % H] = gate
        shapes = ((K, M), (M, K)) if family == "titans" else ((K, K),)
        parameters = (tuple(rng.normal(size=(H, *shape)) / 2 for shape in shapes),)
        define = lambda i, p: define_titans(*i, *p, C)  # noqa: E731
        return TITANS, (q, k, v, rate, *gates), parameters, define, {"minibatch": C}
    orthogonal = family == "lact_orthogonal"
    parameters = lact.Weights(*(rng.normal(size=(H, *shape)) for shape in ((M, K), (K, M), (M, K))))
    rates = rate[..., None] * rng.random((length, H, 3))
    define = lambda i, p: define_lact(*i, p, C, orthogonal)  # noqa: E731
    options = {"minibatch": C, "orthogonal": orthogonal}
    return LACT, (q, k, v, rates, rng.random((length, H))), parameters, define, options


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("length", [1, T])
@pytest.mark.parametrize("family", ["ttt_linear", "titans", "titans_linear", "lact", "lact_orthogonal"])
def test_definition(family, length):
    """Both forms are within 2e-5 of the largest output, and gradients are finite.

    Seen to fail: titans' decays of -inf summed as they are; TTT-Linear's update with the first token's discount; LaCT's
    gradient without the slope of silu.
    """
    op, inputs, parameters, define, options = example(family, length)
    own = parameters[:3] if family == "ttt_linear" else parameters  # those of the heads
    heads = [define([x[:, h] for x in inputs], jax.tree.map(lambda p, h=h: p[h], own)) for h in range(H)]
    wanted = np.stack(heads, axis=1)
    batched = as_float32([x[None] for x in inputs])
    for form in ("recurrent", "chunked"):

        @jax.jit
        def run(inputs, parameters, form=form):
            y, pull = jax.vjp(lambda i, p: op(*i, parameters=p, form=form, **options)[0], inputs, parameters)
            return y, pull(jnp.ones_like(y))

        y, gradients = run(batched, as_float32(parameters))
        np.testing.assert_allclose(y[0], wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("family", ["ttt_linear", "titans", "lact"])
def test_bfloat16(family):
    """States are float32, and only y is rounded: to 2^-8 of what float32 gives for the same inputs."""
    op, inputs, parameters, _, options = example(family)
    rounded = [jnp.asarray(x, jnp.bfloat16)[None] for x in inputs]
    options |= {"parameters": as_float32(parameters)}
    y, state = jax.jit(lambda *a: op(*a, **options))(*rounded)
    exact, wanted = op(*as_float32(rounded), form="recurrent", **options)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4 * np.abs(exact).max())
    for have, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert have.dtype == jnp.float32
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-4 * np.abs(want).max(initial=1e-3))


F, D = 7, 4
OPTIONS = {"minibatch": C, "rate": 0.7, "clip": 0.5, "decay": 0.9}


def inplace_example(length=T):
    rng = np.random.default_rng(1)
    z, x = rng.normal(size=(length, F)), rng.normal(size=(length, D))
    z[1 % length], z[-1] = 0, 1e3 * z[-1]
    return z, x, rng.normal(size=(5, D)), rng.normal(size=(D, D))


@pytest.mark.parametrize("length", [1, T])
@pytest.mark.parametrize("options", [OPTIONS, {"minibatch": C, "rate": 0.7, "clip": 0.0, "decay": 1.0}])
def test_inplace_definition(options, length):
    """Both forms are within 1e-5 of the largest output, with and without clip and decay.

    Seen to fail: targets that do not look ahead.
    """
    z, x, taps, target = inplace_example(length)
    wanted = define_inplace(z, x, taps, target, **options)
    z, x, *parameters = as_float32((z[None], x[None], taps, target))
    for form in ("recurrent", "chunked"):
        y, _ = jax.jit(functools.partial(INPLACE_TTT, form=form, **options))(z, x, parameters=parameters)
        np.testing.assert_allclose(y[0], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_inplace_transition():
    """Transitions of single tokens compose, in any order of brackets, to that of the span, clipped updates included.

    The span begins with padding and in the middle of a mini-batch; the state is that of an earlier span. Seen to fail:
    the pairs across the edge of two spans left out.
    """
    z, x, *parameters = as_float32(inplace_example())
    z, x = z[None], x[None]
    valid, positions = jnp.arange(T)[None] >= 2, jnp.arange(T)[None] + 1
    segments = Segments(valid.astype(jnp.int32), jnp.where(valid, positions, 0), jnp.zeros((1, T), bool))
    run = functools.partial(INPLACE_TTT, parameters=parameters, form="recurrent", **OPTIONS)

    @jax.jit
    def transition(z, x, segments):
        call = INPLACE_TTT.prepare((z, x), parameters, segments=segments, options=INPLACE_TTT.options(**OPTIONS))
        return INPLACE_TTT.transition(*call.span)

    compose = jax.jit(INPLACE_TTT.compose)
    _, state = run(z[:, ::-1], x[:, ::-1])
    _, wanted = run(z, x, state=state, segments=segments)

    tokens = [transition(*jax.tree.map(lambda a, t=t: a[:, t : t + 1], (z, x, segments))) for t in range(T)]
    left, right = tokens[0], tokens[-1]
    for token in tokens[1:]:
        left = compose(left, token)
    for token in tokens[-2::-1]:
        right = compose(token, right)
    for whole in (left, right, transition(z, x, segments)):
        after = INPLACE_TTT.apply(whole, state)
        for have, want in zip(after, wanted, strict=True):
            np.testing.assert_allclose(have, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_inplace_waits_for_the_mini_batch():
    """An output depends on the inputs of its document's earlier mini-batches, all of them, and on no other.

    The document starts at the row's fourth token. Seen to fail: a target that looks ahead into the next mini-batch.
    """
    z, x, *parameters = as_float32(inplace_example())
    segments = Segments.from_ids(jnp.where(jnp.arange(T) < 3, 1, 2)[None])

    def run(x):
        return INPLACE_TTT(z[None], x[None], parameters=parameters, segments=segments, **OPTIONS)[0][0]

    depends = np.abs(jax.jacobian(run)(x)).sum((1, 3)) > 0
    batch = (np.arange(T) - 3) // C  # -1 in the first document
    np.testing.assert_array_equal(depends, (batch[:, None] > batch) & (batch >= 0))


def test_inplace_updates_are_clipped():
    """One update has the norm that it is clipped to; a key's norm is 1e3. Seen to fail: the clip left out."""
    z, x, *parameters = as_float32(inplace_example(C))
    for clip in (0.5, 1e-5):
        _, state = INPLACE_TTT(z[None], x[None], parameters=parameters, minibatch=C, clip=clip)
        np.testing.assert_allclose(jnp.linalg.norm(state.weights), clip, rtol=1e-5)
