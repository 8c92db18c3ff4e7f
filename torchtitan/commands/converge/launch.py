"""Starts the jobs of a comparison, one after the other, on this machine."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from torchtitan.components.run_folder import CONFIG_FILE, METRICS_FILE
from torchtitan.tools.logging import logger
from torchtitan.tools.text import duration

from .runs import Run

LOG_FILE = "log.txt"
_TAIL_LINES = 20


def launch(run: Run) -> str | None:
    """Run a job to its end. Its output goes to `log.txt` in its folder.

    Returns:
        None, or, if it failed, its exit code and the end of its output.
    """
    log = run.folder / LOG_FILE
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in (METRICS_FILE, CONFIG_FILE):  # from an earlier comparison
        (run.folder / name).unlink(missing_ok=True)
    logger.info("%s: world of %d (%s), log in %s", run.name, run.processes, run.layout, log)
    start = time.perf_counter()
    with log.open("w") as output, _exit_on_sigterm():
        process = subprocess.Popen(command(run), stdout=output, stderr=subprocess.STDOUT)
        try:
            _show_progress(run, process)
        except BaseException:  # Ctrl-C or SIGTERM: leave no processes behind
            process.terminate()
            process.wait()
            raise
    took = duration(time.perf_counter() - start)
    logger.info("%s: exit code %d after %s", run.name, process.returncode, took)
    if process.returncode == 0:
        return None
    written = log.read_text(encoding="utf-8", errors="replace")
    return f"exit code {process.returncode}; the end of {log}:\n{tail(written)}"


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Make SIGTERM an exception like Ctrl-C, instead of ending at once, within the context."""

    def leave(signum: int, _frame: Any) -> None:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def command(run: Run) -> list[str]:
    """Return the command line of a job: plain Python for one process, else torchrun."""
    launcher = [sys.executable, "-m"]
    if run.processes is not None and run.processes > 1:
        launcher += ["torch.distributed.run", f"--nproc-per-node={run.processes}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m"]
    return [*launcher, "torchtitan.train", *run.options]


def tail(log: str) -> str:
    """Return the last lines of the job's log, without torchrun's own report of the failure."""
    lines = log.rstrip().splitlines()
    for number, line in enumerate(lines):
        if re.search(r"torch/distributed/elastic/.* failed \(exitcode: ", line):
            lines = lines[: number + 1]
            break
    return "\n".join(lines[-_TAIL_LINES:])


def _show_progress(run: Run, process: subprocess.Popen) -> None:
    """Wait for the job; on a terminal, show a progress bar."""
    console, metrics = Console(stderr=True), run.folder / METRICS_FILE
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    with bar:
        task = bar.add_task(run.name, total=run.config.training.steps)
        while process.poll() is None:
            time.sleep(0.1)
            if metrics.is_file():
                bar.update(task, completed=metrics.read_text().count("\n"))
