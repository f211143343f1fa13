"""What the laws ask of the registries themselves."""

import dataclasses
import types

import jax.numpy as jnp
import pytest
from laws.cases import CONVOLVED, DEFERRED, FAMILIES, GATHERING, IN_TURN, LAYERS

from longctx import ops
from longctx.layers import MIXERS, MLPS
from longctx.ops import linear_scan
from longctx.ops.family import Recurrence
from longctx.parallel import family, sequence


def test_every_registered_layer_is_here():
    assert {kind for kind, _ in LAYERS.values()} == {*MIXERS, *MLPS}


def test_devices_take_turns_only_where_states_do_not_compose():
    """A family that layers run by `sequence.recurrence` is whole; those that lack a `transition` are named above.

    Seen to fail: a `transition` left out, misspelt or None, a misspelt `deferred`.
    """
    families = {op.__name__.rpartition(".")[2]: op for op in FAMILIES if hasattr(op, "transition")}
    for op in families.values():
        family.check(op)
    objects = {name: op for name, op in ops.FAMILIES.items() if isinstance(op, Recurrence)}
    assert {name for name, op in (families | objects).items() if op.transition is None} == IN_TURN
    assert {name for name, op in objects.items() if op.deferred is not None} == DEFERRED
    assert {name for name, op in families.items() if hasattr(op, "gathers")} == GATHERING
    with pytest.raises(ValueError, match="misspelt needs `transition`, `compose` and `apply`, or none"):
        dataclasses.replace(ops.FAMILIES["gated_delta"], name="misspelt", transition=None)

    broken = types.ModuleType("broken")
    vars(broken).update({name: vars(linear_scan)[name] for name in family.NEEDED if name != "transition"})
    x = jnp.ones((1, 8, 2))
    with pytest.raises(ValueError, match="broken has no `transition`; define recurrent"):
        sequence.recurrence(broken, x, x, segments=None)
    broken = types.ModuleType("misspelt")
    vars(broken).update({name: vars(linear_scan)[name] for name in family.NEEDED} | {"defered": linear_scan.transition})
    with pytest.raises(ValueError, match="misspelt has a function `defered`; call it `deferred`"):
        sequence.recurrence(broken, x, x, segments=None)


def test_every_mixer_has_a_short_convolution():
    """Those of `CONVOLVED` have it where they are asked for it."""
    assert not [name for name, cls in MIXERS.items() if not hasattr(cls.Config, "conv_width")]
    assert not [name for name in CONVOLVED if MIXERS[name].Config().conv_width]
