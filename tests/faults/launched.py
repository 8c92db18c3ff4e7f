"""Runs under torchrun as users start them, seen from outside: its ranks, and what they log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tiny_llama import OPTIONS

STEPS = 40
SAVING = ("--checkpoint.enable", "--checkpoint.interval=5", "--checkpoint.keep_latest_k=2")
ENV = os.environ | {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]]),
}


def training(folder: Path, *options: str) -> list[str]:
    """The part of the command line from the module on."""
    arguments = [*OPTIONS, f"--training.steps={STEPS}", *SAVING, f"--job.dump_folder={folder}"]
    return ["-m", "torchtitan.train", *arguments, *options]


class Launched:
    """A command that starts ranks, such as torchrun; its output goes to `log`.

    Leaving the `with` block kills it and its ranks.
    """

    def __init__(
        self,
        words: list[str],
        log: Path,
        start: Callable[..., Any] = subprocess.Popen,
        env: dict[str, str] | None = None,
    ) -> None:
        self._log = log
        with log.open("ab") as file:
            self.process = start(
                words, env=ENV | (env or {}), stdout=file, stderr=file, process_group=0
            )
        self._ranks: set[int] = set()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that run."""
        pids = [pid for pid in _processes() if pid != self.process.pid and self._is_below(pid)]
        self._ranks.update(pids)
        return pids

    def _is_below(self, pid: int) -> bool:
        while pid > 1 and pid != self.process.pid:
            pid = _parent(pid)
        return pid == self.process.pid

    def wait(self, timeout: float) -> int:
        """The exit code. Raises `TimeoutError` with the output."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(self.output) from error

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.ranks()
        for pid in (self.process.pid, *self._ranks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def wait_until(condition: Callable[[], Any], timeout: float, output: Callable[[], str]) -> float:
    """Seconds until the condition is true. Raises `TimeoutError` with `output()`."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() > begin + timeout:
            raise TimeoutError(output())
        time.sleep(0.02)
    return time.monotonic() - begin


def steps_logged(folder: Path) -> int:
    """Lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def is_running(pid: int) -> bool:
    return _state(pid) not in ("", "Z")


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if is_running(int(path.name))]


def _state(pid: int) -> str:
    fields = _fields(pid)
    return fields[0] if fields else ""


def _parent(pid: int) -> int:
    fields = _fields(pid)
    return int(fields[1]) if fields else 0


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
