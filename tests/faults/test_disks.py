"""Disks that are full, read-only or slow: nothing good is lost, and the run goes on from it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import checkpoints_in, read_lines
from kills import SAVED_EVERY, STEPS, Job, curve, newest_step
from launched import steps_logged, wait_until

from torchtitan.runtime.stop_request import PREEMPTED

JOB = Job(1, "disabled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """The curve of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    JOB.finish(folder)
    return curve(read_lines(folder / "metrics.jsonl"))


class Disk:
    """A file system in memory, of its own size."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        _run("mount", "-t", "tmpfs", "-o", f"size={size}", "titan-test", str(folder))

    def remount(self, option: str) -> None:
        """Raises `CalledProcessError` for `ro` while a file is being written."""
        _run("mount", "-o", f"remount,{option}", str(self.folder))


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """With room for one checkpoint, but not for two."""
    if shutil.which("mount") is None:
        pytest.skip("no command mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        disk = Disk(folder, "5m")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mounting is not permitted: {error.stderr.strip()}")
    yield disk
    _run("umount", "--lazy", str(folder))


def test_a_full_disk_costs_no_checkpoint(disk: Disk, whole: list[tuple]) -> None:
    with JOB.start(disk.folder) as running:
        done = running.wait()
    assert done.exit_codes == [2], done.err
    assert "No space left on device" in done.err
    assert "The checkpoint of step 4 could not be saved" in done.err
    assert checkpoints_in(disk.folder / "checkpoint") == ["step-2"]
    disk.remount("size=64m")
    assert "resumed from" in JOB.finish(disk.folder).err
    assert curve(read_lines(disk.folder / "metrics.jsonl")) == whole


@pytest.mark.long
def test_a_disk_that_becomes_read_only_costs_no_checkpoint(disk: Disk, whole: list[tuple]) -> None:
    disk.remount("size=64m")
    # Slowed down where no file is open, since a file that is being written forbids the remount.
    with JOB.start(disk.folder, "sleep:0.1 renamed 0 0") as running:
        while True:
            wait_until(lambda: newest_step(disk.folder), 60, lambda: "no checkpoint")
            try:
                disk.remount("ro")
            except subprocess.CalledProcessError:
                continue
            break
        saved = newest_step(disk.folder)
        assert saved < STEPS, "the run was over before its disk became read-only"
        done = running.wait()
    assert done.exit_codes == [2], done.err
    assert "Read-only file system" in done.err
    with JOB.start(disk.folder) as running:
        done = running.wait()
    assert done.exit_codes == [2] and "job.dump_folder" in done.err, done.err
    disk.remount("rw")
    assert f"step-{saved}" in JOB.finish(disk.folder).err
    assert curve(read_lines(disk.folder / "metrics.jsonl")) == whole


def test_signals_during_a_save_to_a_slow_disk_do_not_disturb_it(
    tmp_path: Path, whole: list[tuple]
) -> None:
    slow = Job(1, "async")
    with slow.start(tmp_path, "sleep:0.2 write 0 0") as running:
        partial = tmp_path / "checkpoint" / f"step-{SAVED_EVERY}.partial"
        wait_until(partial.exists, 60, lambda: "no save")
        for number in [signal.SIGUSR1, signal.SIGINT, *[signal.SIGTERM] * 10]:
            os.kill(running.pids[0], number)
            time.sleep(0.05)
        done = running.wait()
    assert done.exit_codes == [PREEMPTED], done.err
    assert newest_step(tmp_path) == steps_logged(tmp_path) < STEPS
    slow.finish(tmp_path)
    assert curve(read_lines(tmp_path / "metrics.jsonl")) == whole
