"""Ranks end after a failure, whatever others still send.

A normal exit would wait for gloo's thread, which spins on a message that no buffer takes.
"""

from __future__ import annotations

from pathlib import Path

import abandoned_llama
import pytest
from harness import command, run_ranks
from tiny_llama import OPTIONS

from torchtitan.generation.load import process_group
from torchtitan.runtime.process_group import init_distributed
from torchtitan.runtime.ranks import RanksFailedError


def test_training_ends(tmp_path: Path) -> None:
    abandoned = ["--job.custom_import=abandoned_llama", "--model.name=abandoned_llama"]
    options = [*OPTIONS, *abandoned, f"--job.dump_folder={tmp_path}"]
    done = command("train", *options, ranks=2)
    assert done.exit_codes == [1, 1], done.err
    assert "RuntimeError: a collective failed" in done.err


def fail() -> None:
    init_distributed(timeout_seconds=60)
    abandoned_llama.fail()


def fail_in_a_command() -> None:
    with process_group():
        abandoned_llama.fail()


@pytest.mark.parametrize(
    ("function", "reason"),
    [(fail, "RuntimeError: a collective failed"), (fail_in_a_command, "exit code 1")],
)
def test_a_rank_ends(function, reason: str) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(function, 2)
    assert {failure.reason for failure in caught.value.failures} == {reason}
