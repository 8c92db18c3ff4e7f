"""A storage that cannot be read ends the run, which resumes when it can be."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Finished, checkpoints_in, command
from tiny_llama import OPTIONS

TRAIN = (
    *OPTIONS,
    "--job.custom_import=unreadable_llama",
    "--model.name=unreadable_llama",
    "--training.local_batch_size=2",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
)


def run(folder: Path, steps: int, ranks: int, **env: str) -> Finished:
    options = (f"--training.steps={steps}", f"--job.dump_folder={folder}")
    return command("train", *TRAIN, *options, ranks=ranks, **env)


@pytest.mark.parametrize(
    ("ranks", "name"), [(1, "manifest.json"), (2, "__1_0.distcp"), (1, ".metadata")]
)
def test_the_newest_checkpoint_is_kept(ranks: int, name: str, tmp_path: Path) -> None:
    assert run(tmp_path, 4, ranks).exit_code == 0
    failed = run(tmp_path, 6, ranks, UNREADABLE=name)
    assert failed.exit_codes == [1] * ranks, failed.err
    assert f"error: {tmp_path}/checkpoint/step-4/{name} cannot be read: OSError: [Errno 5]" in (
        failed.err
    )
    assert "Traceback" not in failed.err and "skipped" not in failed.err
    resumed = run(tmp_path, 6, ranks)
    assert resumed.exit_code == 0, resumed.err
    assert f"resumed from {tmp_path}/checkpoint/step-4" in resumed.err
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-2", "step-4", "step-6"]
