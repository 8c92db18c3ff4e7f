"""A user's mistake is found before weights, whatever the size of the model, take memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_llama
import torch.distributed as dist

from torchtitan import train

MISTAKES = {
    "data": ("--training.dataset_path=/no/such.jsonl", "/no/such.jsonl"),
    "validation": ("--validation.dataset_path=/no/such.txt", "validation.dataset = 'text'"),
    "folder": ("--job.dump_folder=/proc/run", "job.dump_folder"),
}


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_weights_are_made_for_a_mistake(
    mistake: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def initialize(*_: object) -> None:
        raise AssertionError("weights are made")

    monkeypatch.setattr(train, "initialize_weights", initialize)
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')
    (tmp_path / "good.txt").write_text("good")
    option, message = MISTAKES[mistake]
    good = [
        f"--job.dump_folder={tmp_path}/run",
        *("--training.dataset=jsonl", f"--training.dataset_path={tmp_path}/good.jsonl"),
        *("--validation.enable", "--validation.dataset=text"),
        f"--validation.dataset_path={tmp_path}/good.txt",
    ]
    with pytest.raises(SystemExit) as exit_code:
        train.main([*tiny_llama.OPTIONS, *good, option])
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


def test_a_doubt_is_told_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["--lr_scheduler.warmup_steps=60", "--training.steps=60", "--training.dataset=text"]
    options += ["--training.dataset_path=/no/such", f"--job.dump_folder={tmp_path}"]
    with pytest.raises(SystemExit):
        train.main([*tiny_llama.OPTIONS, *options])
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith("lr_scheduler.warmup_steps = 60: the warm-up takes up the")
