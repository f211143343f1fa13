"""A layer on a span, with the gradients of given weights of all that it gives: one program serves several laws.

Compiling is what the laws take their time for. A program is compiled once for a layer, a length of span and a room of
its state; documents, the state before, and the weights by which gradients are asked are its arguments. pytest runs the
laws of one layer one after another (conftest.py), and the programs of the last few layers are kept.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from laws.cases import D, T, make, packed
from laws.compare import with_losses

# A row of T tokens is one token and three parts, so that laws of parts need programs of two lengths alone.
PART = (T - 1) // 3


class Span(NamedTuple):
    """What a layer gives for a span, and the gradients of its parameters, its inputs and the state before."""

    y: Any
    state: Any
    gradients: tuple


def weights(tree):
    """A loss that is a fixed mixture of the numbers of a tree: the weight of each."""

    def mixture(leaf):
        angles = np.arange(leaf.size).reshape(leaf.shape) * 0.7
        return (np.exp(1j * angles) if jnp.iscomplexobj(leaf) else np.sin(angles)).astype(leaf.dtype)

    return jax.tree.map(mixture, tree)


def real(tree):
    """Of a tree, what has gradients: a list of leaves."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def differentiated(graph, params, x, segments, state, dy, dstate, losses):
    """`Span` of a layer; gradients of <y, dy> + <state after, dstate> + losses * (those that it records).

    No `dstate` is 0.
    """
    leaves, tree = jax.tree.flatten(state)

    def run(params, x, held):
        held = iter(held)
        given = [next(held) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf for leaf in leaves]
        layer = nnx.merge(graph, params)
        (y, after), recorded = with_losses(layer, x, segments, jax.tree.unflatten(tree, given))
        return (y, real(after), jnp.asarray(recorded, jnp.float32)), after

    (y, ends, _), pull, after = jax.vjp(run, params, x, real(state), has_aux=True)
    dstate = [jnp.zeros_like(leaf) for leaf in ends] if dstate is None else dstate
    return Span(y, after, pull((dy, dstate, losses)))


def compiled(name, length, room, dtype=jnp.float32):
    """`run(params, x, segments, state, dy, dstate, losses) -> Span` for two rows."""
    graph, params = make(name)
    x = jax.ShapeDtypeStruct((2, length, D), dtype)
    state = empty(name, room, dtype)
    segments = jax.eval_shape(lambda: packed([[length]] * 2, length))
    run = jax.jit(functools.partial(differentiated, graph))
    return run.lower(params, x, segments, state, x, real(state), np.float32(0)).compile()


program = functools.lru_cache(maxsize=8)(compiled)


@functools.lru_cache(maxsize=8)
def empty(name, room, dtype=jnp.float32):
    """The empty state of a layer for two rows."""
    graph, params = make(name)
    return jax.device_get(jax.jit(lambda: nnx.merge(graph, params).init_state(2, room, dtype))())


def span(name, x, segments, state=None, dy=None, dstate=None, losses=0, room=T, run=None):
    """`Span` of a layer by its program; no state is the empty one, and no weight is 0."""
    state = empty(name, room, x.dtype) if state is None else state
    run = program(name, x.shape[1], room, x.dtype) if run is None else run
    dy = np.zeros(x.shape, x.dtype) if dy is None else dy
    dstate = [np.zeros(leaf.shape, leaf.dtype) for leaf in real(state)] if dstate is None else dstate
    return jax.device_get(run(make(name)[1], x, segments, state, dy, dstate, np.float32(losses)))
