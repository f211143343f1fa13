"""Every option can be found, with what it means."""

import dataclasses
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


def test_all_are_listed():
    text = options.listed([])
    for title, group in GROUPS.items():
        assert f"== {title}\n" in text
        for name in group:
            assert f"\n{name}" in text
    assert "    head_width: int        = 32                K\n" in text
    assert "tuple[Stage, ...]" in text
    assert "required" in text


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
