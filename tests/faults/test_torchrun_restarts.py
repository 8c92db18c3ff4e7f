"""Under torchrun: a dead rank ends the job in seconds, restarts go on, signals save."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from harness import read_lines, train
from kills import curve, newest_step
from launched import ENV, STEPS, Launched, is_running, steps_logged, training, wait_until
from tiny_llama import OPTIONS

from torchtitan.components.checkpoint.owner import Owner
from torchtitan.runtime.stop_request import PREEMPTED

PYTHON = "python"
START = 60.0  # seconds, on a machine that is busy


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """The curve of an undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    return curve(train(folder, *OPTIONS, f"--training.steps={STEPS}", ranks=2))


def test_a_dead_rank_takes_the_job_down_in_seconds(
    tmp_path: Path, figures: dict[str, object]
) -> None:
    words = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    options = ("--training.local_batch_size=4", "--training.steps=10000")
    with Launched([*words, *training(tmp_path, *options)], tmp_path / "log") as job:
        # After the first save all ranks are connected that ever are. One that waits for a dead rank
        # to connect notices nothing, and torchrun kills it after 30 s.
        wait_until(lambda: newest_step(tmp_path) >= 5, START, lambda: job.output)
        ranks = job.ranks()
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        begin = time.monotonic()
        wait_until(lambda: not any(map(is_running, ranks)), 60, lambda: job.output)
        seconds = time.monotonic() - begin
        assert job.wait(timeout=60) != 0
    figures["torchrun, 2 ranks, one killed: all are gone after"] = f"{seconds:.1f} s"
    assert seconds < 10


@pytest.mark.long
def test_torchrun_starts_again_and_the_run_goes_on(
    whole: list[tuple], tmp_path: Path, figures: dict[str, object]
) -> None:
    words = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    with Launched([*words, *training(tmp_path)], tmp_path / "log") as job:
        wait_until(lambda: newest_step(tmp_path) >= 10, START, lambda: job.output)
        before = Owner.of(tmp_path / "checkpoint")
        os.kill(job.ranks()[1], signal.SIGKILL)
        seconds = wait_until(lambda: "resumed from" in job.output, START, lambda: job.output)
        assert job.wait(timeout=START) == 0, job.output
    figures["torchrun --max-restarts, a rank killed: resumed after"] = f"{seconds:.1f} s"
    after = Owner.of(tmp_path / "checkpoint")
    assert before.job == after.job and before.start != after.start
    assert curve(read_lines(tmp_path / "metrics.jsonl")) == whole


def test_signals_to_torchrun_save_and_say_so_by_the_exit_code(
    whole: list[tuple], tmp_path: Path
) -> None:
    words = [PYTHON, "-m", "torchtitan.runtime.torchrun", "--nproc-per-node=2"]
    options = ("--checkpoint.interval=1000",)
    with Launched([*words, *training(tmp_path, *options)], tmp_path / "log") as job:
        wait_until(lambda: steps_logged(tmp_path) >= 3, START, lambda: job.output)
        job.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "SIGUSR1: stopping" in job.output, 10, lambda: job.output)
        job.process.send_signal(signal.SIGTERM)  # as Slurm does at the end of the time
        assert job.wait(timeout=30) == PREEMPTED, job.output
        assert not job.ranks()
    stopped_at = steps_logged(tmp_path)
    assert newest_step(tmp_path) == stopped_at < STEPS
    again = train(tmp_path, *training(tmp_path, *options)[2:], ranks=2)
    assert curve(again) == whole


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_terminal_that_is_closed_has_the_run_save(ranks: int, tmp_path: Path) -> None:
    """The bar is drawn on it, which fails from then on, maybe before the signal comes."""
    words = [sys.executable, "-m", "torchtitan.runtime.torchrun", "--nproc-per-node=2"]
    words = words[: 1 if ranks == 1 else None]
    words += training(tmp_path, "--training.steps=100000", "--checkpoint.interval=100000")
    process, terminal = pty.fork()
    if process == 0:
        os.execve(words[0], words, ENV | {"TERM": "xterm"})
    shown = b""
    deadline = time.monotonic() + START
    while steps_logged(tmp_path) < 3:
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 10_000)
    assert b"ETA" in shown
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == PREEMPTED
    assert newest_step(tmp_path) == steps_logged(tmp_path) >= 3
