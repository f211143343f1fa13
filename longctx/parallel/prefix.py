"""The exclusive prefix scan of a monoid over a mesh axis.

Device p holds the transition t_p of its span. What stands before it acts as

    t_0 ∘ t_1 ∘ … ∘ t_{p-1}          (∘ is compose(first, then), associative, not commutative)

By Hillis and Steele (1986): before hop d = 1, 2, 4, … device p holds the composition of the spans (p-d, p], and of
(p-d, p) without its own; it composes both with what device p-d holds. ⌈log₂ devices⌉ messages of one transition
each, whatever the length of the spans. Gradients are the same messages in reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Transition = TypeVar("Transition")


def exclusive(
    compose: Callable[[Transition, Transition], Transition], transition: Transition, axis_name: str
) -> Transition:
    """The composition of the transitions of all earlier devices along `axis_name`, inside a `jax.shard_map`.

    Args:
      compose: `compose(first, then)`, associative. It must be finite on a transition of zeros, which is what a
        device without sender receives and discards.
      transition: this device's, a pytree of arrays of equal shapes on all devices.
      axis_name: the mesh axis; any number of devices.

    Returns:
      A transition. The first device has none before it and gets zeros, which the caller must not apply.
    """
    devices = jax.lax.axis_size(axis_name)
    index = jax.lax.axis_index(axis_name)
    before, through = jax.tree.map(jnp.zeros_like, transition), transition
    hop = 1
    while hop < devices:
        received = shift(through, hop, axis_name)
        before = received if hop == 1 else _where(index >= hop, compose(received, before), before)
        if 2 * hop < devices:
            through = _where(index >= hop, compose(received, through), through)
        hop *= 2
    return before


def shift(tree, hop: int, axis_name: str):
    """What the device `hop` places earlier holds; zeros where there is none."""
    pairs = [(i, i + hop) for i in range(jax.lax.axis_size(axis_name) - hop)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), tree)


def _where(condition, then, otherwise):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), then, otherwise)
