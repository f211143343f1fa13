"""Random options of every kind, for properties that hold for all of them."""

import dataclasses
import random
import types
import typing

from longctx import config, schema
from longctx.data import TASKS
from longctx.layers import MIXERS, MLPS

KINDS = {config.Mixer: MIXERS, config.MLP: MLPS, config.Source: {"corpus": config.Data, **TASKS}}
TEXTS = ("", "Causal()", "Window(3) | Sinks(2)", "Window(2), Causal()", "bytes", "ü/ß", "a b")


def value(rng: random.Random, hint, now):
    """Another value of the type `hint`; `now` is a valid one."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return value(rng, inner[0], now)
    if origin in (typing.Union, types.UnionType):
        return None if rng.random() < 0.3 else value(rng, *(set(inner) - {types.NoneType}), now)
    if origin is tuple:
        some = [value(rng, inner[0], now[0] if now else None) for _ in range(rng.randrange(4))]
        return tuple(some) if rng.random() < 0.5 else some
    if isinstance(hint, type) and issubclass(hint, schema.Chosen):
        kinds = KINDS.get(hint, hint.kinds)
        kind = rng.choice(sorted(kinds))
        return {"kind": kind} | options(rng, schema.options_of(kinds[kind]))
    if dataclasses.is_dataclass(hint):
        return options(rng, hint) if now is None else {**schema.plain(now), **options(rng, hint)}
    if hint is bool:
        return rng.random() < 0.5
    if hint is int:
        return rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 64, (now or 1) * 2, -1])
    if hint is float:
        return rng.choice([0.0, 0.1, 0.5, 1.0, 2, 1 / 3, 1e-5, 64.0, (now or 1.0) * 1.5, -1.0])
    return rng.choice([now or "", *TEXTS])


def options(rng: random.Random, cls: type, share: float = 0.3) -> dict:
    """Some fields of `cls`, set to something of their type, and those without a default."""
    hints, found = typing.get_type_hints(cls, include_extras=True), {}
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING
        if required or rng.random() < share:
            found[field.name] = value(rng, hints[field.name], None if required else field.default)
    return found


def tree(rng: random.Random) -> dict:
    """An experiment as a dictionary, which an experiment file may well have written."""
    names = [f"b{i}" for i in range(rng.randint(1, 3))]
    block = {name: {part: value(rng, hint, None) for part, hint in PARTS.items()} for name in names}
    found = {
        "model": {"pattern": tuple(rng.choices(names, k=3)), "blocks": block},
        "training": {"stages": [(rng.randint(1, 9), 4, 512)]} | options(rng, config.Training, 0.1),
    }
    for name, hint in typing.get_type_hints(config.Experiment, include_extras=True).items():
        if name not in found and rng.random() < 0.5:
            found[name] = value(rng, hint, None)
    found["training"]["stages"] = [(rng.randint(1, 9), 4, 512)]
    return found


PARTS = {"mixer": config.Mixer, "mlp": config.MLP}


def repaired(given: dict) -> config.Experiment:
    """The experiment that `given` describes, after the fields that are refused were left out."""
    for _ in range(200):
        try:
            return config.parse(given, MIXERS, MLPS, TASKS)
        except schema.Refused as error:
            for problem in error.problems:
                _leave_out(given, problem.split(" ")[0])
    raise AssertionError(f"{given} cannot be repaired")


def _leave_out(given: dict, path: str) -> None:
    """Leaves out the field of this dotted name, or, where it is one of several, all options beside it."""
    parents, leaf = path.replace("[", ".").split(".")[:-1], path.split(".")[-1].split("[")[0].rstrip(",:")
    node = given
    for name in parents:
        if not isinstance(node, dict) or not isinstance(node.get(name), dict):
            break
        node = node[name]
    if leaf in node and leaf not in ("kind", "mixer", "mlp"):
        del node[leaf]
    else:
        for name in set(node) - {"kind", "mixer", "mlp", "model", "training", "pattern", "blocks", "stages"}:
            del node[name]
