"""Commands on a disk that fails: one message, exit code 1, no files, whichever call it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_run import world_of_one  # noqa: F401
from failing_disk import Call, FailingDisk
from tiny_models import tiny_spec

from torchtitan import cli
from torchtitan.components.checkpoint import retry
from torchtitan.components.checkpoint.huggingface import ExportAssets
from torchtitan.components.checkpoint.huggingface_save import save_huggingface
from torchtitan.config import load_config, to_toml
from torchtitan.distributed.init import initialize_weights
from torchtitan.tools import result_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, world_of_one: None) -> Path:  # noqa: F811
    """With the Hugging Face folder `hf`, and the folder `run` of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("disk")
    spec = tiny_spec("llama3")
    model = spec.model_cls(spec.model_args)
    initialize_weights(model, 0, torch.device("cpu"))
    assets = ExportAssets("bytes", max_seq_len=64)
    save_huggingface([model], folder / "hf", torch.float32, assets, dist.group.WORLD)
    cli.main(["convert", "from-hf", f"{folder}/hf", f"{folder}/run/checkpoint/step-1"])
    (folder / "run" / "config.resolved.toml").write_text(to_toml(load_config([])))
    (folder / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    return folder


def same_each_time(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial")


@pytest.fixture
def disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FailingDisk:
    monkeypatch.setattr(retry, "RETRY_AFTER", ())
    monkeypatch.setattr(result_file, "own_partial", same_each_time)
    return FailingDisk(folder, monkeypatch)


def run(disk: FailingDisk, words: str, failing: Call | None = None) -> int:
    """Run a command, with the disk's folder in place of `@`, and return its exit code."""
    (disk.folder / "page.html").unlink(missing_ok=True)
    shutil.rmtree(disk.folder / "made", ignore_errors=True)
    disk.calls.clear()
    disk.failing = failing
    try:
        return cli.main(words.replace("@", f"{disk.folder}/").split())
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        disk.failing = None


def matters(call: Call) -> bool:
    """Whether the answer does: not if PyTorch asks for files in a new folder, nor if `resolve` asks
    whether a folder that is read is a link.
    """
    function, path = call
    return (
        "made.partial/" not in path if function == "stat" else function != "lstat" or "made" in path
    )


COMMANDS = [
    "report @run --out @page.html",
    "checkpoint list @run",
    "convert inspect @run/checkpoint/step-1",
    "checkpoint diff @hf @hf",
    pytest.param("convert from-hf @hf @made", marks=pytest.mark.long),
    pytest.param("convert to-hf @run/checkpoint/step-1 @made", marks=pytest.mark.long),
    pytest.param(
        "generate --checkpoint @run --tokenizer @hf --prompt a --max-new-tokens 1",
        marks=pytest.mark.long,
    ),
]


@pytest.mark.parametrize("words", COMMANDS)
def test_an_outage_is_never_taken_for_a_missing_file(
    disk: FailingDisk, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert run(disk, words) == 0
    calls = list(filter(matters, dict.fromkeys(disk.calls)))
    assert len(calls) >= 3
    for call in calls:
        capsys.readouterr()
        code, error = run(disk, words, call), capsys.readouterr().err
        assert code == 1, (call, error)
        assert error.startswith("error: ") and error.count("\n") == 1, (call, error)
        assert call[1] in error and "Input/output error" in error, (call, error)
        assert error.endswith("try again\n"), (call, error)
        assert not {"page.html", "made", "made.partial"} & set(os.listdir(disk.folder)), call


@pytest.mark.parametrize("words", ["report @run --out @page.html", "convert from-hf @hf @made"])
def test_a_full_disk_leaves_no_files(
    disk: FailingDisk, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    disk.is_full = True
    assert run(disk, words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device. Free some space" in error
    assert sorted(os.listdir(disk.folder)) == ["hf", "run"]
