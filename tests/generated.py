"""Random options of every kind, for properties that hold for all of them."""

import copy
import dataclasses
import random
import re
import types
import typing

from longctx import architecture, config, schema
from longctx.data import TASKS
from longctx.layers import MIXERS, MLPS
from longctx.layers.positions import Positions

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
    block = {name: options(rng, architecture.Block, 0.2) | {"mixer": value(rng, config.Mixer, None)} for name in names}
    found = {
        "model": options(rng, config.Model, 0.2) | {"pattern": tuple(rng.choices(names, k=3)), "blocks": block},
        "training": {"stages": [(rng.randint(1, 9), 4, 512)]} | options(rng, config.Training, 0.1),
    }
    for name, hint in typing.get_type_hints(config.Experiment, include_extras=True).items():
        if name not in found and rng.random() < 0.5:
            found[name] = ["string", "json"] if name == "plugins" else value(rng, hint, None)
    found["training"]["stages"] = [(rng.randint(1, 9), 4, 512)]
    return found


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
    if path.startswith("training.stages"):  # what does not fit them
        for name in {"mesh", "data", "evaluation"} & set(given):
            del given[name]
        return
    nodes, (*parents, leaf) = [given], re.sub(r"[\[,:].*", "", path).split(".")
    for name in parents:
        if isinstance(nodes[-1].get(name), dict):
            nodes.append(nodes[-1][name])
    if leaf in nodes[-1] and (leaf not in NEEDED or len(parents) > 2):
        del nodes[-1][leaf]
        return
    for node in reversed(nodes[1:]):
        if others := set(node) - NEEDED:
            for name in others:
                del node[name]
            return


NEEDED = {"kind", "mixer", "mlp", "pattern", "blocks", "stages", "b0", "b1", "b2"}
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 2**16, 2**20, 2**20 + 1, 2**31 - 1, 2**31, 2**32, 2**63, 10**30, -(10**20), 10**400]
NUMBERS += [0.0, -0.0, 0.5, 1.5, -1.0, 1e-300, 1e-38, 1e38, 1e300, float("nan"), float("inf"), -float("inf"), 1 - 1e-12]
WORDS = ["", " ", "a", "attention", "Causal()", "Window(1.5)", "~" * 10_000 + "Causal()", "~" * 3000 + "Causal()"]
WORDS += ["Global(1000000000)", "Window(99999999999)", "(" * 200, "(Window(1)|Sinks(1))&" * 30 + "Causal()", "x" * 5000]
WORDS += ["~nobody/x", "/proc/self/mem", "/dev/zero", "a\0b", "\ud800", "line\nline", "1e999", "Heads()", "Window(),"]
SIMILAR = {
    int: [0, 1, 2, 3, 5, 7, 17, 33, 64, 100, 1000, 4096, 65_536, 2**20, -1],
    float: [0.0, 0.5, 1.0, 1.5, 1e-6, 1e-37, 1e37, 1e6, 0.999, -0.5, -1e30],
    bool: [True, False],
    str: WORDS,
}
OTHERS = [None, True, False, (), [], {}, (1,), [[]], {"kind": None}, {"kind": []}, {"kind": {}}, {"kind": "gla"}]
OTHERS += [
    {1: 2},
    {None: 1},
    {"a.b": 1},
    {"": 1},
    object(),
    int,
    b"bytes",
    1j,
    {1, 2},
    range(3),
    [None] * 5000,
    lambda: 1,
]


def mutated(rng: random.Random) -> dict:
    """An experiment that someone, or some program, has damaged in up to three places."""
    given = config.to_dict(repaired(tree(rng)))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        parent, key = rng.choice(list(_places(given)))
        way = rng.randrange(8)
        if way == 0 and isinstance(parent, dict):
            del parent[key]
        elif way == 1 and isinstance(parent, dict):
            parent[rng.choice(["knid", "kind", 1, None, "x.y", "", ("a",), str(key)[::-1]])] = parent[key]
        elif way == 2:
            parent[key] = options(rng, rng.choice([config.Training, config.Data, config.Mesh, config.Evaluation]))
        elif way < 6:  # of the right type, at least
            parent[key] = copy.deepcopy(rng.choice(SIMILAR.get(type(parent[key]), OTHERS)))
        else:
            parent[key] = copy.deepcopy(rng.choice(rng.choice([NUMBERS, NUMBERS, WORDS, OTHERS])))
    return given


def _places(node):
    """(container, key) of everything within, tuples made lists on the way."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        if isinstance(node[key], tuple):
            node[key] = list(node[key])
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


TEXTS_OF_VALUES = [
    "",
    "0",
    "-1",
    "1",
    "3",
    "64",
    "2147483648",
    "1" * 30,
    "1" * 5000,
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
]
TEXTS_OF_VALUES += [
    "0.5",
    "True",
    "None",
    "()",
    "(1,)",
    "((1,2,3),)",
    "('a',)",
    "[",
    "{",
    "{'kind':'gla'}",
    "a",
    "x" * 5000,
]
TEXTS_OF_VALUES += [
    "gla",
    "attention",
    "yarn",
    "mqar",
    "Window(1.5)",
    "~" * 3000 + "Causal()",
    "é",
    "\ud800",
    "a b",
    "1,2",
    "@",
]
NAMES = [
    "seed",
    "mesh",
    "mesh.data",
    "model",
    "model.width",
    "model.pattern",
    "model.repeats",
    "model.dtype",
    "plugins",
]
NAMES += [
    "training.stages",
    "training.learning_rate",
    "training.answer_weight",
    "data",
    "data.kind",
    "data.path",
    "data.needles",
]
NAMES += ["data.vocab_size", "evaluation.factors", "checkpoints.every", "model.blocks", "model.blocks.only"]
NAMES += [
    f"model.blocks.only.{name}" for name in ("mixer", "mlp", "mixer.kind", "mlp.kind", "mlp.hidden", "mixer.heads")
]
NAMES += [
    f"model.blocks.only.mixer.{name}" for name in ("pattern", "positions", "positions.kind", "positions.base", "inner")
]
NAMES += [
    "",
    ".",
    "kind",
    "x",
    "model.",
    ".model",
    "model..width",
    "model.width.x",
    "__class__",
    "_fields",
    "lock",
    "items",
]


MEANT = [("seed", "3"), ("model.width", "8"), ("training.stages", "((1,2,64),)"), ("mesh.data", "1")]
MEANT += [("data.kind", kind) for kind in TASKS] + [("model.blocks.only.mlp.kind", kind) for kind in MLPS]
MIXER = "model.blocks.only.mixer"
MEANT += [(f"{MIXER}.kind", kind) for kind in MIXERS] + [(f"{MIXER}.positions.kind", kind) for kind in Positions.kinds]
MEANT += [(f"{MIXER}.heads", "1"), (f"{MIXER}.inner.kind", "gla"), (f"{MIXER}.positions.factor", "2")]


def arguments(rng: random.Random, file: str, workdir: str) -> list[str]:
    """A command line that a user, or a script with a fault, may give."""
    found = [f"--config={file}", f"--workdir={workdir}"]
    for _ in range(rng.choice([1, 1, 2, 3])):
        name, value = rng.choice([(rng.choice(NAMES), rng.choice(TEXTS_OF_VALUES)), rng.choice(MEANT)])
        found += rng.choice([[f"--config.{name}={value}"]] * 6 + [[f"--config.{name}"], [f"--config.{name}", value]])
    if rng.random() < 0.3:
        odd = [
            "--config",
            "--workdir",
            "--workdir=",
            "--noconfig",
            "--config=",
            f"--config={file}:x:y",
            "--mesh=1,2",
            "-",
            "--",
        ]
        odd += [
            f"--workdir={'x' * 5000}",
            "--workdir=~nobody/x",
            "--flagfile=/nowhere",
            "--num_processes=1e9",
            "--undefok=x",
        ]
        found.insert(rng.randrange(len(found) + 1), rng.choice(odd))
    return found
