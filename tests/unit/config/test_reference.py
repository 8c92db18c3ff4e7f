from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from torchtitan.config import JobConfig
from torchtitan.config.base import Range
from torchtitan.config.reference import reference

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


@dataclass
class Member:
    """An element."""

    weight: float = 1.0
    """How much."""


@dataclass
class Section:
    """A section
    over two lines."""

    mode: Literal["a", "b"] = "a"
    """`a` | `b`."""
    degree: Annotated[int, Range(ge=1, special=(-1,))] = -1
    """Over
    two lines."""
    share: Annotated[float, Range(ge=0, le=1)] | None = None
    """A share."""
    members: list[Member] = field(default_factory=list)
    """Elements."""


@dataclass
class Config:
    section: Section = field(default_factory=Section)


@dataclass
class Undocumented:
    """A section."""

    option: int = 1


def test_the_page_in_docs_is_up_to_date():
    update = "run: python -m torchtitan.config.reference > docs/configuration.md"
    assert PAGE.read_text() == reference(), update


def test_every_option_is_on_the_page():
    page = reference()
    for section in dataclasses.fields(JobConfig):
        (_, rest) = page.split(f"\n## `[{section.name}]`\n")
        text = rest.split("\n## ")[0]
        for option in dataclasses.fields(section.default_factory):
            assert f"\n| `{option.name}` |" in text


def test_a_section_shows_type_default_allowed_values_and_text():
    lines = reference(Config).splitlines()
    start = lines.index("## `[section]`")
    assert lines[start + 2 :] == [
        "A section over two lines.",
        "",
        "| key | type | default | allowed | meaning |",
        "| --- | --- | --- | --- | --- |",
        r'| `mode` | string | `"a"` | `"a"`, `"b"` | `a` \| `b`. |',
        "| `degree` | integer | `-1` | >= 1 or -1 | Over two lines. |",
        "| `share` | number |  | >= 0 and <= 1 | A share. |",
        "| `members` | array of tables | `[]` |  | Elements. |",
        "",
        "## `[[section.members]]`",
        "",
        "An element.",
        "",
        "| key | type | default | allowed | meaning |",
        "| --- | --- | --- | --- | --- |",
        "| `weight` | number | `1.0` |  | How much. |",
    ]


def test_an_option_without_a_docstring_is_refused():
    with pytest.raises(ValueError, match=r"Undocumented\.option has no docstring"):
        reference(make_dataclass("Config", [("section", Undocumented)]))
