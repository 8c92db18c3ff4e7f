"""What the command lines have in common: actions, aliases, numbers."""

from contextlib import suppress
from dataclasses import dataclass

import pytest
import tyro

from torchtitan import cli
from torchtitan.config.options import parse_action, parse_options
from torchtitan.errors import ConfigError

HAVE_ACTIONS = {
    "data": ["prepare", "inspect", "batch"],
    "convert": ["from-hf", "to-hf", "dequantize", "inspect"],
    "checkpoint": ["list", "verify", "prune", "diff"],
}


@dataclass
class Keep:
    """Keep some."""

    path: tyro.conf.Positional[str]
    keep_every: int = 1
    """How often."""


@dataclass
class Drop:
    """Drop all."""


def parse(*argv: str) -> Keep | Drop:
    return parse_action({"keep-some": Keep, "drop": Drop}, list(argv), "torchtitan it", "Does it.")


@pytest.mark.parametrize("option", ["--keep-every", "--keep_every"])
def test_an_action_gets_its_options(option: str) -> None:
    assert parse("keep-some", option, "3", "here") == Keep("here", 3)
    assert parse("drop") == Drop()


def test_an_unknown_action_is_refused_with_the_nearest_name() -> None:
    told = r"torchtitan it: unknown action 'keep'\. Did you mean 'keep-some'\? Allowed: drop, keep"
    with pytest.raises(ConfigError, match=told):
        parse("keep", "here")


def test_an_unknown_option_is_refused_with_the_nearest_name(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("keep-some", "here", "--keep-evry", "3")
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert "--keep-every" in told and "torchtitan it keep-some --help" in told


@pytest.mark.parametrize("command", HAVE_ACTIONS)
def test_a_command_with_actions_lists_them(command: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        cli.main([command])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and ", ".join(HAVE_ACTIONS[command]) in told
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0 and max(map(len, lines)) <= 80
    for action in HAVE_ACTIONS[command]:
        assert any(f"• {action} " in line for line in lines)
        with pytest.raises(SystemExit) as caught:
            cli.main([command, action, "--help"])
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: torchtitan {command} {action} [-h] ")


@pytest.mark.parametrize("option", ["--job.custom_import", "--custom-import", "--custom_import"])
@pytest.mark.parametrize("command", [["models"], ["convert", "to-hf", "a", "b"]], ids=" ".join)
def test_a_module_to_import_is_named_as_in_a_job(command: list[str], option: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, option, "no.such"])
    assert caught.value.code == 2
    assert "job.custom_import = 'no.such': the import failed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "launch", "converge"])
@pytest.mark.parametrize(
    "word", ["--training.steps=3", "--model.args.n_layers=2", "--job.config_file"]
)
def test_options_of_the_config_belong_behind_two_dashes(command: str, word: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "run.toml", word, "3"])
    assert caught.value.code == 2
    said = f"error: {word.partition('=')[0]}: options of the config follow --, and its file needs"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS.keys() - HAVE_ACTIONS.keys() - {"train"}))
def test_a_help_is_silent_about_what_is_unset(command: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    told = capsys.readouterr().out
    assert caught.value.code == 0 and "--help" in told and "\n\n\n" not in told
    assert not [word for word in ("{None}", "default: None", "default: )", "''") if word in told]
    assert not [line for line in told.splitlines() if "bos" in line and "default: " in line]


@pytest.mark.parametrize("command", ["", *sorted(cli.COMMANDS.keys() - {"train"})])
def test_a_help_fits_into_a_terminal(command: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith("usage: ")] == []


@dataclass
class Wide:
    limit: int | None = None
    """The first line of a text
    the second line, and a default: yes for
    all."""
    made_up: str = "without a text"


def test_a_help_has_no_line_breaks_of_the_source(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse_options(Wide, ["--help"], "it")
    shown = "The first line of a text the second line, and a default: yes for all."
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("command", [["keep-some", "here", "--keep-every"], ["wide", "--limit"]])
def test_a_wrong_number_is_told_as_in_a_file(command: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_action({"keep-some": Keep, "wide": Wide}, [*command, "1.5"], "it", "Does it.")
    assert caught.value.code == 2
    assert f"{command[-1]}: must be an integer, not 1.5" in capsys.readouterr().err


def test_a_number_may_be_unset() -> None:
    assert parse_options(Wide, ["--limit", "None"], "it") == parse_options(Wide, [], "it") == Wide()
