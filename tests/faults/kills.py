"""Kills runs, starts them again, and holds what comes out against a run that nothing disturbed."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from harness import Finished, Running, checkpoints_in, read_lines
from tiny_llama import OPTIONS

STEPS = 10
SAVED_EVERY = 2
KEPT = 2

_LAST_NUMBER = {"write": 10, "synced": 10, "rename": 8, "renamed": 8, "delete": 12, "load": 60}
"""Points of tests/faulty_llama.py -> about how often a run comes to them."""


@dataclass
class Tally:
    """Figures of one kind of run."""

    tried: int = 0
    survived: int = 0
    resume_seconds: list[float] = field(default_factory=list)
    """From the start of a run that resumes (PyTorch is imported) to the end of its first step."""
    down_seconds: list[float] = field(default_factory=list)
    """From the death of one rank of several to the end of the last."""

    def __str__(self) -> str:
        text = f"{self.survived} of {self.tried} kills survived"
        if self.resume_seconds:
            text += f", {_mean(self.resume_seconds):.2f} s to resume"
        if self.down_seconds:
            text += f", down {_mean(self.down_seconds):.1f} s after the death of a rank"
            text += f" (at most {max(self.down_seconds):.1f} s)"
        return text


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@dataclass
class Job:
    """A kind of run: `ranks` processes, and `checkpoint.async_mode`."""

    ranks: int
    async_mode: str
    seconds: float = 0.0
    """How long the last undisturbed run took."""

    def start(self, folder: Path, fault: str = "kill nowhere 0 0", *options: str) -> Running:
        return Running(
            "train",
            *OPTIONS,
            "--job.custom_import=faulty_llama",
            "--model.name=faulty_llama",
            f"--training.steps={STEPS}",
            "--training.local_batch_size=2",
            "--checkpoint.enable",
            f"--checkpoint.interval={SAVED_EVERY}",
            f"--checkpoint.keep_latest_k={KEPT}",
            f"--checkpoint.async_mode={self.async_mode}",
            f"--job.dump_folder={folder}",
            *options,
            ranks=self.ranks,
            FAULT=fault,
        )

    def finish(self, folder: Path) -> Finished:
        """Run to the end with no fault."""
        begin = time.monotonic()
        with self.start(folder) as running:
            done = running.wait()
        assert set(done.exit_codes) == {0}, done.err
        self.seconds = time.monotonic() - begin
        return done


def kill_at_point(job: Job, folder: Path, random: Random, tally: Tally) -> Finished:
    """A rank kills itself at a point of a checkpoint's life; the others must fail by themselves."""
    points = [point for point in _LAST_NUMBER if point != "load" or newest_step(folder)]
    point = random.choice(points)
    # Rank 0 alone renames and deletes.
    rank = random.randrange(job.ranks) if point in ("write", "synced", "load") else 0
    last = _LAST_NUMBER[point] if rank == 0 else 5
    with job.start(folder, f"kill {point} {random.randint(1, last)} {rank}") as running:
        return running.wait()


def kill_all(job: Job, folder: Path, random: Random, tally: Tally) -> Finished:
    """All processes die at once, at any time."""
    with job.start(folder) as running:
        timer = threading.Timer(random.uniform(0, job.seconds), running.kill)
        timer.start()
        done = running.wait()
        timer.cancel()
    return done


def kill_one(job: Job, folder: Path, random: Random, tally: Tally) -> Finished:
    """One rank dies, at any time; the others must fail by themselves."""
    with job.start(folder) as running:
        killed_at = []

        def kill() -> None:
            killed_at.append(time.monotonic())
            with suppress(ProcessLookupError):
                os.kill(random.choice(running.pids), signal.SIGKILL)

        timer = threading.Timer(random.uniform(0, job.seconds), kill)
        timer.start()
        done = running.wait()
        timer.cancel()
        if -signal.SIGKILL in done.exit_codes and job.ranks > 1 and _has_trained(done):
            tally.down_seconds.append(time.monotonic() - killed_at[0])
    return done


WAYS: list[Callable[[Job, Path, Random, Tally], Finished]] = [kill_at_point, kill_all, kill_one]


def kill_and_finish(
    job: Job, folder: Path, kills: int, random: Random, expected: list[tuple], tally: Tally
) -> None:
    """Kill a run and those that resume it `kills` times in all, then check how the last one ends.

    Raises:
        AssertionError: it does not resume from the newest complete checkpoint, or the metrics are
            not `expected`, or other checkpoints are left than after an undisturbed run.
    """
    done, logs = 0, []
    while done < kills:
        killed = random.choice(WAYS)(job, folder, random, tally)
        logs.append(killed.err)
        saved = [int(step) for step in re.findall(r"saved \S+/step-(\d+)", killed.err)]
        assert newest_step(folder) >= max(saved, default=0), killed.err
        if _has_trained(killed):
            assert None not in killed.exit_codes, killed.err  # none had to be stopped
        if -signal.SIGKILL in killed.exit_codes:
            done += 1
            tally.tried += 1

    step, begin = newest_step(folder), time.time()
    log = job.finish(folder).err
    resumed = [int(step) for step in re.findall(r"resumed from \S+/step-(\d+)", log)]
    assert resumed == ([step] if step else []), log
    lines = read_lines(folder / "metrics.jsonl")
    logs.append(log)
    assert curve(lines) == expected, "\n".join(logs)
    left = set(checkpoints_in(folder / "checkpoint"))
    if step == STEPS:  # it died after its last save; what it had not yet deleted, no save deletes
        oldest = f"step-{STEPS - SAVED_EVERY * KEPT}"
        left -= {oldest, f"{oldest}.partial"}
    kept = {f"step-{STEPS - SAVED_EVERY * i}" for i in range(KEPT)}
    assert left == kept, "\n".join([*logs, *left])
    tally.survived += kills
    if step < STEPS:
        # The resolved config is written when the checkpoint is loaded, and the clock of the
        # metrics starts.
        loaded = (folder / "config.resolved.toml").stat().st_mtime
        tally.resume_seconds.append(loaded - begin + lines[step]["elapsed_seconds"])


def _has_trained(done: Finished) -> bool:
    """Whether there was a step. Ranks that wait for each other at the start notice no death.

    It is for the launcher to stop them then.
    """
    return " loss " in done.err


def newest_step(folder: Path) -> int:
    """Of the complete checkpoints in a dump folder; 0 if there is none."""
    names = [path.name for path in (folder / "checkpoint").glob("step-*")]
    return max((int(name[5:]) for name in names if name[5:].isdigit()), default=0)


def curve(lines: list[dict]) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]
