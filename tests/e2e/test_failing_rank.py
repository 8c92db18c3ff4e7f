"""A rank that fails ends at once, though its process group would wait for the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Finished, command
from tiny_llama import OPTIONS

STUCK = (
    *OPTIONS,
    *("--job.custom_import=stuck_nccl_llama", "--model.name=stuck_nccl_llama"),
    *("--training.local_batch_size=2", "--training.steps=3"),
    *("--checkpoint.enable", "--checkpoint.interval=1", "--checkpoint.async_mode=async"),
)


def run(folder: Path, **env: str) -> Finished:
    return command("train", *STUCK, f"--job.dump_folder={folder}", ranks=2, timeout=60, **env)


@pytest.mark.parametrize(("fails", "code"), [("data", 2), ("bug", 1)])
def test_a_failing_rank_does_not_wait_for_nccl(fails: str, code: int, tmp_path: Path) -> None:
    done = run(tmp_path, FAILS=fails)
    assert done.exit_codes[1] == code, done.err
    if fails == "data":
        assert "error: the second batch" in done.err
    else:
        assert "Traceback" in done.err and "ValueError: the second batch" in done.err


@pytest.mark.parametrize(("fails", "code"), [("model", 1), ("load", 1), ("interrupt", -2)])
def test_a_rank_that_fails_before_the_first_step_does_not_either(
    fails: str, code: int, tmp_path: Path
) -> None:
    done = run(tmp_path, FAILS=fails)
    assert done.exit_codes[1] == code, done.err
    if fails == "interrupt":
        assert "interrupted at torchtitan/" in done.err and "KeyboardInterrupt" not in done.err
    else:
        assert "Traceback" in done.err and f"OutOfMemoryError: in the {fails}" in done.err


def test_a_run_that_succeeds_leaves_the_group_and_names_its_device(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.exit_code == 0, done.err
    assert "parameters on 2 ranks (dp_shard 2), CPU" in done.err
    for noise in ("destroy_process_group", "Traceback", "WARNING"):
        assert noise not in done.err
