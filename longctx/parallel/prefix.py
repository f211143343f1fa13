"""The exclusive prefix scan of a monoid over a mesh axis, and the states that enter each device.

Device p holds the transition t_p of its span. What stands before it acts as

    t_0 ∘ t_1 ∘ … ∘ t_{p-1}          (∘ is compose(first, then), associative, not commutative)

By Hillis and Steele (1986): before hop d = 1, 2, 4, … device p holds the composition of the spans (p-d, p], and of
(p-d, p) without its own; it composes both with what device p-d holds. ⌈log₂ devices⌉ messages of one transition
each, whatever the length of the spans.

The state that enters device p + 1 is s_{p+1} = A_p s_p + b_p. Where A_p is linear and a transition has its transpose,
`transition.transposed()`, its gradient is the same scan from the last device to the first: with c_p the cotangent that
s_p has on its own device, the whole is

    λ_p = A_pᵀ λ_{p+1} + c_p,

and that of t_p follows from s_p and λ_{p+1} where it is. No hop is saved, only the transition and the state; the last
hop of either scan sends no A, which nobody composes any further. Gradients of other transitions go back hop by hop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from longctx.ops.family import Linear, Recurrence
from longctx.parallel import relay

Transition = TypeVar("Transition")


def entering(family: Recurrence, transition: Any, state: Any, axis_name: str) -> Any:
    """The state that enters this device's span, inside a `jax.shard_map`.

    Args:
      family: its `compose` and `apply` are called.
      transition: of this device's span.
      state: before the first device's span, the same on all devices.
      axis_name: the mesh axis.
    """
    if not isinstance(transition, Linear):
        before = family.apply(exclusive(family.compose, transition, axis_name), state)
        return on_first(state, before, axis_name)

    count = relay.blocks(transition, jax.lax.axis_size(axis_name)) if transition.column_wise else 0

    def coming(transition, state, device, reverse=False):
        if count:
            return relay.pass_on(family.apply, transition, state, axis_name, device, count, reverse)
        return exclusive(family.compose, transition, axis_name, device, reverse).state

    # The device's number is an argument: asked for in here, the compiler of jax 0.10.2 refuses it where equal blocks
    # are recomputed ("PartitionId instruction is not supported").
    @jax.custom_vjp
    def run(transition, state, device):
        # The scan has the state from the first device's transition, and so its last hop needs no A.
        own = transition.state if count else _where(device == 0, family.apply(transition, state), transition.state)
        return _where(device == 0, state, coming(transition._replace(state=own), state, device))

    def forward(transition, state, device):
        entered = run(transition, state, device)
        return entered, (transition, entered, device)

    def backward(saved, cotangent):
        *saved, device = saved
        mirrored = saved[0].transposed()._replace(state=cotangent)
        after = coming(mirrored, jnp.zeros_like(cotangent), device, reverse=True)  # of the state after the span
        transition, before = jax.vjp(family.apply, *saved)[1](after)
        return transition, _where(device == 0, cotangent + before, jnp.zeros_like(cotangent)), None

    run.defvjp(forward, backward)
    return run(transition, state, jax.lax.axis_index(axis_name))


def exclusive(
    compose: Callable[[Transition, Transition], Transition],
    transition: Transition,
    axis_name: str,
    device: Int[Array, ""] | None = None,
    reverse: bool = False,
) -> Transition:
    """The composition of the transitions of all earlier devices along `axis_name`, inside a `jax.shard_map`.

    Args:
      compose: `compose(first, then)`, associative. It must be finite on a transition of zeros, which is what a
        device without sender receives and discards.
      transition: this device's, a pytree of arrays of equal shapes on all devices.
      axis_name: the mesh axis; any number of devices.
      device: this one's number along the axis; asked for here by default.
      reverse: from the last device to the first: the composition of those of all later devices, the last one's first.

    Returns:
      A transition. The first device (the last, in reverse) has none before it and gets zeros, which the caller must
      not apply.
    """
    devices = jax.lax.axis_size(axis_name)
    device = jax.lax.axis_index(axis_name) if device is None else device
    index = devices - 1 - device if reverse else device
    before, through = jax.tree.map(jnp.zeros_like, transition), transition
    hop = 1
    while hop < devices:
        received = shift(through, -hop if reverse else hop, axis_name)
        before = received if hop == 1 else _where(index >= hop, compose(received, before), before)
        if 2 * hop < devices:
            through = _where(index >= hop, compose(received, through), through)
        hop *= 2
    return before


def shift(tree, hop: int, axis_name: str):
    """What the device `hop` earlier along the axis holds (later, if negative); zeros where there is none."""
    devices = jax.lax.axis_size(axis_name)
    pairs = [(i, i + hop) for i in range(devices) if 0 <= i + hop < devices]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), tree)


def on_first(first, others, axis_name: str):
    """`first` on the first device along `axis_name`, `others` on the others."""
    return _where(jax.lax.axis_index(axis_name) == 0, first, others)


def _where(condition, then, otherwise):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), then, otherwise)
