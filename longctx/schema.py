"""Options: frozen dataclasses that are refused where they are made, built from dictionaries, and written as them again.

Every part of an experiment is made of them: the options of layers, position schemes and tasks, and `longctx.config`.
A field is a bool, int, float or str, a tuple of one of these, a mapping with names, other options, or options that are
chosen by kind; or None, where its annotation says so: options that may be None are also given as False, for none, and
as True, for their defaults. `build` and `plain` are each other's inverse.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np

from longctx.errors import UsageError


class Bound(NamedTuple):
    """The least and the largest that a whole number may be, in an annotation: `Annotated[int, Bound(0, 9)]`."""

    least: int
    most: int


class Written(NamedTuple):
    """Classes whose objects may be given for a text, that which `str` makes of them: `Annotated[str, Written(...)]`."""

    classes: tuple[type, ...]


SIZE = Bound(-(2**20), 2**20)  # of a whole number without another: sizes of arrays, and how many there are of something
Size = Annotated[int, Bound(1, 2**20)]
Tokens = Annotated[int, Bound(-(2**31) + 1, 2**31 - 1)]  # of a row or a document, and steps of training
Seed = Annotated[int, Bound(0, 2**32 - 1)]
SMALLEST, LARGEST = 1e-37, 1e37  # of a number that float32 holds, and some products of it
LETTERS = 4096  # of a text
ITEMS = 4096  # of a tuple or a mapping
CHANNELS = 2**20  # of all heads together


class Refused(UsageError):
    """Options that cannot be; `problems` has a sentence for each reason."""

    def __init__(self, problems: Iterable[str], name: str = ""):
        self.problems = [cut(problem, 600) for problem in problems]
        super().__init__("\n".join(f"{name}: {problem}" if name else problem for problem in self.problems))


class Options:
    """Derive frozen dataclasses of options from it: what cannot be is refused where it is made.

    Lists become tuples and whole numbers floats where the annotations say so.

    Raises:
      Refused: with everything that is wrong.
    """

    def problems(self) -> Iterator[str]:
        """What is wrong with the values together, each a sentence that begins with a field's name."""
        yield from ()

    def __post_init__(self):
        problems: list[str] = []
        for field, hint in zip(dataclasses.fields(self), hints(type(self)).values(), strict=True):
            object.__setattr__(self, field.name, _Builder(problems).value(hint, getattr(self, field.name), field.name))
        if problems := problems or _together(self):
            raise Refused(problems, getattr(type(self), "kind", type(self).__name__))


class Kinds(collections.UserDict):
    """Classes by the kind that experiment files give; the options of each, its `Config` or itself, have it as `kind`.

    They also know the `modules` without which they would not be there: of the class, and of who registers it.
    """

    def __setitem__(self, kind: str, cls: type) -> None:
        self._refuse(kind, cls)
        options = options_of(cls)
        if vars(options).get("kind", kind) != kind:  # a class that took over the options of another
            names = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
            cls.Config = options = type("Config", (options,), names | {"__doc__": options.__doc__})
        options.kind = kind
        if "modules" not in vars(options):  # else it is put into another registry, as by `MIXERS | MLPS`
            options.modules = (cls.__module__, _caller())
        super().__setitem__(kind, cls)

    def _refuse(self, kind: str, cls: type) -> None:
        taken, options = self.data.get(kind, cls), options_of(cls)
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"'{kind}' is {taken.__module__}.{taken.__qualname__} already; choose another name.")
        if other := next((name for name, known in self.data.items() if known is cls and name != kind), None):
            raise ValueError(f"{cls.__name__} is '{other}' already; derive a class from it for '{kind}'.")
        if dataclasses.is_dataclass(options) and "kind" in (field.name for field in dataclasses.fields(options)):
            raise ValueError(f"the options of {cls.__name__} have a field 'kind', which is their name in a registry.")


class Chosen:
    """As an annotation: options of a kind. A subclass has the `kinds` there are, or `build` is given them."""

    kinds: ClassVar[Mapping[str, type] | None] = None
    kind_by_default: ClassVar[str | None] = None


def _caller() -> str:
    """The module that registers a class."""
    frame = sys._getframe(2)
    while frame.f_globals["__name__"] in (__name__, "collections", "collections.abc", "_collections_abc"):
        frame = frame.f_back
    return frame.f_globals["__name__"]


def options_of(cls: type) -> type:
    """The dataclass of the options of a class that is chosen by kind."""
    return getattr(cls, "Config", cls)


def build(cls: type, tree: Any, kinds: Mapping[type, Mapping[str, type]] = types.MappingProxyType({})) -> Any:
    """An instance of the options `cls` from nested dicts, lists and scalars.

    Args:
      cls: the dataclass.
      tree: what `plain` gives, or parts of it; what is left out has its default.
      kinds: for subclasses of `Chosen`, what may be chosen.

    Raises:
      Refused: with everything that is wrong, each with its dotted name.
    """
    problems: list[str] = []
    built = _Builder(problems, kinds).options(cls, tree, "")
    if problems:
        raise Refused(problems)
    return built


def plain(value: Any) -> Any:
    """Options as nested dicts, lists and scalars: JSON, and what `build` makes the same options of."""
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


class _Builder:
    """Builds values, and collects the problems; what cannot be built is None."""

    def __init__(self, problems: list[str], kinds: Mapping[type, Mapping[str, type]] = types.MappingProxyType({})):
        self._problems, self._kinds = problems, kinds

    def value(self, hint: Any, value: Any, path: str) -> Any:
        """`value` as the type `hint` asks for it."""
        bound = SIZE
        if typing.get_origin(hint) is Annotated:
            hint, bound = typing.get_args(hint)[:2]
            if isinstance(bound, Written) and isinstance(value, bound.classes):
                value = str(value)
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            (hint,) = set(inner) - {types.NoneType}
            if isinstance(value, bool) and dataclasses.is_dataclass(hint):
                return hint() if value else None
            return None if value is None else self.value(hint, value, path)
        if origin is tuple:
            return self._tuple(inner, value, path)
        if origin is not None and issubclass(origin, Mapping):
            return self._mapping(inner[1], value, path)
        if issubclass(hint, Chosen):
            return self._chosen(hint, value, path)
        if dataclasses.is_dataclass(hint):
            return self.options(hint, value, path)
        return self._scalar(hint, bound, value, path)

    def options(self, cls: type, tree: Any, path: str) -> Any:
        """An instance of the dataclass `cls`."""
        if isinstance(tree, cls):
            return tree
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if isinstance(tree, tuple | list) and len(tree) == len(fields):  # a Stage as (steps, batch, length)
            tree = dict(zip(fields, tree, strict=True))
        if not isinstance(tree, Mapping):
            return self._refuse(path, f"is {show(tree)}; expected {', '.join(fields) or 'no options'}")
        before, values = len(self._problems), {}
        for name, value in tree.items():
            if name in fields:
                values[name] = self.value(hints(cls)[name], value, _joined(path, name))
            else:
                close = difflib.get_close_matches(name, fields, n=1) if isinstance(name, str) else ()
                advice = f"did you mean '{close[0]}'?" if close else f"known fields are {', '.join(fields)}"
                self._refuse(_joined(path, name), f"is not a field; {advice}")
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if name not in tree and required:
                self._refuse(_joined(path, name), "is missing; the experiment file must set it")
        if len(self._problems) > before:
            return None
        try:
            built = cls(**values)
            wrong = [] if isinstance(built, Options) else _together(built)
        except Refused as error:
            built, wrong = None, error.problems
        self._problems.extend(_joined(path, problem) for problem in wrong)
        return built

    def _chosen(self, base: type[Chosen], tree: Any, path: str) -> Any:
        """`{"kind": "yarn", ...}` as the options of that kind."""
        kinds = self._kinds.get(base, base.kinds)
        kind = getattr(type(tree), "kind", None)
        if kind is not None and (kinds is None or (kind in kinds and type(tree) is options_of(kinds[kind]))):
            return tree
        if not isinstance(tree, Mapping) or kinds is None:
            return self._refuse(path, f"is {show(tree)}; give a dictionary of its kind and options")
        options = dict(tree)
        kind = options.pop("kind", base.kind_by_default)
        if not isinstance(kind, str) or kind not in kinds:
            given = f"'{cut(kind)}'" if isinstance(kind, str) else show(kind)
            return self._refuse(f"{path}.kind", f"is {given}; choose one of {', '.join(sorted(kinds))}")
        return self.options(options_of(kinds[kind]), options, path)

    def _tuple(self, inner: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, tuple | list):
            return self._refuse(path, f"is {show(value)}; expected a tuple")
        if inner[-1] is Ellipsis:
            inner = inner[:1] * len(value)
        if len(value) != len(inner) or len(value) > ITEMS:
            expected = f"expected {len(inner)}" if len(value) != len(inner) else f"at most {ITEMS:,} are possible"
            return self._refuse(path, f"has {len(value):,} entries; {expected}")
        return tuple(map(self.value, inner, value, (f"{path}[{i}]" for i in range(len(value)))))

    def _mapping(self, hint: Any, value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return self._refuse(path, f"is {show(value)}; expected a dictionary")
        if len(value) > ITEMS:
            return self._refuse(path, f"has {len(value):,} entries; at most {ITEMS:,} are possible")
        for name in value:
            if not isinstance(name, str) or not name or "." in name or not name.isprintable():
                self._refuse(path, f"has the name {show(name)}; a name is a text without dots")
        return types.MappingProxyType(
            {name: self.value(hint, item, _joined(path, name)) for name, item in value.items()}
        )

    def _scalar(self, hint: type, bound: Bound, value: Any, path: str) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
            value = float(value)
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            return self._refuse(path, f"is {show(value)}, of type {type(value).__name__}; expected {hint.__name__}")
        if hint is float and not (value == 0 or SMALLEST <= abs(value) <= LARGEST):  # nan is neither
            return self._refuse(path, f"is {value}; give 0, or a number from {SMALLEST} to {LARGEST}")
        if hint is int and not bound.least <= value <= bound.most:
            return self._refuse(path, f"is {show(value)}; give a whole number from {bound.least:,} to {bound.most:,}")
        if hint is str and (len(value) > LETTERS or "\0" in value or not _encodes(value)):
            return self._refuse(path, f"is {show(value)}; give at most {LETTERS:,} letters of Unicode, without NUL")
        return str.__str__(value) if hint is str else hint(value)

    def _refuse(self, path: str, problem: str) -> None:
        self._problems.append(f"{path or 'it'} {problem}")


def show(value: Any) -> str:
    """`repr`, of a length that fits in a line."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    return cut(repr(value))


def cut(text: str, most: int = 100) -> str:
    """In one line, of so many letters at most."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 20]}... ({len(text):,} letters)"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _joined(path: str, name: Any) -> str:
    name = name if isinstance(name, str) else show(name)
    return f"{path}.{name}" if path else name


def _together(options: Any) -> list[str]:
    """What is wrong with values that are each of their type."""
    problems: list[str] = []
    try:
        problems.extend(options.problems() if hasattr(options, "problems") else ())
    except Refused as error:  # of options that are made of these
        problems.extend(error.problems)
    except ArithmeticError as error:
        problems.append(f"its values cannot be together: {error}, given {options}")
    sizes = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    for name, size in sizes.items():
        if name.endswith("_width") and isinstance(heads := sizes.get("heads"), int) and heads * size > CHANNELS:
            problems.append(f"{name} is {size:,} of {heads:,} heads; together they may have {CHANNELS:,} channels")
    return problems


def bare(hint: Any) -> Any:
    """An annotation without its bound, and without the None that it may allow."""
    if typing.get_origin(hint) is Annotated:
        return bare(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return bare(*(set(typing.get_args(hint)) - {types.NoneType}))
    return hint


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}
