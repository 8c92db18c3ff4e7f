"""What the user reads."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from run_folder import write_run

from torchtitan.commands.converge.command import main
from torchtitan.commands.converge.report import short
from torchtitan.tools import figures

LOSSES = [3.0, 2.0, 1.0]


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return write_run(tmp_path / "control", LOSSES)


def converge(tmp_path: Path, *arguments: Path | str) -> int:
    return main([*map(str, arguments), "--out", str(tmp_path / "out")])


def test_equal_runs_give_0_and_all_the_files(
    tmp_path: Path, control: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    test = write_run(
        tmp_path / "fsdp2", [3.0, 2.0, 1.00001], "--activation_checkpoint.mode=full", processes=2
    )
    assert converge(tmp_path, control, test) == 0
    printed = capsys.readouterr().out
    assert "fsdp2: EQUAL to control: loss within 1e-5 (step 3) (tolerance 1e-4)" in printed
    assert re.search(r"fsdp2 +2 +dp_shard 2 +1\.00001 +1e-5 \(step 3\) +0 +equal", printed)

    out = tmp_path / "out"
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["equal"] is True
    (test_verdict,) = verdict["tests"]
    assert test_verdict["state"] == "equal"
    assert test_verdict["metrics"]["loss"]["largest_at_step"] == 3
    assert verdict["config_differences"] == {
        "activation_checkpoint.mode": {"control": '"selective"', "fsdp2": '"full"'}
    }
    assert (
        "| fsdp2 | 2 | dp_shard 2 | 1.00001 | 1e-5 (step 3) | 0 | equal |"
        in (out / "table.md").read_text()
    )
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    html = (out / "report.html").read_text()
    assert "<svg" in html
    assert "activation_checkpoint.mode" in html
    assert not re.search(r'(src|href)="(?!#)', html)  # self-contained


def test_divergence_gives_1_and_says_where(
    tmp_path: Path, control: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_run(tmp_path / "good", LOSSES)
    bad = write_run(tmp_path / "bad", [3.0, 2.2, 1.5])
    assert converge(tmp_path, control, good, bad) == 1
    printed = capsys.readouterr().out
    assert "good: EQUAL to control" in printed
    assert (
        "bad: DIVERGED from control: loss beyond 1e-4 from step 2 (0.1), at most 0.5 (step 3)"
        in printed
    )
    assert "Not all equal" in printed
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert [test["state"] for test in verdict["tests"]] == ["equal", "diverged"]


def test_nan_and_missing_steps_are_failures_in_every_form(
    tmp_path: Path, control: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = write_run(tmp_path / "nan", [3.0, None, 1.0])
    short = write_run(tmp_path / "short", [3.0])
    empty = write_run(tmp_path / "empty", [], "--training.global_batch_size=4")
    assert converge(tmp_path, control, nan, short, empty) == 1
    printed = capsys.readouterr().out
    assert "nan: FAILED: loss is not finite at step 2" in printed
    assert "short: FAILED: no loss and grad_norm of steps 2-3 (of 3)" in printed
    assert "empty: FAILED: no loss and grad_norm of steps 1-3 (of 3)" in printed
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert [test["state"] for test in verdict["tests"]] == ["failed"] * 3
    assert verdict["tests"][0]["metrics"]["loss"]["largest"] is None


def test_a_failed_control_is_named(
    tmp_path: Path, control: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = write_run(tmp_path / "short", [3.0])
    assert converge(tmp_path, short, control) == 1
    printed = capsys.readouterr().out
    assert "short (control): FAILED: no loss and grad_norm of steps 2-3 (of 3)" in printed
    assert "control: FAILED: the control failed" in printed


def test_without_matplotlib_the_verdict_and_the_table_remain(
    tmp_path: Path, control: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    test = write_run(tmp_path / "test", LOSSES)
    assert converge(tmp_path, control, test) == 0
    assert "pip install 'torchtitan[plots]'" in capsys.readouterr().err
    out = tmp_path / "out"
    assert json.loads((out / "verdict.json").read_text())["equal"] is True
    assert "| test |" in (out / "table.md").read_text()
    assert "No plots: matplotlib is not installed" in (out / "report.html").read_text()
    assert not (out / "curves.png").exists()


def test_names_are_escaped_in_the_page(tmp_path: Path, control: Path) -> None:
    test = write_run(tmp_path / "<b>&|", LOSSES)
    assert converge(tmp_path, control, test) == 0
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;|" in html
    assert "| <b>&\\| |" in (tmp_path / "out" / "table.md").read_text()


def test_the_page_says_how_the_batch_grows(tmp_path: Path) -> None:
    ramp = ["--training.global_batch_size=1024", "--training.batch_size_ramp", "256:1", "512:2"]
    control, test = (write_run(tmp_path / name, LOSSES, *ramp) for name in ("control", "test"))
    assert converge(tmp_path, control, test) == 0
    html = (tmp_path / "out" / "report.html").read_text()
    assert "3 steps of 256 (to step 1), 512 (to step 2), 1,024 sequences of " in html


def test_the_home_folder_is_expanded(
    tmp_path: Path, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the jobs expand their `job.dump_folder` in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    test = write_run(tmp_path / "test", LOSSES)
    assert main([str(control), str(test), "--out=~/out"]) == 0
    assert (tmp_path / "out" / "verdict.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["control"], "give at least one test"),
        (["control", "test", "--rtol=-1"], "--rtol -1.0: must be at least 0"),
        (["control", "test", "--grad-norm-rtol=nan"], "--grad-norm-rtol nan: must be"),
        (["control", "test", "--allow-different=optimizr"], "Did you mean 'optimizer'"),
        (["control", "test", "--out=control/metrics.jsonl"], "cannot write there"),
    ],
)
def test_a_mistake_is_a_config_error(
    tmp_path: Path,
    control: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchtitan.errors import ConfigError

    write_run(tmp_path / "test", LOSSES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        main(arguments)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1e-4, "1e-4"),
        (1.234e-12, "1.2e-12"),
        (0.02, "2e-2"),
        (0.16, "0.16"),
        (25.0, "25"),
        (1.0, "1"),
        (float("nan"), "nan"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert short(value) == text
