"""Hosts die, are cut off or come, and the run goes on: with fewer (`torchrun --nnodes MIN:MAX`), or
with one in the place of another (also `--nnodes N`).
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist
from equality import assert_equal_curves
from harness import read_lines, train
from kills import newest_step
from launched import STEPS, Launched, steps_logged, training, wait_until
from network_namespaces import Hosts, require_namespaces
from tiny_llama import OPTIONS

from torchtitan.runtime.stop_request import PREEMPTED

START = 90.0  # seconds, on a machine that is busy
BATCH = ("--training.global_batch_size=12", "--training.local_batch_size=2")
"""For 1, 2, 3 and 6 data ranks: accumulation makes up for the ranks that are gone."""


def torchrun(nodes: str, endpoint: str) -> list[str]:
    return [
        "python",
        "-m",
        "torchtitan.runtime.torchrun",
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


@pytest.mark.long
def test_a_run_goes_on_without_a_host_that_died(
    whole: list[dict], tmp_path: Path, figures: dict[str, object]
) -> None:
    # The store in which the hosts meet is outside of them, so that any of them may die.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = [*torchrun("1:2", f"127.0.0.1:{store.port}"), *training(tmp_path / "run", *BATCH)]
    with (
        Launched(words, tmp_path / "log0") as survivor,
        Launched(words, tmp_path / "log1") as other,
    ):
        both = "parameters on 2 ranks"
        wait_until(lambda: newest_step(tmp_path / "run") >= 10, START, lambda: survivor.output)
        assert both in survivor.output + other.output
        for pid in (other.process.pid, *other.ranks()):
            os.kill(pid, signal.SIGKILL)
        seconds = wait_until(
            lambda: "parameters on 1 rank " in survivor.output, START, lambda: survivor.output
        )
        assert survivor.wait(timeout=START) == 0, survivor.output
    assert "resumed from" in survivor.output
    assert_equal_curves(read_lines(tmp_path / "run" / "metrics.jsonl"), whole)
    figures["elastic, a host died: the run goes on after"] = f"{seconds:.1f} s"


@pytest.mark.long
@pytest.mark.parametrize("dies", ["first", "second"])
def test_a_host_that_is_replaced_joins_the_others(
    dies: str, whole: list[dict], tmp_path: Path, figures: dict[str, object]
) -> None:
    """The number of hosts is fixed, as in launched jobs. The first has rank 0 and its store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder = tmp_path / "run"
    slow = ("--job.custom_import=faulty_llama", "--model.name=faulty_llama")
    words = [*torchrun("2", f"127.0.0.1:{store.port}"), *training(folder, *BATCH, *slow)]
    env = {"FAULT": "sleep:0.2 renamed 0 0"}
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(Launched(words, tmp_path / f"log{host}", env=env))
            for host in range(2)
        ]

        def output() -> str:
            return "".join(job.output for job in jobs)

        wait_until(lambda: newest_step(folder) >= 10, START, output)
        has_rank_0 = ["parameters on 2 ranks" in job.output for job in jobs]
        assert sorted(has_rank_0) == [False, True]
        dead = jobs.pop(has_rank_0.index(dies == "first"))
        for pid in (dead.process.pid, *dead.ranks()):
            os.kill(pid, signal.SIGKILL)
        jobs.append(stack.enter_context(Launched(words, tmp_path / "new", env=env)))
        seconds = wait_until(lambda: "resumed from" in output(), START, output)
        assert [job.wait(timeout=START) for job in jobs] == [0, 0], output()
    assert_equal_curves(read_lines(folder / "metrics.jsonl"), whole)
    figures[f"fixed hosts, the {dies} one replaced: the run goes on after"] = f"{seconds:.1f} s"


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

        # Past the save of step 10, at whose end a rank would wait for two hours.
        wait_until(lambda: steps_logged(tmp_path / "run") >= 11, START, output)
        assert "parameters on 3 ranks" in jobs[0].output
        hosts[2].cut_off()
        seconds = wait_until(lambda: "parameters on 2 ranks" in jobs[0].output, START, output)
        assert [job.wait(timeout=START) for job in jobs[:2]] == [0, 0], output()
        # Its ranks fail as well, some late: the store takes a minute to give up. Its torchrun looks
        # for the others as long as it is told to.
        wait_until(lambda: not jobs[2].ranks(), START, output)
    assert "resumed from" in jobs[0].output
    assert_equal_curves(read_lines(tmp_path / "run" / "metrics.jsonl"), whole)
    figures["elastic, a host cut off: the others go on after"] = f"{seconds:.1f} s"


@pytest.mark.long
def test_hosts_come_and_go(whole: list[dict], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    slow = ("--job.custom_import=faulty_llama", "--model.name=faulty_llama")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = [*torchrun("1:2", f"127.0.0.1:{store.port}"), *training(folder, *BATCH, *slow)]
    env = {"FAULT": "sleep:0.5 renamed 0 0"}
    with Launched(words, tmp_path / "log0", env=env) as first:
        wait_until(lambda: newest_step(folder) >= 5, START, lambda: first.output)
        with Launched(words, tmp_path / "log1", env=env) as second:

            def output() -> str:
                return first.output + second.output

            wait_until(lambda: "parameters on 2 ranks" in output(), START, output)
            joined_at = newest_step(folder)
            assert f"stopped after step {joined_at}" in first.output  # nothing was lost
            wait_until(lambda: newest_step(folder) > joined_at, START, output)
            second.process.send_signal(signal.SIGTERM)
            assert second.wait(timeout=START) == PREEMPTED, output()
        assert first.wait(timeout=START) == 0, first.output
    assert first.output.count("resumed from") + second.output.count("resumed from") == 2
    assert_equal_curves(read_lines(folder / "metrics.jsonl"), whole)
