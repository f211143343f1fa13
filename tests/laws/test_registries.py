"""What the laws ask of the registries themselves."""

import dataclasses
import importlib
import pkgutil
import typing

import pytest
from jaxtyping import AbstractArray
from laws.cases import CONVOLVED, DEFERRED, GATHERING, IN_TURN, LAYERS

from longctx import ops
from longctx.layers import MIXERS, MLPS
from longctx.ops import FAMILIES
from longctx.ops.family import Keyed, Recurrence


def test_every_registered_layer_is_here():
    assert {kind for kind, _ in LAYERS.values()} == {*MIXERS, *MLPS}


def test_devices_take_turns_only_where_states_do_not_compose():
    """Recurrences that lack a `transition` are named in the table of cases, as are those with a form of their own.

    Seen to fail: a `transition` of None.
    """
    found = [family for family in FAMILIES.values() if isinstance(family, Recurrence)]
    assert {family.name for family in found if family.transition is None} == IN_TURN
    assert {family.name for family in found if family.deferred is not None} == DEFERRED
    assert {family.name for family in found if family.gathers is not None} == GATHERING
    with pytest.raises(ValueError, match="half needs `transition`, `compose` and `apply`, or none of them"):
        dataclasses.replace(FAMILIES["gated_delta"], name="half", transition=None)


def test_families_are_whole():
    """What modules of ops make is registered; whoever has two forms makes one; inputs are annotated, and so checked.

    Seen to fail: a family left out of `FAMILIES`; an input that is any array.
    """
    modules = [importlib.import_module(f"{ops.__name__}.{found.name}") for found in pkgutil.iter_modules(ops.__path__)]
    made = [value for module in modules for value in vars(module).values() if isinstance(value, Recurrence | Keyed)]
    assert {*made} == {*FAMILIES.values()}
    whole = {module.__name__ for module in modules if hasattr(module, "chunked") and hasattr(module, "recurrent")}
    assert whole == {family.chunked.__module__ for family in made if isinstance(family, Recurrence)}
    for family in made:
        for name, hint in typing.get_type_hints(family.inputs).items() if isinstance(family, Recurrence) else ():
            kinds = [kind for kind in typing.get_args(hint) or [hint] if isinstance(kind, type)]
            assert any(issubclass(kind, AbstractArray) for kind in kinds), f"{family.name}: {name}"


def test_every_mixer_has_a_short_convolution():
    """Those of `CONVOLVED` have it where they are asked for it."""
    assert not [name for name, cls in MIXERS.items() if not hasattr(cls.Config, "conv_width")]
    assert not [name for name in CONVOLVED if MIXERS[name].Config().conv_width]
