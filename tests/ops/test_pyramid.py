"""Pyramid attention against its formula in float64, node by node; its transition, and what it costs."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import PYRAMID, pyramid
from longctx.typing import Segments

B, H, G, K, V = 2, 4, 2, 4, 3
# Documents that begin anywhere and are long enough for every level; padding before, between and after.
ROWS, T = ([100, 50], [-3, 20, 1, 2, -5, 110, -9]), 150


def run_form(form, q, k, v, pool, bias, **options):
    return PYRAMID(q, k, v, parameters=(pool, bias), form=form, **options)


FORMS = {form: functools.partial(run_form, form) for form in ("recurrent", "chunked")}
every_form = pytest.mark.parametrize("form", FORMS)


def packed(rows=ROWS, length=T):
    ids, positions = np.zeros((2, len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        at = 0
        for number, tokens in enumerate(lengths, 1):
            if tokens > 0:
                ids[row, at : at + tokens], positions[row, at : at + tokens] = number, np.arange(tokens)
            at += abs(tokens)
    return Segments.from_ids(ids, positions)


def example(levels, length=T, scale=1.0):
    rng = np.random.default_rng(levels)
    q, k, v = (rng.normal(size=(B, length, *shape)) for shape in ((H, K), (G, K), (G, V)))
    return scale * q, scale * k, v, 2 * rng.normal(size=(G, K)), rng.normal(size=(H, levels - 1))


def tree(k, v, pool, children, levels):
    """The whole nodes `(key, value, logit)` of one document and head, level by level, each from its children."""
    logits = pyramid.CAP * np.tanh(k @ pool / math.sqrt(K) / pyramid.CAP)
    nodes = [list(zip(k, v, logits, strict=True))]
    for _ in range(levels - 1):
        above = []
        for m in range(len(nodes[-1]) // children):
            below = nodes[-1][m * children : (m + 1) * children]
            keys, values, logits = (np.array(x) for x in zip(*below, strict=True))
            weights = np.exp(logits - logits.max())
            weights, logit = weights / weights.sum(), np.logaddexp.reduce(logits)
            above.append((weights @ keys, weights @ values, logit))
        nodes.append(above)
    return nodes


def formula(q, k, v, pool, bias, children, window):
    """One document: q `[T, H, K]`, k and v `[T, G, ...]`."""
    y, bias = np.zeros((len(q), H, V)), np.pad(bias, ((0, 0), (1, 0)))
    levels = bias.shape[1]
    trees = [tree(k[:, g], v[:, g], pool[g], children, levels) for g in range(G)]
    for t, h in np.ndindex(len(q), H):
        nodes = trees[h * G // H]
        oldest = max(children * ((t - window + 1) // children), 0)
        seen = [(0, node) for node in nodes[0][oldest : t + 1]]
        for level in range(1, levels):
            before = [node for m, node in enumerate(nodes[level]) if (m + 1) * children**level <= oldest]
            seen += [(level, node) for node in before[-window:]]
        logits = np.array([q[t, h] @ key / math.sqrt(K) + bias[h, level] for level, (key, _, _) in seen])
        weights = np.exp(logits - logits.max())
        y[t, h] = weights @ np.array([value for _, (_, value, _) in seen]) / weights.sum()
    return y


def last_sums(k, v, pool, children, window, levels):
    """The state after one document."""
    slots = pyramid.slots(children, window)
    rows = np.concatenate([np.ones((len(k), G, 1)), k, v], axis=-1)
    score = np.einsum("tgk,gk->tg", k, pool) / math.sqrt(K)
    mass = np.exp(pyramid.CAP * np.tanh(score / pyramid.CAP))[..., None]
    state = np.zeros((levels, slots, G, 1 + K + V))
    for level in range(levels):
        newest = (len(k) - 1) // children**level
        for m in range(max(newest - slots + 1, 0), newest + 1):
            tokens = slice(m * children**level, (m + 1) * children**level)
            state[level, m % slots] = (rows[tokens] * (mass[tokens] if level else 1)).sum(0)
    return state


@every_form
@pytest.mark.parametrize(("children", "window", "levels"), [(2, 3, 5), (4, 6, 3), (3, 2, 4), (4, 1, 2)])
def test_formula(form, children, window, levels):
    """Outputs and state within 1e-5 of the largest entry, on packed rows, with grouped heads; padding gives 0.

    Documents are shorter and longer than what the levels reach. Seen to fail: one slot fewer; nodes that end with the
    window's first token; level 0 without the tokens that are in no whole node.
    """
    inputs, segments = example(levels), packed()
    run = jax.jit(functools.partial(FORMS[form], children=children, window=window))
    y, state = run(*map(jnp.float32, inputs), segments=segments)
    wanted, sums = np.zeros((B, T, H, V)), []
    for row, ids in enumerate(np.asarray(segments.ids)):
        for number in np.unique(ids[ids > 0]):
            q, k, v = (x[row, ids == number] for x in inputs[:3])
            wanted[row, ids == number] = formula(q, k, v, *inputs[3:], children, window)
        sums.append(last_sums(k, v, inputs[3], children, window, levels))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(state, np.stack(sums), rtol=0, atol=1e-5 * np.abs(sums).max())


@every_form
def test_nothing_is_missed(form):
    """Values of one token each reach every later query up to W c^(L-1) tokens on, at one level or more.

    Seen to fail: level 0 without the tokens that are in no whole node.
    """
    children, window, levels, length = 4, 3, 3, 100
    v = np.broadcast_to(np.eye(length)[None, :, None], (1, length, 1, length))
    zeros = np.zeros((1, length, 1, K))
    run = jax.jit(functools.partial(FORMS[form], children=children, window=window))
    y, _ = run(*map(jnp.float32, (zeros, zeros, v, np.zeros((1, K)), np.zeros((1, levels - 1)))))
    back = np.arange(length)[:, None] - np.arange(length)
    weights = np.asarray(y)[0, :, 0]
    assert (weights[(back >= 0) & (back <= window * children ** (levels - 1))] > 0).all()
    assert (weights[back < 0] == 0).all()
    assert (weights[-1] == 0).any()


def test_spans():
    """The fast form on spans = the definition on the row: outputs and states to 1e-4, gradients to 5e-4.

    Gradients of the state before it, too: the row continues documents of which 45 tokens came before. Seen to fail: a
    slot that a span empties kept; weights at level 0.
    """
    segments = packed(([60, 90], [-3, 70, 1, 2, -5, 60, -9]))
    continued = np.asarray(segments.ids) == 1
    positions = jnp.asarray(segments.positions + 45 * continued)
    segments = Segments(segments.ids, positions, segments.starts & ~continued)
    inputs = [jnp.asarray(x, jnp.float32) for x in example(4)]
    options = {"children": 3, "window": 4}
    _, state = FORMS["recurrent"](*map(jnp.float32, example(4, 45)), **options)

    def run(form, cuts):
        def loss(state, *inputs):
            *tokens, pool, bias = inputs
            outputs = []
            for start, stop in itertools.pairwise(cuts):
                span = jax.tree.map(lambda x: x[:, start:stop], (*tokens, segments))  # noqa: B023
                y, state = FORMS[form](*span[:3], pool, bias, state=state, segments=span[3], **options)
                outputs.append(y)
            out = jnp.concatenate(outputs, axis=1), state
            return sum(jnp.vdot(x, jnp.sin(jnp.arange(x.size)).reshape(x.shape)) for x in out), out

        return jax.jit(jax.grad(loss, argnums=tuple(range(6)), has_aux=True))(state, *inputs)

    wanted, found = run("recurrent", (0, T)), run("chunked", (0, 1, 38, 90, T))
    for tolerance, have, want in zip((5e-4, 1e-4), found, wanted, strict=True):
        for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_transition():
    """It does to a state what the span does, to 1e-5, and composes associatively, across starts, padding and levels.

    Seen to fail: a slot kept though its next node begins with the span's first token.
    """
    segments = packed(([140, 10], [-3, 20, 1, -40, 80, -6]))
    q, k, v, *parameters = (jnp.asarray(x, jnp.float32) for x in example(4))
    options = {"children": 3, "window": 4}

    def part(start, stop):
        return jax.tree.map(lambda x: x[:, start:stop], (q, k, v, segments))

    def transition(start, stop):
        *tokens, documents = part(start, stop)
        call = PYRAMID.prepare(tokens, parameters, segments=documents, options=PYRAMID.options(**options))
        return PYRAMID.transition(*call.span)

    @jax.jit
    def run():
        state = jnp.zeros((B, 4, pyramid.slots(**options), G, 1 + K + V))
        spans = [transition(*cut) for cut in itertools.pairwise((0, 1, 28, 48, 60, 100, T))]
        left = functools.reduce(PYRAMID.compose, spans)
        right = functools.reduce(lambda then, first: PYRAMID.compose(first, then), reversed(spans))
        *tokens, documents = part(0, T)
        after = [FORMS["chunked"](*tokens, *parameters, state=state, segments=documents, **options)[1]]
        after += [PYRAMID.apply(whole, state) for whole in (left, right, transition(0, T))]
        return after, (left, right, transition(0, T))

    after, whole = run()
    for tree, *others in (after, whole):
        for other in others:
            for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def products(jaxpr):
    """Multiplications in the matrix products of a program, all turns of its loops counted."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += math.prod(out) * math.prod(left[axis] for axis in contracted)
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [getattr(x, "jaxpr", x) for x in equation.params.values() if hasattr(getattr(x, "jaxpr", x), "eqns")]
        total += turns * sum(map(products, inner))
    return total


@pytest.mark.parametrize("length", [320, 1280])
def test_work(length):
    """Products a token, whatever T: H (L R + W) (K + V) to read, G L R (K + V + 1) to write, G K for the logit g.

    R = 11 here. The state is of the same size. Seen to fail: chunks of 4 W tokens.
    """
    children, window, levels = 4, 8, 5
    inputs = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in example(levels, length)]
    run = functools.partial(FORMS["chunked"], children=children, window=window)
    slots = levels * 11
    expected = B * length * (H * (slots + window) * (K + V) + G * slots * (K + V + 1) + G * K)
    assert products(jax.make_jaxpr(run)(*inputs).jaxpr) == expected
    assert jax.eval_shape(run, *inputs)[1].shape == (B, levels, 11, G, K + V + 1)


@every_form
@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_extremes(form, scale):
    """Queries and keys of 0 and of 1e3: outputs to 1e-4 of the formula, gradients finite.

    Seen to fail: token logits without their cap; the mean of a slot without tokens as 0 / 0.
    """
    inputs = example(3, 40, scale)

    def loss(*inputs):
        y, state = FORMS[form](*inputs, children=2, window=3)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state)), y

    gradients, y = jax.jit(jax.grad(loss, argnums=tuple(range(5)), has_aux=True))(*map(jnp.float32, inputs))
    wanted = np.stack([formula(*tokens, *inputs[3:], 2, 3) for tokens in zip(*inputs[:3], strict=True)])
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert all(np.isfinite(x).all() for x in gradients)


def test_bfloat16():
    """Only inputs and outputs are rounded: within 2^-8."""
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in example(3, 40)]
    y, state = jax.jit(functools.partial(FORMS["chunked"], children=2, window=3))(*inputs)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    *tokens, pool, bias = (np.asarray(x, np.float64) for x in inputs)
    wanted = np.stack([formula(*row, pool, bias, 2, 3) for row in zip(*tokens, strict=True)])
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-4)


@every_form
def test_refusals(form):
    """What was given and what to do, in a sentence. Seen to fail: a state without positions, taken for a new start."""
    q, k, v, pool, bias = (jnp.asarray(x, jnp.float32) for x in example(4, 8))
    run = functools.partial(FORMS[form], window=4)
    with pytest.raises(ValueError, match="children is 1"):
        run(q, k, v, pool, bias, children=1)
    with pytest.raises(ValueError, match="with a state, pass `Segments`"):
        run(q, k, v, pool, bias, state=jnp.zeros((B, 4, 7, G, K + V + 1)), children=4)
    with pytest.raises(ValueError, match="3 heads and k has 2"):
        run(q[:, :, :3], k, v, pool, bias[:3], children=4)
    with pytest.raises(ValueError, match="17 levels"):
        run(q, k, v, pool, jnp.zeros((H, 16)), children=4)
