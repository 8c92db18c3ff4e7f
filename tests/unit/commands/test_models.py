"""`torchtitan models`."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.text import Text

from torchtitan import cli
from torchtitan.commands.models import main, model_sizes
from torchtitan.errors import ConfigError
from torchtitan.models import MODEL_REGISTRY, llama3
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec


@dataclass
class ToyArgs(BaseModelArgs):
    nparams: int = 0

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        return self.nparams, 6 * self.nparams + seq_len * 1_000_000


MODEL_CONFIGS = {"tiny": ToyArgs(1_234_567), "8B": ToyArgs(8_030_261_248)}


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(llama3.get_train_spec("debugmodel"), model_args=MODEL_CONFIGS[flavor])


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_REGISTRY, "toy", get_train_spec)


def test_piped_list_is_plain_and_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy"]) == 0
    assert capsys.readouterr().out == (
        "model  flavor  parameters        exactly  GFLOP/token at 4,096\n"
        "toy    tiny        1.23 M      1,234,567                 4.103\n"
        "toy    8B          8.03 B  8,030,261,248                52.278\n"
    )


def test_seq_len_changes_the_flops(capsys: pytest.CaptureFixture[str]) -> None:
    main(["toy", "--seq-len", "1000"])
    header, first, _ = capsys.readouterr().out.splitlines()
    assert header.endswith("GFLOP/token at 1,000")
    assert first.endswith(" 1.007")


@pytest.mark.parametrize("length", ["0", "-1", "many"])
def test_seq_len_out_of_range_is_refused(length: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["models", "toy", "--seq-len", length])
    assert caught.value.code == 2


def test_all_models_are_listed_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    listed = {tuple(line.split()[:2]) for line in capsys.readouterr().out.splitlines()}
    assert {("toy", "tiny"), ("llama3", "8B"), ("llama3", "debugmodel")} <= listed


def test_llama3_8b_has_its_known_size() -> None:
    nparams, flops_per_token = model_sizes("llama3", 4096)["8B"]
    assert nparams == 8_030_261_248
    assert flops_per_token > 6 * 7.5e9


def test_unknown_model_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no model 'lama3'\. Did you mean 'llama3'\?"):
        main(["lama3"])


def test_custom_import_adds_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "from torchtitan.models import MODEL_REGISTRY\nMODEL_REGISTRY['other'] = "
    source += "MODEL_REGISTRY['toy']\n"
    (tmp_path / "module_with_other_model.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MODEL_REGISTRY, "other", None)  # so that it is taken out again
    main(["other", "--custom-import", "module_with_other_model"])
    assert "other  8B" in capsys.readouterr().out


def test_custom_import_that_fails_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no_such_module"):
        main(["--custom-import", "no_such_module"])


def test_terminal_gets_a_table_that_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    main(["toy"])
    lines = Text.from_ansi(terminal.getvalue()).plain.splitlines()
    assert any("─" in line for line in lines)
    assert any("8.03 B" in line and "8,030,261,248" in line for line in lines)
    assert max(len(line) for line in lines) <= 80
