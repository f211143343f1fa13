"""Every layer and option can be found, with what it means; docs/layers.md is what the command prints."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from longctx import options
from longctx.errors import UsageError
from longctx.layers import MIXERS
from longctx.schema import options_of

GROUPS = options.groups()


@pytest.mark.parametrize("title", [title for title in GROUPS if not title.startswith("patterns")])
def test_every_option_has_a_meaning(title):
    """A comment behind it, or above it."""
    for name, cls in GROUPS[title].items():
        if dataclasses.is_dataclass(options_of(cls)):
            for field, meaning in options.meanings(options_of(cls)).items():
                assert meaning, f"{name}.{field} has no comment"


def test_the_page():
    """Seen to fail: a default changed; a row of the table removed."""
    page = pathlib.Path(__file__).parent.parent / "docs" / "layers.md"
    assert page.read_text(encoding="utf-8") == options.listed([]), "python -m longctx.options > docs/layers.md"


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_says_what_the_table_needs(name):
    """Its docstring has `State:`, its module's `Group:`, `Transition:`, `Devices:`. Seen to fail: one removed."""
    for field in ("Group", "State", "Transition", "Devices"):
        assert options.said(MIXERS[name], field), f"the docstrings of '{name}' have no '{field}: '"


def test_one_kind():
    text = options.listed(["yarn", "Window"])
    assert text.startswith("yarn\n")
    assert "    base: float       = 10000.0  b of the frequencies" in text  # inherited
    assert "Window(size" in text
    with pytest.raises(UsageError, match="'atention' is no kind; did you mean 'attention'"):
        options.listed(["atention"])


def test_comments_above_a_field_and_over_lines():
    @dataclasses.dataclass(frozen=True)
    class Config:
        # Of the first,
        # in two lines.
        first: int = 1
        second: tuple[int, ...] = (
            1,  # one
            2,  # two
        )
        third: float = 0.5  # "a # in it"

    assert options.meanings(Config) == {
        "first": "Of the first, in two lines.",
        "second": "one two",
        "third": '"a # in it"',
    }


def test_a_class_without_a_file_has_no_meanings():
    made = dataclasses.make_dataclass("Made", [("size", int, 1)])
    assert options.meanings(made) == {"size": ""}
    assert set(options.meanings(MIXERS["gla"].Config)) == {one.name for one in dataclasses.fields(MIXERS["gla"].Config)}


@pytest.mark.system
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", ("config", "workdir", "coordinator")),
        ("evaluate", ("workdir", "mesh")),
        ("generate", ("workdir", "prompt", "max_tokens", "mesh")),
        ("plan", ("config", "topology")),
    ],
)
def test_help(command, flags):
    found = subprocess.run(
        [sys.executable, "-m", f"longctx.{command}", "--help"], capture_output=True, text=True, check=True
    )
    for flag in flags:
        assert f"--{flag}:" in found.stdout
