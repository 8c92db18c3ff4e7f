"""`[model.args]` and `--model.args.FIELD`: a table whose keys the config does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchtitan.config import load_config, origin, to_toml
from torchtitan.errors import ConfigError

TEXT = """\
[model]
flavor = "8B"
[model.args]
n_layers = 4
kinds = ["a", "b"]
[model.args.moe]
top_k = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    return str(path)


def test_the_command_line_changes_single_values_of_the_file(file: str) -> None:
    argv = ["--model.args.n_layers=8", "--model.args.moe.num-experts", "16", "--training.steps=3"]
    config = load_config([file, *argv])
    moe = {"top_k": 2, "num_experts": 16}
    assert config.model.args == {"n_layers": 8, "kinds": ["a", "b"], "moe": moe}
    assert config.training.steps == 3 and config.model.flavor == "8B"
    assert load_config([file, "--model.args={n_layers = 5}"]).model.args["n_layers"] == 5


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("8", 8),
        ("-1", -1),
        ("1e-5", 1e-5),
        ("true", True),
        ("True", "True"),
        ("none", "none"),
        ('"8"', "8"),
        ("[1, 2]", [1, 2]),
        ("[1, 2", "[1, 2"),
        ("a = b", "a = b"),
        ("8\nother = 9", "8\nother = 9"),
        ("", ""),
    ],
)
def test_a_value_is_written_as_in_toml_or_is_a_bare_string(written: str, value: object) -> None:
    for argv in ([f"--model.args.x={written}"], ["--model.args.x", written]):
        (read,) = load_config(argv).model.args.values()
        assert read == value and type(read) is type(value)


def test_a_resolved_config_has_the_same_args(tmp_path: Path) -> None:
    argv = [r"--model.args={a = [{'b c' = inf}], d = {}, 'é' = 'x\y', none = 'none'}"]
    config = load_config(argv)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(to_toml(config))
    assert load_config([str(resolved)]).model == config.model
    config.model.args = {"a": None}  # by a program
    resolved.write_text(to_toml(config))
    assert load_config([str(resolved)]).model.args == {"a": "none"}


def test_messages_name_the_line_of_the_file_or_the_key(file: str) -> None:
    config = load_config([file, "--model.args.moe.top_k=3"])
    assert origin(config, "model.args.n_layers").endswith("run.toml:4: [model] args.n_layers = 4")
    assert origin(config, ("model", "args", "moe", "top_k")) == "model.args.moe.top_k = 3"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.args.x"], r"--model\.args\.x: needs a value"),
        (["--model.args.x", "--training.steps=1"], r"--model\.args\.x: needs a value"),
        (["--model.args=8"], r"--model\.args: must be a table, such as .*, not '8'"),
        (["--model.args.x=1979-05-27"], r"--model\.args\.x: must be a boolean, .*, not a date"),
        (["--model.args.x=nan"], r"--model\.args\.x: must be a number, not nan"),
        (["--model.args.x=99999999999999999999"], r"--model\.args\.x: must fit in 64 bits"),
        (["--model.args" + ".x" * 99 + "=1"], "is nested too deeply"),
        (["--model.args.x=" + "[" * 90 + "]" * 90], "is nested too deeply"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(argv)


def test_a_table_of_a_file_may_not_be_nested_without_end(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("model.args" + ".x" * 3000 + " = 1")
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config([str(path)])


def test_a_model_is_described_with_its_changes() -> None:
    assert str(load_config([]).model) == "llama3 debugmodel"
    changed = load_config(["--model.args.n_layers=8", "--model.args.moe.top_k=1"]).model
    assert str(changed) == "llama3 debugmodel (n_layers = 8, moe = {top_k = 1})"
