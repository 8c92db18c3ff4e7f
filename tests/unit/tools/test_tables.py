"""Tables on a terminal, and in a pipe."""

from __future__ import annotations

import sys

import pytest

from torchtitan.tools.tables import print_table


@pytest.mark.parametrize("terminal", [True, False])
def test_names_of_others_are_shown_and_not_obeyed(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    print_table(["name"], [["\x1b[31mred\x9b"], ["[/bold]"], [":smile:"]], left=1)
    out = capsys.readouterr().out
    assert r"\x1b[31mred\x9b" in out and "[/bold]" in out and ":smile:" in out
    assert "\x1b[31m" not in out and "\x9b" not in out


def test_a_narrow_terminal_cuts_no_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    names = [f"model.layers.0.feed_forward.w{i}.weight" for i in (1, 2)]
    print_table(["tensor", "difference"], [[name, "0.1"] for name in names], left=1)
    out = "".join(line[:18].strip() for line in capsys.readouterr().out.splitlines())
    assert all(name in out for name in names)
