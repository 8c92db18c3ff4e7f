"""`torchtitan checkpoint average`: a checkpoint of the mean of weights."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from checkpoint_run import Run, TinyArgs, TinyModel, world_of_one  # noqa: F401
from safetensors.torch import save_file

from torchtitan import cli
from torchtitan.commands.checkpoint import average as average_module
from torchtitan.commands.checkpoint.average import average
from torchtitan.components.checkpoint import retry
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.run_folder import CONFIG_FILE
from torchtitan.config import load_config


class CountingModel(TinyModel):
    def __init__(self, args: TinyArgs) -> None:
        super().__init__(args)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("turn", torch.ones(3, dtype=torch.complex64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.turn *= 1j
        return super().forward(tokens)

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.zeros_(self.passes)
        nn.init.ones_(self.turn)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, world_of_one: None) -> list[Path]:  # noqa: F811
    """step-2, step-4 and the export step-6."""
    folder = tmp_path_factory.mktemp("run")
    model = CountingModel(TinyArgs())
    Run(folder, model=model, last_save_model_only=True, steps=6).train(6, last=True)
    return [folder / "checkpoint" / f"step-{step}" for step in (2, 4, 6)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return CountingModel(TinyArgs()).load_checkpoint(str(folder)).state_dict()


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that is refused."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(["checkpoint", "average", *map(str, arguments)])
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    return message


def test_each_weight_is_the_mean_and_counts_are_those_of_the_last(
    steps: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(average_module, "PIECE", 10)
    out = tmp_path / "mean"
    assert cli.main(["checkpoint", "average", *map(str, steps[::-1]), "--out", str(out)]) == 0
    assert f"{out}: the mean of 3 checkpoints, " in capsys.readouterr().out
    mean, sources = weights(out), [weights(step) for step in steps]
    assert mean["passes"] == 6
    for name, tensor in mean.items():
        if name != "passes":
            expected = torch.stack([source[name] for source in sources]).mean(0)
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
            assert not torch.equal(tensor, sources[-1][name]), name


def test_it_is_an_export_that_knows_its_run(steps: list[Path], tmp_path: Path) -> None:
    steps_3 = (steps[0], steps[1], steps[1])
    cli.main(["checkpoint", "average", *map(str, steps_3), "--out", f"file://{tmp_path}/mean"])
    manifest, last = (Manifest.read_whole(folder) for folder in (tmp_path / "mean", steps[1]))
    assert (manifest.step, manifest.model_only, manifest.model) == (4, True, last.model)
    assert not manifest.damaged_files(tmp_path / "mean")
    assert load_config(["--job.config_file", str(tmp_path / "mean" / CONFIG_FILE)])
    one, two = (weights(step)["output.weight"] for step in steps[:2])
    twice = weights(tmp_path / "mean")["output.weight"]  # the second weighs twice
    torch.testing.assert_close(twice, (one + 2 * two) / 3)


def test_what_a_run_may_change_has_a_mean(steps: list[Path], tmp_path: Path) -> None:
    """The dtype of its export, and the kernel of its attention."""
    model = CountingModel(TinyArgs())
    export = {"last_save_model_only": True, "export_dtype": "bfloat16"}
    Run(tmp_path, model=model, seed=1, steps=2, **export).train(2, last=True)
    short = tmp_path / "checkpoint" / "step-2"
    manifest = Manifest.read(short)
    manifest.model["args"]["attention"] = "sdpa"
    manifest.write(short)
    average([str(steps[1]), str(short)], tmp_path / "mean")
    mean, *sources = (weights(folder) for folder in (tmp_path / "mean", steps[1], short))
    expected = torch.stack([source["output.weight"] for source in sources]).mean(0)
    torch.testing.assert_close(mean["output.weight"], expected, rtol=1e-6, atol=1e-7)


def test_a_config_that_cannot_be_read_is_read_again(
    steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, outcomes = Path.read_bytes, iter([True, False])

    def read_but_once(path: Path) -> bytes:
        if path == steps[1] / CONFIG_FILE and not next(outcomes, True):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(retry, "RETRY_AFTER", (0,))
    monkeypatch.setattr(Path, "read_bytes", read_but_once)
    average([str(steps[0]), str(steps[1])], tmp_path / "mean")
    assert read(tmp_path / "mean" / CONFIG_FILE) == read(steps[1] / CONFIG_FILE)


def test_what_has_no_mean_is_refused(
    steps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "mean")
    Run(tmp_path / "wide", args=TinyArgs(dim=8)).train(2)
    wide = tmp_path / "wide" / "checkpoint" / "step-2"
    assert "hold different models, whose mean is none: args.dim = 8 and 4" in told(
        capsys, wide, steps[1], *out
    )
    Run(tmp_path / "other").train(2)
    other = tmp_path / "other" / "checkpoint" / "step-2"
    assert "in only one of them" in told(capsys, other, steps[1], *out)
    assert "give two checkpoints or more" in told(capsys, steps[0], *out)
    assert "s3://b/mean: URLs are not" in told(capsys, *steps[:2], "--out", "s3://b/mean")
    damaged = wide / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    assert "is damaged: CRC-32" in told(capsys, wide, wide, *out)
    assert not (tmp_path / "mean").exists()
    (tmp_path / "mean").mkdir()
    assert f"{tmp_path / 'mean'} exists" in told(capsys, steps[0], steps[1], *out)


def test_hugging_face_folders_are_converted_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    message = told(capsys, tmp_path, tmp_path, "--out", tmp_path / "mean")
    assert "is a Hugging Face folder. First convert it: torchtitan convert from-hf" in message
