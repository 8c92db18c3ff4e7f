"""The commands of docs/checkpoints.md that look after a run's checkpoints, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import checkpoints_in, command, train
from tiny_llama import OPTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def test_the_commands_run_on_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ("--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.async_mode=async")
    train(tmp_path / "outputs", *OPTIONS, *saving, ranks=2)
    folder = tmp_path / "outputs" / "checkpoint"
    section = re.search(r"## Look after them\n+```bash\n(.*?)```", PAGE, re.S)[1]
    lines = [line.split() for line in section.splitlines()]
    assert len(lines) == 7
    out = ""
    for program, *words in lines:
        assert program == "torchtitan"
        monkeypatch.chdir(tmp_path)
        words = [str(tmp_path / word) if word.startswith("outputs") else word for word in words]
        done = command(*words)
        assert done.exit_code == 0, done.err
        out += done.out
    assert out.count("good, by sizes") == 3 and out.count(" good\n") == 4
    assert f"would delete {folder}/step-2" in out and f"deleted {folder}/step-2" in out
    hugging_face = command("convert", "to-hf", str(tmp_path / "outputs/mean"), str(tmp_path / "hf"))
    assert hugging_face.exit_code == 0, hugging_face.err
    assert checkpoints_in(folder) == ["step-4", "step-6"]  # step-4 stays by --keep-every 4


def test_the_table_of_files_is_right(tmp_path: Path) -> None:
    train(tmp_path, *OPTIONS, "--training.steps=1", "--checkpoint.enable")
    files = {path.name for path in (tmp_path / "checkpoint" / "step-1").iterdir()}
    table = PAGE[PAGE.index("| in `step-500/` |") :].split("\n\n")[0]
    assert set(re.findall(r"^\| `([^`]+)`", table, re.M)) - {"step-500/"} == files
