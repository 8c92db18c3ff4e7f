"""Ranks return, and what is said of those that do not."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from torchtitan.runtime.process_group import init_distributed
from torchtitan.runtime.ranks import Ranks, RanksFailedError
from torchtitan.runtime.world import rank
from torchtitan.tools.logging import rank0


def add_rank(tensor: torch.Tensor) -> tuple[torch.Tensor, dict]:
    init_distributed(timeout_seconds=60)
    total = tensor + rank()
    dist.all_reduce(total)
    return total, {
        "rank": dist.get_rank(),
        "local_rank": os.environ["LOCAL_RANK"],
        "threads": torch.get_num_threads(),
        "threads_of_server": len(os.listdir(f"/proc/{os.getppid()}/task")),
        "cuda_was_used": torch.cuda._is_in_bad_fork(),
        "cwd": os.getcwd(),
        "variable": os.environ.get("VARIABLE"),
        "logs": rank0.filter(logging.makeLogRecord({})) is not False,
    }


def test_ranks_form_a_world_and_return_their_results_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VARIABLE", "value")
    results = run_ranks(add_rank, 3, torch.tensor([1, 2]))
    for i, (total, facts) in enumerate(results):
        assert total.tolist() == [6, 9]
        assert facts == {
            "rank": i,
            "local_rank": str(i),
            "threads": 1,
            "threads_of_server": 1,
            "cuda_was_used": False,
            "cwd": str(tmp_path),
            "variable": "value",
            "logs": i == 0,
        }


def reach_the_store_by_another_address() -> None:
    socket.create_connection(("127.0.0.2", int(os.environ["MASTER_PORT"])), timeout=5)


def test_other_hosts_do_not_reach_the_store():
    with pytest.raises(RanksFailedError, match="ConnectionRefusedError"):
        run_ranks(reach_the_store_by_another_address, 1)


def raise_on_rank_1() -> None:
    init_distributed(timeout_seconds=60)
    if rank() == 1:
        raise ValueError("not today")
    dist.barrier()


def test_an_exception_is_reported_with_its_traceback_and_what_followed_from_it():
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(raise_on_rank_1, 2)
    failures = {failure.rank: failure for failure in caught.value.failures}
    assert failures[1].reason == "ValueError: not today"
    assert "in raise_on_rank_1" in failures[1].traceback
    assert "in barrier" in failures[0].traceback
    assert "rank 1: ValueError: not today" in str(caught.value)


def one_rank_comes_late() -> str:
    init_distributed(timeout_seconds=60)
    print("ready", flush=True)
    if rank() == 1:
        time.sleep(60)
    dist.barrier()


def test_ranks_that_hang_are_stopped_and_the_collective_is_named():
    start = time.monotonic()
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(one_rank_comes_late, 2, timeout=4)
    assert time.monotonic() - start < 40
    waiting, late = sorted(caught.value.failures, key=lambda failure: failure.rank)
    assert waiting.reason == late.reason == "not done after 4 s"
    assert not waiting.computed and not late.computed
    assert waiting.exit_code is None and waiting.output == "ready\n"
    assert "in barrier" in waiting.traceback
    assert "in one_rank_comes_late" in late.traceback and "barrier" not in late.traceback


def compute(seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return "done"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, nobody tells what a rank computes")
def test_ranks_that_still_compute_have_more_time():
    assert run_ranks(compute, 1, 4.0, timeout=1.0) == ["done"]
    start = time.monotonic()
    with pytest.raises(RanksFailedError, match=r"not done after 0\.3 s"):
        run_ranks(compute, 1, 200.0, timeout=0.3)
    assert time.monotonic() - start > 3


def wait_for_a_child(seconds: float) -> str:
    code = f"import time; end = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    return "done"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, nobody tells what a rank computes")
def test_a_rank_that_waits_for_a_compiler_has_more_time():
    """One that runs in another process, as the compiler of PyTorch does."""
    assert run_ranks(wait_for_a_child, 1, 4.0, timeout=0.5) == ["done"]


def one_rank_computes() -> None:
    init_distributed(timeout_seconds=60)
    if rank() == 1:
        compute(200.0)
    dist.barrier()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, nobody tells what a rank computes")
def test_the_rank_that_still_computes_is_known():
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(one_rank_computes, 2, timeout=0.6)
    waiting, busy = sorted(caught.value.failures, key=lambda failure: failure.rank)
    assert (waiting.computed, busy.computed) == (False, True)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_is_reported_with_the_stack():
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(crash, 1)
    [failure] = caught.value.failures
    assert (failure.reason, failure.exit_code) == ("killed by SIGSEGV", -signal.SIGSEGV)
    assert "in crash" in failure.traceback


def exit_with(code: int) -> None:
    sys.stderr.write("error: told to\n")
    raise SystemExit(code)


def test_an_exit_code_is_reported_with_the_output():
    assert run_ranks(exit_with, 2, 0) == [None, None]
    with pytest.raises(RanksFailedError, match=r"rank 0: exit code 2\nerror: told to"):
        run_ranks(exit_with, 1, 2)


def unpicklable() -> object:
    return lambda: None


def test_a_result_that_cannot_be_sent_is_an_error():
    with pytest.raises(RanksFailedError, match="pickle"):
        run_ranks(unpicklable, 1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_rank_outlives_the_block(tmp_path):
    with Ranks(time.sleep, 2, 600, output_folder=tmp_path) as ranks:
        assert all(map(is_running, ranks.pids))
    until_gone(ranks.pids)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"rank-{i}.{kind}" for i in range(2) for kind in ("err", "out")
    ]


@pytest.mark.long
def test_no_rank_outlives_a_caller_that_is_killed():
    script = (
        "import time; from torchtitan.runtime.ranks import Ranks\n"
        "ranks = Ranks(time.sleep, 2, 600)\n"
        "print(*ranks.pids, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as caller:
        pids = [int(word) for word in caller.stdout.readline().split()]
        assert len(pids) == 2
        caller.kill()
    until_gone(pids)
