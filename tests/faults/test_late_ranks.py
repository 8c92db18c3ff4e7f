"""A rank that is late is named: one that hangs by the hang watch, a slow one in the metrics."""

from __future__ import annotations

import pickle
import re
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Finished, command, read_lines, run_ranks
from launched import wait_until
from tiny_llama import OPTIONS

from torchtitan.config import JobConfig
from torchtitan.runtime.fake_world import fake_world
from torchtitan.runtime.hang_watch import HangWatch, Heartbeat, report, waits
from torchtitan.runtime.process_group import init_distributed

LATE = (
    *OPTIONS,
    "--job.custom_import=late_llama",
    "--model.name=late_llama",
    "--training.local_batch_size=2",
    "--training.steps=3",
)
LAYOUTS = {
    "fsdp4": (),
    "fsdp2xtp2": ("--parallelism.tensor_parallel_degree=2",),
    "hsdp2x2": ("--parallelism.data_parallel_replicate_degree=2",),
}


def run(folder: Path, *options: str, **env: str) -> Finished:
    done = command("train", *LATE, *options, f"--job.dump_folder={folder}", ranks=4, **env)
    assert done.exit_code == 0, done.err
    return done


@pytest.mark.parametrize(
    ("where", "phase"),
    [
        pytest.param("data", "data", marks=pytest.mark.long),
        ("forward", "forward_backward"),
    ],
)
def test_a_rank_that_hangs_is_named(where: str, phase: str, tmp_path: Path) -> None:
    options = ("--comm.hang_seconds=2", "--training.steps=30")
    environment = {"LATE": f"{where} 3 5 2", "TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}
    done = run(tmp_path, *options, **environment)
    (text,) = (tmp_path / "hang" / "report.txt").read_text().splitlines()
    assert re.search(f"has been in step 2, phase '{phase}', for [2-4] s, at ", text)
    assert "no progress for 2 s. Late: rank 3 (" in text and "in _maybe_sleep" in text
    waiting = "token count" if where == "data" else "forward_backward"
    assert f"3 wait in step 2, phase '{waiting}'" in text
    assert "ERROR no progress for 2 s. Late: rank 3" in done.err
    assert {*re.findall(r"rank \d+ makes progress again", done.err)} == {
        "rank 0 makes progress again"
    }
    for rank in range(4):
        stacks = (tmp_path / "hang" / f"rank-{rank}.txt").read_text()
        assert f"step 2, phase '{phase if rank == 3 else waiting}'" in stacks
        assert ("late_llama.py" in stacks and "_maybe_sleep" in stacks) == (rank == 3)
        record = pickle.loads((tmp_path / "hang" / f"flight_recorder_{rank}").read_bytes())
        assert any("gloo" in entry["profiling_name"] for entry in record["entries"])
        assert len(record["entries"]) == 7


@pytest.mark.long
def test_a_hang_ends_the_run_after_the_timeout(tmp_path: Path) -> None:
    options = ("--comm.hang_seconds=1", "--comm.timeout_seconds=3")
    env = {"LATE": "forward 3 60 2"}
    done = command("train", *LATE, *options, f"--job.dump_folder={tmp_path}", ranks=4, **env)
    assert 0 not in done.exit_codes, done.err
    assert "Late: rank 3" in (tmp_path / "hang" / "report.txt").read_text()


def test_a_run_without_a_hang_reports_none(tmp_path: Path) -> None:
    for seconds in 5, 0:
        done = run(tmp_path / str(seconds), f"--comm.hang_seconds={seconds}")
        assert "no progress" not in done.err
        assert not (tmp_path / str(seconds) / "hang").exists()


def test_a_hang_is_logged_though_the_storage_of_the_dump_folder_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = JobConfig()
    config.job.dump_folder, config.comm.hang_seconds = str(tmp_path), 1
    blocked, answers = threading.Event(), threading.Event()

    def mkdir(*args: object, **options: object) -> None:
        blocked.set()
        answers.wait(30)

    with fake_world(1, rank=0):
        store = dist.HashStore()
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        monkeypatch.setattr(Path, "mkdir", mkdir)
        watch = HangWatch(config)
        watch.start()
        assert blocked.wait(20)
        told = caplog.text
        answers.set()
        watch.close()
    assert "no progress for 1 s" in told and "rank 0" in told
    assert "hang watch" not in [thread.name for thread in threading.enumerate()]


def test_ranks_that_sent_nothing_are_told_at_each_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=5))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(HangWatch, "_watch", lambda watch: None)
    monotonic = time.monotonic
    for rank, uptime in (2, 1e6), (0, 0):  # their hosts were not started together
        monkeypatch.setattr(time, "monotonic", lambda uptime=uptime: uptime + monotonic())
        with fake_world(4, rank=rank):
            watch = HangWatch(config)
            watch.start()
            watch._send(watch._now, stands=False)
            if rank == 0:
                beats, silent = watch._read_all()
                watch._report()
                watch._report()
                (tmp_path / "hang" / "rank-0.txt").mkdir()
                watch._write_stacks()
    assert [(beat.rank, beat.time < 60) for beat in beats] == [(0, True), (2, True)]
    assert silent == [1, 3]
    told = (tmp_path / "hang" / "report.txt").read_text()
    assert told.count("Not heard from: rank 1; rank 3\n") == 2
    assert "the stacks of a hang cannot be written: " in caplog.text


def test_unless_it_is_told_a_hang_is_reported_before_the_timeout_ends_the_run() -> None:
    config = JobConfig()
    assert HangWatch(config)._limit == config.comm.timeout_seconds / 2
    config.comm.hang_seconds = 7
    assert HangWatch(config)._limit == 7


def beat(rank: int, step: int, phase: str, waits: bool = True, time: float = 100.0) -> Heartbeat:
    return Heartbeat(rank, f"host-{rank}", step, phase, 10.0, "file.py:1 in f", waits, time)


def test_who_is_late() -> None:
    waiting = [beat(rank, 5, "optimizer") for rank in range(3)]
    assert "Late: rank 3 (host-3) has been in step 4, phase 'optimizer'" in report(
        [*waiting, beat(3, 4, "optimizer")], [], 10
    )
    assert "Late: rank 3 (host-3)" in report([*waiting, beat(3, 5, "optimizer", False)], [], 10)
    for step, phase in (4, "after the step"), (5, "forward_backward"):
        told = report([*waiting, beat(3, step, phase)], [], 10)
        assert f"Late: rank 3 (host-3) has been in step {step}, phase '{phase}'" in told
        assert told.endswith("Of the other ranks, 3 wait in step 5, phase 'optimizer'")
    muted = report([*waiting, beat(3, 5, "optimizer", time=60.0)], [], 10)
    assert "Late: rank 3 (host-3)" in muted and "40 s ago" in muted
    just_sent = report([*waiting, beat(3, 5, "optimizer", time=95.0)], [], 10)
    unknown = report([*waiting, replace(beat(3, 5, "optimizer", False), where="")], [], 10)
    assert "Late" not in just_sent and "Late" not in unknown
    assert "Not heard from: rank 3" in report(waiting, [3], 10)
    assert "All ranks are at the same place" in report(waiting, [], 10)
    many = [beat(rank, 5, "optimizer", rank < 5000) for rank in range(10_000)]
    assert "and 4992 more" in report(many, [], 10)


def hang_with_other_clocks(folder: Path) -> None:
    """The clock of rank 1 is an hour ahead, and rank 0 is late."""
    init_distributed(timeout_seconds=60)
    config = JobConfig()
    config.job.dump_folder, config.comm.hang_seconds = str(folder), 1
    here, now = dist.get_rank(), time.time
    time.time = lambda: now() + 3600 * here  # type: ignore[assignment]
    with closing(HangWatch(config)) as watch:
        watch.start()
        watch.enter("data", 2 + here)
        wait_until((folder / "hang" / "report.txt").exists, 20, lambda: "no report")


def test_a_rank_is_not_taken_for_late_because_of_its_clock(tmp_path: Path) -> None:
    run_ranks(hang_with_other_clocks, 2, tmp_path)
    text = (tmp_path / "hang" / "report.txt").read_text()
    assert "Late: rank 0" in text and "last heard from" not in text


@pytest.mark.parametrize("waiting", [(True, True), (False, False), (True, False)])
def test_where_ranks_stand_is_told_where_nothing_tells_them_apart(
    waiting: tuple[bool, bool],
) -> None:
    """On CUDA the host of a rank that waits may stand in PyTorch's communication or elsewhere."""
    beats = [beat(rank, 5, "optimizer", waiting[0]) for rank in range(7)]
    beats.append(replace(beat(7, 5, "optimizer", waiting[1]), where="other.py:2 in g"))
    text = report(beats, [], 10, on_cuda=True)
    assert "Late" not in text
    assert "1 at other.py:2 in g, as rank 7 (host-7); 7 at file.py:1 in f, as rank 0" in text
    assert "flight_recorder_N" in text and "flight_recorder_N" not in report(beats, [], 10)


def test_a_backward_pass_may_wait_for_other_ranks() -> None:
    found = []

    def hook(gradient: torch.Tensor) -> None:
        outer = sys._getframe().f_back
        found.append(outer is not None and waits(outer))

    x = torch.ones(1, requires_grad=True)
    x.register_hook(hook)
    hook(x)
    x.sum().backward()
    assert found == [False, True]


@pytest.mark.parametrize(
    ("where", "layout"),
    [
        ("data", "fsdp4"),
        *(
            pytest.param("forward", name, marks=pytest.mark.long)
            for name in ("fsdp2xtp2", "fsdp4", "hsdp2x2")
        ),
        *(pytest.param("data", name, marks=pytest.mark.long) for name in ("fsdp2xtp2", "hsdp2x2")),
    ],
)
def test_a_slow_rank_is_named_in_the_metrics(where: str, layout: str, tmp_path: Path) -> None:
    options = (*LAYOUTS[layout], "--metrics.straggler_freq=2")
    run(tmp_path, *options, LATE=f"{where} 2 1 0")
    first, second, third = read_lines(tmp_path / "metrics.jsonl")
    assert "slowest_rank" not in first and "slowest_rank" not in third
    assert second["slowest_rank"] == 2
    assert second["own_seconds_max"] >= 1
    # The others waited as long, but do not count it.
    assert second["own_seconds_max"] - second["own_seconds_mean"] > 0.5


@pytest.mark.long
def test_a_timed_step_computes_the_same(tmp_path: Path) -> None:
    runs = []
    for freq in 0, 1:
        run(tmp_path / str(freq), f"--metrics.straggler_freq={freq}")
        runs.append(read_lines(tmp_path / str(freq) / "metrics.jsonl"))
    assert [line["loss"] for line in runs[0]] == [line["loss"] for line in runs[1]]
