"""Replica groups train as one, one of them dies and comes back. Needs torchft."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import SAVE, assert_equal_curves, assert_equal_weights, newest_weights
from harness import TIMEOUT, read_lines, train
from launched import Launched, training
from tiny_llama import OPTIONS

from torchtitan import cli
from torchtitan.runtime.ranks import Ranks, RanksFailedError
from torchtitan.runtime.stop_request import PREEMPTED

torchft = pytest.importorskip("torchft")
from torchft.coordination import LighthouseServer  # noqa: E402

LATE = ("--job.custom_import=late_llama", "--model.name=late_llama")


@pytest.fixture
def lighthouse() -> Iterator[Callable[[int], Any]]:
    servers = []

    def start(min_replicas: int) -> LighthouseServer:
        server = LighthouseServer(
            bind="127.0.0.1:0",
            min_replicas=min_replicas,
            join_timeout_ms=500,
            heartbeat_timeout_ms=1000,
        )
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()


def _run(arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    sys.exit(cli.main(arguments))


def replica(
    number: int, folder: Path, server: LighthouseServer, *options: str, ranks: int = 1, **env: str
) -> Ranks:
    output = folder / f"output-{number}"
    output.mkdir(parents=True, exist_ok=True)
    arguments = [
        "train",
        *OPTIONS,
        *SAVE,
        "--fault_tolerance.enable",
        "--fault_tolerance.group_size=2",
        f"--fault_tolerance.replica_id={number}",
        "--comm.timeout_seconds=20",
        f"--job.dump_folder={folder}",
        *options,
    ]
    env |= {"TORCHFT_LIGHTHOUSE": server.address(), "CUDA_VISIBLE_DEVICES": ""}
    return Ranks(_run, ranks, arguments, env=os.environ | env, output_folder=output)


def lines_of(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return read_lines(path) if path.exists() else []


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize(("ranks", "ramp"), [(1, []), (2, []), (1, ["4:3"])])
def test_two_groups_train_like_one_process(
    ranks: int, ramp: list[str], lighthouse: Callable[[int], Any], tmp_path: Path
) -> None:
    options = ("--training.local_batch_size=2", "--training.batch_size_ramp", *ramp)
    expected = train(tmp_path / "one", *OPTIONS, *SAVE, *options)
    server = lighthouse(2)
    groups = [replica(i, tmp_path, server, *options, ranks=ranks) for i in range(2)]
    for group in groups:
        with group:
            group.wait(TIMEOUT)
    weights = newest_weights(tmp_path / "one")
    for i in range(2):
        folder = tmp_path / f"replica-{i}"
        lines = lines_of(folder)
        assert [line["replica_groups"] for line in lines] == [2] * 6
        assert_equal_curves(lines, expected)
        assert [line["tokens_seen"] for line in lines] == [line["tokens_seen"] for line in expected]
        assert_equal_weights(newest_weights(folder), weights)


def test_two_groups_branch_from_a_checkpoint_each(
    lighthouse: Callable[[int], Any], tmp_path: Path
) -> None:
    options = (*SAVE, "--training.local_batch_size=2", "--lr_scheduler.total_steps=8")
    expected = train(tmp_path / "one", *OPTIONS, *options, "--training.steps=8")
    parent, folder = tmp_path / "parent", tmp_path / "branch"

    def run_both(folder: Path, start: Callable[[int], tuple[str, ...]]) -> None:
        server = lighthouse(2)
        groups = [replica(i, folder, server, *options, *start(i)) for i in range(2)]
        for group in groups:
            with group:
                group.wait(TIMEOUT)

    def branching(own: int) -> tuple[str, ...]:
        path = f"{parent}/replica-{own}/checkpoint/step-4"
        start = (f"--checkpoint.initial_load_path={path}", "--training.steps=8")
        return (*start, "--checkpoint.initial_load_model_only=false")

    run_both(parent, lambda own: ("--checkpoint.interval=4",))
    run_both(folder, branching)
    for i in range(2):
        assert_equal_curves(lines_of(folder / f"replica-{i}"), expected[4:])
        assert_equal_weights(
            newest_weights(folder / f"replica-{i}"), newest_weights(tmp_path / "one")
        )
    wrong = replica(1, tmp_path / "other", lighthouse(1), *branching(0))
    with wrong, pytest.raises(RanksFailedError, match="exit code 2"):
        wrong.wait(TIMEOUT)
    log = (tmp_path / "other" / "output-1" / "rank-0.err").read_text()
    assert "position in the data is not that of replica-1, which branches from" in log


def test_a_group_that_is_killed_comes_back_and_heals(
    lighthouse: Callable[[int], Any], tmp_path: Path
) -> None:
    server = lighthouse(1)
    options = (*LATE, "--training.steps=80", "--checkpoint.interval=5")
    slow = {"LATE": "data 0 0.1 0"}
    first = replica(0, tmp_path, server, *options, **slow)
    survivor, killed = tmp_path / "replica-0", tmp_path / "replica-1"

    def groups() -> list[int]:
        return [line["replica_groups"] for line in lines_of(survivor)]

    with first:
        # Were the other one faster to start, the first would take its first step over from it.
        wait_until(lambda: len(groups()) > 0, "the first trains")
        with replica(1, tmp_path, server, *options, **slow) as second:
            wait_until(lambda: groups().count(2) > 7, "both train")
            os.kill(second.pids[0], signal.SIGKILL)
            wait_until(lambda: groups()[-5:] == [1] * 5, "the survivor goes on alone")
        again = replica(1, tmp_path, server, *options, **slow)
        with again:
            again.wait(TIMEOUT)
            first.wait(TIMEOUT)

    assert [line["step"] for line in lines_of(survivor)] == list(range(1, 81))
    counts = groups()
    seen = [line["tokens_seen"] for line in lines_of(survivor)]
    of_a_group = seen[0] // counts[0]
    tokens = [after - before for before, after in pairwise([0, *seen])]
    assert tokens == [of_a_group * count for count in counts]
    alone = len(counts) - 1 - counts[::-1].index(1)
    assert counts[alone + 1 :] == [2] * (79 - alone) and 79 - alone > 5
    after = {line["step"]: line["loss"] for line in lines_of(killed) if line["step"] > alone + 1}
    assert after == {line["step"]: line["loss"] for line in lines_of(survivor)[alone + 1 :]}
    ours, theirs = newest_weights(survivor), newest_weights(killed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    log = (tmp_path / "output-1" / "rank-0.err").read_text()
    assert "took over the state of another replica group" in log
    assert "resumed from" in log


def test_groups_of_other_layouts_end_before_they_sum(
    lighthouse: Callable[[int], Any], tmp_path: Path
) -> None:
    server, options = lighthouse(2), ("--training.local_batch_size=4",)
    split = (*options, "--parallelism.tensor_parallel_degree=2")
    groups = [
        replica(number, tmp_path, server, *layout, ranks=ranks)
        for number, (layout, ranks) in enumerate([(options, 1), (split, 2)])
    ]
    for number, group in enumerate(groups):
        with group, pytest.raises(RanksFailedError) as ended:
            group.wait(TIMEOUT)
        assert 2 in [failure.exit_code for failure in ended.value.failures]
        log = (tmp_path / f"output-{number}" / "rank-0.err").read_text()
        keys = "parallelism.tensor_parallel_degree, processes"
        assert f"error: replica-{number} differs from another replica group in {keys}. " in log


@pytest.mark.parametrize("method", ["none", "local_sgd"])
def test_a_group_that_joins_with_other_options_is_refused(
    method: str, lighthouse: Callable[[int], Any], tmp_path: Path
) -> None:
    server, slow = lighthouse(1), {"LATE": "data 0 0.1 0"}
    options = (*LATE, "--training.steps=60", f"--fault_tolerance.semi_sync_method={method}")
    options += ("--fault_tolerance.sync_steps=2",)
    with replica(0, tmp_path, server, *options, **slow) as first:
        wait_until(lambda: len(lines_of(tmp_path / "replica-0")) > 2, "the first trains")
        with (
            replica(1, tmp_path, server, *options, "--optimizer.lr=0.1") as second,
            pytest.raises(RanksFailedError) as ended,
        ):
            second.wait(TIMEOUT)
        first.wait(TIMEOUT)
    assert ended.value.failures[0].exit_code == 2
    log = (tmp_path / "output-1" / "rank-0.err").read_text()
    assert "error: replica-1 differs from another replica group:\n  optimizer.lr = 0.1 (" in log
    assert lines_of(tmp_path / "replica-0")[-1]["step"] == 60


@pytest.mark.parametrize("method", ["none", "diloco"])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_group_that_waits_for_the_others_saves_when_it_is_stopped(
    ranks: int, method: str, lighthouse: Callable[[int], Any], tmp_path: Path
) -> None:
    options = (
        *LATE,
        "--training.local_batch_size=2",
        "--checkpoint.async_mode=async",
        "--training.steps=80",
        "--fault_tolerance.min_replica_size=2",
        f"--fault_tolerance.semi_sync_method={method}",
        "--fault_tolerance.sync_steps=4",
    )
    slow, server = {"LATE": "data 0 0.1 0"}, lighthouse(1)
    log = tmp_path / "output-0" / "rank-0.err"
    # Two ranks save in the background after each step, also while they wait for the other group.
    options += (f"--checkpoint.interval={70 if ranks == 1 else 1}",)
    with replica(0, tmp_path, server, *options, ranks=ranks, **slow) as first:
        with replica(1, tmp_path, server, *options, ranks=ranks, **slow):
            wait_until(lambda: len(lines_of(tmp_path / "replica-0")) > 4, "both train")
        wait_until(lambda: "waiting for other replica groups" in log.read_text(), "it waits")
        os.kill(first.pids[-1], signal.SIGTERM)
        with pytest.raises(RanksFailedError) as ended:
            first.wait(TIMEOUT)
    assert {failure.exit_code for failure in ended.value.failures} == {PREEMPTED}
    steps = lines_of(tmp_path / "replica-0")[-1]["step"]
    assert (tmp_path / "replica-0" / "checkpoint" / f"step-{steps}" / "manifest.json").exists()


@pytest.mark.long
def test_a_group_is_restarted_by_the_torchrun_of_pytorch(
    lighthouse: Callable[[int], Any], tmp_path: Path
) -> None:
    """Its store outlives the ranks, and has the address of the server that torchft made there."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    options = ("--fault_tolerance.enable", "--fault_tolerance.replica_id=0", "--training.steps=30")
    words += ["--max-restarts=1", *training(tmp_path, *options), "--training.local_batch_size=4"]
    env = {"TORCHFT_LIGHTHOUSE": lighthouse(1).address()}
    folder = tmp_path / "replica-0"
    with Launched(words, tmp_path / "log", env=env) as job:
        wait_until(lambda: len(lines_of(folder)) > 8, job.output)
        os.kill(max(job.ranks()), signal.SIGKILL)
        assert job.wait(TIMEOUT) == 0, job.output
    assert [line["step"] for line in lines_of(folder)] == list(range(1, 31))


def both(folder: Path, server: LighthouseServer, *options: str, ranks: int = 1) -> None:
    groups = [replica(i, folder, server, *options, ranks=ranks) for i in range(2)]
    for group in groups:
        with group:
            group.wait(TIMEOUT)


SGD = ("--optimizer.name=SGD", "--optimizer.momentum=0", "--training.max_norm=1e9")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_groups_that_average_after_each_step_of_sgd_train_like_one_process(
    ranks: int, lighthouse: Callable[[int], Any], tmp_path: Path
) -> None:
    options = (*SGD, "--training.local_batch_size=2")
    expected = train(tmp_path / "one", *OPTIONS, *SAVE, *options)
    options += ("--fault_tolerance.semi_sync_method=local_sgd", "--fault_tolerance.sync_steps=1")
    both(tmp_path, lighthouse(2), *options, ranks=ranks)
    lines = [lines_of(tmp_path / f"replica-{i}") for i in range(2)]
    for one, *of_groups in zip(expected, *lines, strict=True):
        # Each group logs the loss of its own share of the batch.
        mean = sum(line["loss"] for line in of_groups) / 2
        assert math.isclose(mean, one["loss"], rel_tol=1e-4)
        assert [line["tokens_seen"] for line in of_groups] == [one["tokens_seen"]] * 2
    for i in range(2):
        weights = newest_weights(tmp_path / f"replica-{i}")
        assert_equal_weights(weights, newest_weights(tmp_path / "one"))


DILOCO = ("--fault_tolerance.semi_sync_method=diloco", "--fault_tolerance.sync_steps=4")


def test_groups_resume_in_the_middle_of_a_round(
    lighthouse: Callable[[int], Any], tmp_path: Path
) -> None:
    options = (*DILOCO, "--training.local_batch_size=2", "--checkpoint.interval=2")
    options += ("--training.steps=8",)
    whole = tmp_path / "whole"
    both(whole, lighthouse(2), *options)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    both(again, lighthouse(2), *options, "--checkpoint.load_step=6")
    for name in ("replica-0", "replica-1"):
        assert lines_of(again / name)[-1]["loss"] == lines_of(whole / name)[-1]["loss"]
        ours, theirs = newest_weights(again / name), newest_weights(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    first, second = (newest_weights(whole / f"replica-{i}") for i in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_killed_group_of_diloco_comes_back(
    lighthouse: Callable[[int], Any], tmp_path: Path
) -> None:
    server = lighthouse(1)
    options = (*LATE, *DILOCO, "--training.steps=120", "--checkpoint.interval=5")
    slow = {"LATE": "data 0 0.1 0"}
    survivor, killed = tmp_path / "replica-0", tmp_path / "replica-1"

    def groups() -> list[int]:
        return [line["replica_groups"] for line in lines_of(survivor)]

    with replica(0, tmp_path, server, *options, **slow) as first:
        with replica(1, tmp_path, server, *options, **slow) as second:
            wait_until(lambda: len(lines_of(killed)) > 10, "both train")
            os.kill(second.pids[0], signal.SIGKILL)
        wait_until(lambda: groups()[-5:] == [1] * 5, "the survivor goes on alone")
        with replica(1, tmp_path, server, *options, **slow) as again:
            again.wait(TIMEOUT)
            first.wait(TIMEOUT)
    assert [line["step"] for line in lines_of(survivor)] == list(range(1, 121))
    assert groups()[-1] == 2
    ours, theirs = newest_weights(survivor), newest_weights(killed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
