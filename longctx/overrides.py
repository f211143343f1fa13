"""Experiment files and their overrides on the command line, which reach the fields that a file leaves out, too."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_dict, config_flags

from longctx import config, plugins, schema
from longctx.data import TASKS
from longctx.errors import UsageError
from longctx.schema import Chosen
from longctx.training import workdir as workdirs


class ExperimentParser(config_flags.config_flags.ConfigFileFlagParser):
    """Loads an experiment file for `--config=FILE`, with the default of whatever it leaves out.

    A `--config.a.kind=VALUE` chooses another kind first: options that both kinds have stay as the file says, others of
    the old kind are left out, and the new one's defaults come in.
    """

    def parse(self, path: str) -> ConfigDict:
        name, *argument = path.split(":", 1)
        experiment = _get(name, argument)
        given = _overrides()
        kinds = {name.removesuffix(".kind"): value for name, value in given.items() if name.endswith(".kind")}
        with experiment.unlocked():
            switches = {name for name, value in given.items() if str(value).lower() in ("true", "false")}
            left_out = _Filler(kinds, switches).fill(experiment, config.Experiment)
        for override in given:
            _find(experiment, override)
        for name, fields in left_out.items():
            print(f"note: with {name}.kind={kinds[name]} the file's {', '.join(fields)} are left out", file=sys.stderr)
        return experiment.lock()


class RunParser(config_flags.config_flags.ConfigFileFlagParser):
    """Loads the config.json of the run in a folder, for `--config=WORKDIR`."""

    def parse(self, path: str) -> ConfigDict:
        given = _overrides()
        try:
            run = workdirs.open_run(Path(path).expanduser())
        except UsageError:
            if given:
                raise
            return ConfigDict()  # the command reports it
        experiment = ConfigDict(_tuples(config.to_dict(run.experiment)))
        for override in given:
            _find(experiment, override)
        return experiment.lock()


def _get(name: str, argument: list[str]) -> ConfigDict:
    """What `get_config` of an experiment file returns."""
    module = plugins.run(name)
    if not isinstance(get_config := getattr(module, "get_config", None), Callable):
        raise UsageError("the file defines no function get_config().")
    experiment = plugins.called(name, get_config, *argument)
    if isinstance(experiment, FrozenConfigDict):
        experiment = experiment.as_configdict()
    if not isinstance(experiment, ConfigDict):
        raise UsageError(f"get_config() returned a {type(experiment).__name__}; it must return a ConfigDict.")
    return experiment


def _overrides() -> dict[str, str | None]:
    """Names a.b and values of all --config.a.b=VALUE on the command line."""
    found, arguments = {}, flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if match := re.match(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL):
            found[match[1]] = following if match[2] is None else match[2]
    return found


class _Filler:
    """Sets what a tree of ConfigDicts leaves to the defaults of the dataclasses that will be made of it."""

    def __init__(self, kinds: Mapping[str, str | None], switches: Set[str] = frozenset()):
        self._kinds = kinds  # by dotted name: chosen instead of what the tree has
        self._switches = switches  # dotted names: options that an override leaves out, or gives their defaults
        self._left_out: dict[str, list[str]] = {}

    def fill(self, tree: ConfigDict, cls: type, path: str = "") -> dict[str, list[str]]:
        """Fills `tree`, of the dataclass `cls`; returns the fields that were left out where another kind was chosen."""
        hints = schema.hints(cls)
        for name in config.following(cls):  # known once the width is
            if name not in tree:
                tree[name] = config_dict.placeholder(int)
        for field in dataclasses.fields(cls):
            default = field.default
            if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            self._field(tree, field.name, hints[field.name], default, f"{path}.{field.name}" if path else field.name)
        return self._left_out

    def _field(self, tree: ConfigDict, name: str, hint: Any, default: Any, path: str) -> None:
        hint = schema.bare(hint)
        try:
            value = tree.get(name, default)
        except config_dict.RequiredValueError as error:  # which no override may set either
            raise UsageError(f"{path} is a required placeholder; give it a value in the file.") from error
        if value is dataclasses.MISSING:
            return
        nested = isinstance(hint, type) and (issubclass(hint, Chosen) or dataclasses.is_dataclass(hint))
        if name not in tree and path in self._kinds:
            tree[name] = ConfigDict({"kind": self._kinds[path]})
        elif nested and path in self._switches:
            tree[name] = config_dict.placeholder(bool)
        elif nested and dataclasses.is_dataclass(value):
            tree[name] = ConfigDict(_dicts(value))
        elif name not in tree:
            tree[name] = value if value is not None else config_dict.placeholder(hint)
        elif (hint is float and type(value) is int) or (typing.get_origin(hint) is tuple and type(value) is list):
            with tree.ignore_type():  # as it will be, so that an override may be too
                tree[name] = float(value) if hint is float else tuple(value)
        node = tree[name]
        if not isinstance(node, ConfigDict):
            return
        if nested and issubclass(hint, Chosen):
            self._chosen(node, hint, path)
        elif nested:
            self.fill(node, hint, path)
        elif isinstance(typing.get_origin(hint), type) and issubclass(typing.get_origin(hint), Mapping):
            for key in list(node):
                self._field(node, key, typing.get_args(hint)[1], dataclasses.MISSING, f"{path}.{key}")

    def _chosen(self, node: ConfigDict, base: type[Chosen], path: str) -> None:
        kinds = KINDS.get(base, base.kinds)
        kind = node.get("kind", base.kind_by_default)
        wanted = self._kinds.get(path, kind)
        if path in self._kinds and wanted not in kinds:
            raise UsageError(f"--config.{path}.kind={wanted}: choose one of {', '.join(sorted(kinds))}")
        if wanted != kind:
            known = [field.name for field in dataclasses.fields(schema.options_of(kinds[wanted]))]
            others = [name for name in node if name not in (*known, "kind")]
            for name in others:
                del node[name]
            if others:
                self._left_out[path] = others
            kind = wanted
        if isinstance(kind, str) and kind in kinds:
            node.kind = kind
            self.fill(node, schema.options_of(kinds[kind]), path)


KINDS = {config.Source: {config.Data.kind: config.Data, **TASKS}}


def _dicts(options: Any) -> Any:
    """Options, and those within them, as dictionaries; tuples stay tuples, which an override must find."""
    if not dataclasses.is_dataclass(options):
        return options
    kind = {"kind": options.kind} if hasattr(options, "kind") else {}
    return kind | {field.name: _dicts(getattr(options, field.name)) for field in dataclasses.fields(options)}


def _tuples(tree: Any) -> Any:
    """Nested dictionaries with tuples for lists, which an override could not replace."""
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


def _find(tree: ConfigDict, name: str) -> None:
    """Raises UsageError if `tree` has no field of this dotted name."""
    path = ""
    for part in name.split("."):
        if not isinstance(tree, ConfigDict) or part not in tree:
            known = list(tree) if isinstance(tree, ConfigDict) else []
            close = difflib.get_close_matches(part, known, n=1)
            advice = f"did you mean '{path}{close[0]}'?" if close else f"the fields there are {', '.join(known)}"
            raise UsageError(f"'{path}{part}' is not a field; {advice if known else f'{path[:-1]} has none'}")
        tree, path = tree[part], f"{path}{part}."
