"""`torchrun --nnodes MIN:MAX`: hosts die or are cut off, and the run goes on with fewer."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist
from equality import assert_equal_curves
from harness import read_lines, train
from kills import newest_step
from launched import STEPS, Launched, training, wait_until
from network_namespaces import Hosts, require_namespaces
from tiny_llama import OPTIONS

START = 90.0  # seconds, on a machine that is busy
BATCH = ("--training.global_batch_size=12", "--training.local_batch_size=2")
"""For 1, 2, 3 and 6 data ranks: accumulation makes up for the ranks that are gone."""


def torchrun(nodes: str, endpoint: str) -> list[str]:
    return [
        "python",
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        "--rdzv-id=test",
        f"--rdzv-endpoint={endpoint}",
        # A host is dead after 3 s without a sign of life, and 3 s are left for others to join.
        "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3",
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What an undisturbed run on one rank logs."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, *OPTIONS, *BATCH, f"--training.steps={STEPS}")


def test_a_run_goes_on_without_a_host_that_died(
    whole: list[dict], tmp_path: Path, figures: dict[str, object]
) -> None:
    # A port that is free, since a store was there just now.
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    words = [*torchrun("1:2", f"127.0.0.1:{port}"), *training(tmp_path / "run", *BATCH)]
    with (
        Launched(words, tmp_path / "log0") as survivor,
        Launched(words, tmp_path / "log1") as other,
    ):
        both = "parameters on 2 ranks"
        wait_until(lambda: newest_step(tmp_path / "run") >= 10, START, lambda: survivor.output)
        assert both in survivor.output + other.output
        hosts_store = "127.0.0.1" in survivor.output  # the first to start; kept for messages
        for pid in (other.process.pid, *other.ranks()):
            os.kill(pid, signal.SIGKILL)
        seconds = wait_until(
            lambda: "parameters on 1 ranks" in survivor.output, START, lambda: survivor.output
        )
        assert survivor.wait(timeout=START) == 0, (hosts_store, survivor.output)
    assert "resumed from" in survivor.output
    assert_equal_curves(read_lines(tmp_path / "run" / "metrics.jsonl"), whole)
    figures["elastic, a host died: the run goes on after"] = f"{seconds:.1f} s"


@pytest.mark.long
def test_a_run_goes_on_without_a_host_that_is_cut_off(
    whole: list[dict], tmp_path: Path, figures: dict[str, object]
) -> None:
    require_namespaces()
    # Nobody tells the others: they notice by the timeout of a collective.
    options = (*BATCH, "--comm.timeout_seconds=5")
    words = [*torchrun("1:3", "host0:29400"), *training(tmp_path / "run", *options)]
    with Hosts(3) as hosts, ExitStack() as stack:
        jobs = [
            stack.enter_context(Launched(words, tmp_path / host.name, start=host.start))
            for host in hosts
        ]

        def output() -> str:
            return "\n".join(job.output for job in jobs)

        wait_until(lambda: newest_step(tmp_path / "run") >= 10, START, output)
        assert "parameters on 3 ranks" in jobs[0].output
        hosts[2].cut_off()
        seconds = wait_until(lambda: "parameters on 2 ranks" in jobs[0].output, START, output)
        assert [job.wait(timeout=START) for job in jobs[:2]] == [0, 0], output()
        begin = time.monotonic()
        assert jobs[2].wait(timeout=START) != 0
        cut_off = seconds + time.monotonic() - begin
    assert "resumed from" in jobs[0].output
    assert_equal_curves(read_lines(tmp_path / "run" / "metrics.jsonl"), whole)
    figures["elastic, a host cut off: the others go on after"] = f"{seconds:.1f} s"
    figures["elastic, a host cut off: its own torchrun ends after"] = f"{cut_off:.1f} s"
